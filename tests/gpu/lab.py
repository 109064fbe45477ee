"""What the items of the report share within a process: the GPU, its measured floors, and functions that time work on it."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from oxfuse.passes.fusions.linear.reference import arch_of

SPREAD_BYTES = 320 << 20
"""Bytes that the copies of a timed kernel's inputs have together: several times the 50 to 60 MB of L2 of an H100 or H200."""
MOST_COPIES = 32
READ_BLOCK = 8192


@dataclass
class Lab:
    """One GPU. `facts` hold what earlier processes measured."""

    work: Path
    facts: dict[str, Any] = field(default_factory=dict)
    kept: dict[str, Any] = field(default_factory=dict)
    """What items of a section leave for the next, by name."""

    @cached_property
    def device(self) -> torch.device:
        """Return the GPU, after setting what float32 products mean."""
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        torch.set_grad_enabled(False)
        return torch.device("cuda", torch.cuda.current_device())

    @cached_property
    def arch(self) -> int:
        """Return 90 for sm_90."""
        return arch_of(self.device)

    @property
    def bandwidth(self) -> float:
        """Return the bytes a second at which a large buffer is read."""
        if "bandwidth" not in self.facts:
            self.facts["bandwidth"] = read_bandwidth(self.device)
        return float(self.facts["bandwidth"])

    @property
    def matmul(self) -> float:
        """Return the operations a second of a large bfloat16 product."""
        if "matmul" not in self.facts:
            self.facts["matmul"] = matmul_rate(self.device)
        return float(self.facts["matmul"])

    def healthy(self) -> bool:
        """Tell whether the GPU still answers: after an illegal access, no call of the process does."""
        try:
            torch.cuda.synchronize()
            return bool(torch.ones(8, device="cuda").sum().item() == 8)
        except Exception:
            return False

    def tidy(self) -> None:
        """Give memory back."""
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()


def same(kernel: Any) -> Any:
    """Stand for `wrap_triton`: launch a kernel as it is."""
    return kernel


@triton.jit
def read_kernel(source, sums, BLOCK: tl.constexpr, ROUNDS: tl.constexpr):
    """Read ROUNDS * BLOCK int32 a program; the sums keep the compiler from leaving the loads out."""
    at = tl.program_id(0).to(tl.int64) * (BLOCK * ROUNDS) + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.int32)
    for i in range(ROUNDS):
        total += tl.load(source + (at + i * BLOCK))
    tl.store(sums + tl.program_id(0), tl.sum(total, 0))


def read_bandwidth(device: torch.device, bytes_: int = 4 << 30) -> float:
    """Return the best rate of three ways to read a buffer once, in bytes a second."""
    source = torch.zeros(bytes_ // 4, dtype=torch.int32, device=device)
    rates = [bytes_ / median(times([lambda: source.view(torch.int64).sum()], rounds=7))]
    for rounds in (1, 8):
        programs = source.numel() // (READ_BLOCK * rounds)
        sums = torch.empty(programs, dtype=torch.int32, device=device)
        launch = lambda r=rounds, p=programs, s=sums: read_kernel[(p,)](source, s, BLOCK=READ_BLOCK, ROUNDS=r, num_warps=8)  # noqa: E731
        rates.append(bytes_ / median(times([launch], rounds=7)))
    return max(rates)


def matmul_rate(device: torch.device, size: int = 8192, dtype: torch.dtype = torch.bfloat16) -> float:
    """Return the operations a second of a product of two random square matrices; random, since zeros draw less power."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / median(times([lambda: a @ b], rounds=12))


def times(variants: Sequence[Callable[[], object]], rounds: int = 15, warm_ups: int = 3) -> list[float]:
    """Return the seconds of a call, once for each round, between CUDA events; a round calls every variant once."""
    for _ in range(warm_ups):
        for call in variants:
            call()
    torch.cuda.synchronize()
    found = []
    for _ in range(rounds):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for call in variants:
            call()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end) / 1e3 / len(variants))
    return found


def captured_times(variants: Sequence[Callable[[], object]], rounds: int = 15) -> tuple[list[float], bool]:
    """Return `times` of a CUDA graph of the calls, so that Python's launches do not count; False where it cannot be recorded."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in variants:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for call in variants:
                call()
    except RuntimeError:
        return times(variants, rounds), False
    seconds = [found / len(variants) for found in times([graph.replay], rounds)]
    graph.reset()
    return seconds, True


def median(values: Sequence[float]) -> float:
    """Return the median."""
    return statistics.median(values)


def copies_for(bytes_: float) -> int:
    """Return how many copies of inputs of so many bytes spread beyond the L2 cache."""
    return int(max(1, min(MOST_COPIES, -(-SPREAD_BYTES // max(1, int(bytes_))))))


def tensors_of(values: Sequence[Any]) -> list[Tensor]:
    """Return the tensors among values."""
    return [value for value in values if isinstance(value, Tensor)]
