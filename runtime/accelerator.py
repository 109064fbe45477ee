"""What the runtime asks of a device with a memory of its own: the one place where tests put something else in a GPU's place.

`oxfuse.runtime.cuda` implements it with torch.cuda. Work is queued and runs in its order on one stream; the host waits for it
with `synchronize`. A second stream brings weights while the host reads the next ones.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from oxfuse.runtime.memory_plan import Room


@dataclass(frozen=True, kw_only=True)
class DeviceMemory:
    """Bytes of this process on the device: in tensors now, the most so far, and what the allocator has taken for them."""

    allocated: int
    peak: int
    reserved: int


class Captured(ABC):
    """Recorded work, which runs again on the same addresses, with whatever lies there."""

    @abstractmethod
    def replay(self) -> None:
        """Queue the work again."""


class Accelerator(ABC):
    """A device, its memory and its stream."""

    device: torch.device

    @abstractmethod
    def active(self) -> AbstractContextManager[None]:
        """Return a context in which this thread's tensor operations are queued on the device's stream."""

    @abstractmethod
    def stream(self) -> int:
        """Return the stream's handle, for a library that queues work itself."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait until all that was queued is done. Raises RuntimeError for what failed in it."""

    @abstractmethod
    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return host memory that the device reads and writes by itself. It may be let go once the work that uses it is done."""

    @abstractmethod
    def capture(self, work: Callable[[], object]) -> Captured:
        """Record what `work` queues, without running it. What it allocates belongs to the record and is taken from one pool.

        Records share the pool, so that they take together what the largest takes: what one leaves in memory of the pool is lost
        when another runs. Raises RuntimeError where something cannot be recorded.
        """

    @abstractmethod
    def upload(self, target: Tensor, source: Tensor) -> Callable[[], None]:
        """Begin to copy pinned host memory to the device beside the stream; return a function that waits until it is done."""

    @abstractmethod
    def room(self) -> Room:
        """Return how much memory is free, that which the allocator keeps for nothing included."""

    @abstractmethod
    def memory(self) -> DeviceMemory:
        """Return what this process has there."""
