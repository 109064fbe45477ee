"""Brings weights to a device once: one allocation for all, filled piece by piece through two pinned buffers.

While one buffer is being copied, the other is filled from the file by a few readers; nothing is mapped, so no page of the file is
left in this process. Every program shares the tensors, which are views of the one allocation.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from oxfuse.runtime.accelerator import Accelerator
from oxfuse.runtime.errors import UserError
from oxfuse.runtime.weights import Extent, damaged, read_header

STAGING_BYTES = 64 << 20
"""Of each of the two buffers: a few milliseconds of a copy, so that neither its start nor its end counts."""
READERS = 4
"""Threads that read: one fills a buffer at some 5 GB/s from the page cache, a fifth of what the bus takes."""
READ_BYTES = 4 << 20
"""Most bytes that a reader takes at once."""
WEIGHT_ALIGNMENT = 256
"""Bytes; what the device's own allocations begin at, so that kernels may load as they like."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """A tensor of the file at `path`, and the byte of the allocation at which it begins."""

    path: Path
    extent: Extent
    begin: int

    @property
    def end(self) -> int:
        """The byte behind it."""
        return self.begin + self.extent.end - self.extent.begin


@dataclass(frozen=True, kw_only=True)
class WeightLayout:
    """Where each weight lies in an allocation of `bytes` bytes."""

    places: Mapping[str, Place]
    bytes: int


def lay_out(paths: Sequence[Path], names: Collection[str]) -> WeightLayout:
    """Place those tensors of the safetensors files that `names` has one after the other. Reads the headers only.

    Raises UserError as `read_header` does.
    """
    places, end = dict[str, Place](), 0
    for path in paths:
        extents, _ = read_header(path)
        for name, extent in sorted(extents.items(), key=lambda item: item[1].begin):
            if name in names:
                places[name] = Place(path=path, extent=extent, begin=end)
                end += -(-(extent.end - extent.begin) // WEIGHT_ALIGNMENT) * WEIGHT_ALIGNMENT
    return WeightLayout(places=places, bytes=end)


def upload_weights(
    layout: WeightLayout, accelerator: Accelerator, progress: Callable[[int], object] | None = None
) -> dict[str, Tensor]:
    """Copy the weights to the device and return them by name; `progress` gets the bytes that were read since its last call.

    Raises UserError where a file cannot be read, ends too early, or the device has no room for the allocation after all.
    """
    try:
        with accelerator.active():
            flat = torch.empty(layout.bytes, dtype=torch.uint8, device=accelerator.device)
    except torch.OutOfMemoryError as error:
        room = accelerator.room()
        raise UserError(
            f"{room.device} has {room.free:,} bytes free and refuses {layout.bytes:,} bytes of weights: end what else uses it."
        ) from error
    buffers = [accelerator.pinned([min(STAGING_BYTES, layout.bytes)], torch.uint8) for _ in range(2)]
    waits: list[Callable[[], None] | None] = [None, None]
    places = list(layout.places.values())
    with ExitStack() as stack:
        readers = stack.enter_context(ThreadPoolExecutor(READERS))
        files = {path: stack.enter_context(_opened(path)) for path in {place.path for place in places}}
        for number, begin in enumerate(range(0, layout.bytes, STAGING_BYTES)):
            end, which = min(begin + STAGING_BYTES, layout.bytes), number % 2
            if (wait := waits[which]) is not None:
                wait()
            reads = _reads(places, begin, end)
            view = buffers[which].numpy().data
            for count in readers.map(partial(_read, files, view), reads):
                if progress:
                    progress(count)
            waits[which] = accelerator.upload(flat[begin:end], buffers[which][: end - begin])
        for wait in waits:
            if wait is not None:
                wait()
    return {name: _view(flat, place) for name, place in layout.places.items()}


def _view(flat: Tensor, place: Place) -> Tensor:
    shape, dtype = place.extent.shape, place.extent.dtype
    return flat[place.begin : place.begin + prod(shape) * dtype.itemsize].view(dtype).view(shape)


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    try:
        file = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    try:
        yield file
    finally:
        os.close(file)


@dataclass(frozen=True, kw_only=True)
class _Read:
    """`count` bytes from `offset` of a file on, to go to byte `into` of a buffer."""

    path: Path
    offset: int
    into: int
    count: int


def _reads(places: Sequence[Place], begin: int, end: int) -> list[_Read]:
    """Return what fills a buffer with bytes `begin` to `end` of the allocation; between tensors it keeps what it has."""
    reads = []
    for place in places:
        first, last = max(begin, place.begin), min(end, place.end)
        for at in range(first, last, READ_BYTES):
            offset = place.extent.begin + at - place.begin
            reads.append(_Read(path=place.path, offset=offset, into=at - begin, count=min(READ_BYTES, last - at)))
    return reads


def _read(files: Mapping[Path, int], buffer: memoryview, read: _Read) -> int:
    done = 0
    while done < read.count:
        part = buffer[read.into + done : read.into + read.count]
        try:
            count = os.preadv(files[read.path], [part], read.offset + done)
        except OSError as error:
            raise UserError(f"{read.path} cannot be read: {error.strerror}.") from error
        if not count:
            raise damaged(read.path, f"ended at byte {read.offset + done} while it was read")
        done += count
    return done
