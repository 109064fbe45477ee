"""An NVIDIA GPU as the runtime uses it: the only module that touches torch.cuda, imported when an artifact for one is loaded.

All work goes through one stream that is not the default one, since only such a one can be recorded; so the allocator, which
keeps memory by streams, hands the memory of one step to the next. Contexts set device and stream for the thread that runs a
step, whichever it is, and put the caller's back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor

from oxfuse.runtime.accelerator import Accelerator, Captured, DeviceMemory
from oxfuse.runtime.errors import UserError
from oxfuse.runtime.gpus import Gpu
from oxfuse.runtime.memory_plan import Room


class Cuda(Accelerator):
    """One GPU of this process."""

    def __init__(self, gpu: Gpu) -> None:
        """Initialise torch.cuda and make the streams. Raises UserError where torch refuses the GPU."""
        self.device, self._gpu = torch.device("cuda", gpu.index), gpu
        try:
            torch.cuda.init()
            found = "sm_{}{}".format(*torch.cuda.get_device_capability(self.device))
            self._stream, self._aside = torch.cuda.Stream(self.device), torch.cuda.Stream(self.device)
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"torch cannot use {gpu}: {str(error).partition(chr(10))[0]}") from error
        if found != gpu.arch:
            raise UserError(
                f"The driver calls GPU {gpu.index} {gpu.arch}, torch {found}: unset CUDA_DEVICE_ORDER, or give device='cuda:N' "
                "with torch's number."
            )
        self._pool: Any = None

    @contextmanager
    def active(self) -> Iterator[None]:
        """Set device and stream for this thread."""
        with torch.cuda.stream(self._stream):
            yield

    def stream(self) -> int:
        """Return the cudaStream_t."""
        return int(self._stream.cuda_stream)

    def synchronize(self) -> None:
        """Wait for the stream."""
        self._stream.synchronize()

    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return page-locked memory, of which torch keeps what was let go and hands it out again once no copy uses it."""
        return torch.empty(tuple(shape), dtype=dtype, pin_memory=True)

    def capture(self, work: Callable[[], object]) -> Captured:
        """Record a CUDA graph. Other threads may use the GPU meanwhile; what they do is not recorded."""
        graph = torch.cuda.CUDAGraph()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        try:
            work()
        except BaseException:
            with suppress(RuntimeError):  # says again that the recording failed
                graph.capture_end()
            raise
        graph.capture_end()
        return _Graph(graph)

    def upload(self, target: Tensor, source: Tensor) -> Callable[[], None]:
        """Copy on the second stream, once what was queued on the first is done with the memory."""
        self._aside.wait_stream(self._stream)
        with torch.cuda.stream(self._aside):
            target.copy_(source, non_blocking=True)
            done: torch.cuda.Event = self._aside.record_event()
        wait: Callable[[], None] = done.synchronize
        return wait

    def room(self) -> Room:
        """Return the driver's figures, after giving back what the allocator keeps."""
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(self.device)
        return Room(device=str(self._gpu), free=free, total=total)

    def memory(self) -> DeviceMemory:
        """Return the allocator's figures, which leave out what the driver takes for itself and for kernels."""
        return DeviceMemory(
            allocated=torch.cuda.memory_allocated(self.device),
            peak=torch.cuda.max_memory_allocated(self.device),
            reserved=torch.cuda.memory_reserved(self.device),
        )


def current_device() -> int | None:
    """Return the number of the GPU that the caller has chosen in torch, None where torch.cuda is not in use yet."""
    return int(torch.cuda.current_device()) if torch.cuda.is_initialized() else None


class _Graph(Captured):
    def __init__(self, graph: torch.cuda.CUDAGraph) -> None:
        self._graph = graph

    def replay(self) -> None:
        self._graph.replay()
