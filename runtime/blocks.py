"""The block pool: which blocks of the paged caches are in use, by how many sequences, and the memory behind them.

A cache group is a set of layers that share block tables. Each group numbers its own blocks; block 0 is never handed out,
since it pads tables and stands for freed entries. Memory is reserved for all blocks and committed by the kernel page by page,
as blocks are first written; low numbers are handed out first, so what was never needed is never committed. When nobody holds a
block any more, the kernel may have the pages back.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from oxfuse.runtime.cache_size import CacheSize
from oxfuse.runtime.errors import InternalError, UserError
from oxfuse.runtime.manifest import CacheSpec, cache_shapes

CACHE_ALIGNMENT = 16
"""Bytes; what programs are compiled for."""
MAP_NORESERVE = 0x4000
"""Linux, every architecture that torch has wheels for; Python's mmap has no name for it before 3.13."""


class BlockPool:
    """Counted references to the blocks of one cache group, numbered from 1 to `blocks` - 1."""

    def __init__(self, blocks: int) -> None:
        """Make a pool with every block free. `blocks` counts block 0."""
        self.blocks = blocks
        self._references: dict[int, int] = {}
        self._returned: list[int] = []
        self._fresh = 1

    @property
    def free(self) -> int:
        """Blocks that nobody holds."""
        return self.blocks - 1 - len(self._references)

    @property
    def used(self) -> int:
        """Blocks that somebody holds."""
        return len(self._references)

    def take(self, count: int) -> list[int]:
        """Hand out `count` blocks, each with one reference. The caller has looked at `free`."""
        assert count <= self.free, f"{count} blocks wanted, {self.free} free"
        old = [self._returned.pop() for _ in range(min(count, len(self._returned)))]
        taken = old + list(range(self._fresh, self._fresh + count - len(old)))
        self._fresh += count - len(old)
        self._references.update(dict.fromkeys(taken, 1))
        return taken

    @property
    def touched(self) -> int:
        """Blocks that have been handed out since the pool was made or reset, so that there may be memory behind them."""
        return self._fresh - 1

    def reset(self) -> None:
        """Forget which blocks have been handed out; nobody holds one."""
        assert not self._references, f"{self.used} blocks are held"
        self._returned.clear()
        self._fresh = 1

    def share(self, blocks: Iterable[int]) -> None:
        """Add a reference to each block; block 0 is passed over."""
        for block in blocks:
            if block:
                self._references[block] += 1

    def drop(self, blocks: Iterable[int]) -> None:
        """Remove a reference from each block, and take back those without any; block 0 is passed over."""
        for block in blocks:
            if not block:
                continue
            if self._references[block] > 1:
                self._references[block] -= 1
            else:
                del self._references[block]
                self._returned.append(block)

    def shared(self, block: int) -> bool:
        """Tell whether a block has more than one reference, so that a writer needs a copy of its own."""
        return self._references[block] > 1


def cache_dtype(spec: CacheSpec) -> torch.dtype:
    """Return the dtype that the manifest names. Raises UserError for one that torch does not have."""
    dtype = getattr(torch, spec.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise UserError(f"The manifest's cache dtype is {spec.dtype!r}, which torch does not know: the manifest is damaged.")
    return dtype


def cache_dims(spec: CacheSpec, size: CacheSize) -> list[tuple[int, ...]]:
    """Return the shapes of the caches, K and V of each layer in layer order: [blocks, *cache_shapes(...)]."""
    blocks = {layer: count for group, count in zip(spec.groups, size.blocks, strict=True) for layer in group.layers}
    if sorted(blocks) != list(range(len(spec.kv_heads))):
        raise UserError(
            f"The cache groups hold the layers {sorted(blocks)}, not 0 to {len(spec.kv_heads) - 1}: damaged manifest."
        )
    return [
        (blocks[layer], *shape)
        for layer in sorted(blocks)
        for shape in cache_shapes(spec.kv_heads[layer], spec.head_dim[layer], spec.block_size)
    ]


def allocate_caches(spec: CacheSpec, size: CacheSize) -> list[Tensor]:
    """Return the caches of `cache_dims` in the CPU's memory: zeros without memory behind them."""
    dtype = cache_dtype(spec)
    return [reserve(shape, dtype) for shape in cache_dims(spec, size)]


def check_caches(caches: Sequence[Tensor], spec: CacheSpec, size: CacheSize) -> None:
    """Raise InternalError unless `caches` are as the programs believe them to be: shape, dtype, contiguous and aligned.

    A program copies a cache that does not begin at a multiple of 16 bytes, and what it writes into the copy is lost.
    """
    expected, dtype = cache_dims(spec, size), cache_dtype(spec)
    for number, (cache, shape) in enumerate(zip(caches, expected, strict=True)):
        if tuple(cache.shape) != shape or cache.dtype != dtype or not cache.is_contiguous():
            raise InternalError(
                f"Cache {number} is {cache.dtype} of {list(cache.shape)} with strides {list(cache.stride())}, expected {dtype} "
                f"of {list(shape)} in one piece."
            )
        if cache.data_ptr() % CACHE_ALIGNMENT:
            raise InternalError(
                f"Cache {number} begins at address {cache.data_ptr():#x}, not at a multiple of {CACHE_ALIGNMENT}: a program "
                "would write into a copy of it."
            )


def reserve(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return zeros without memory behind them, which the system commits page by page. Raises UserError where it refuses."""
    count = torch.Size(shape).numel()
    try:
        pages = mmap.mmap(-1, count * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    except OSError as error:
        raise UserError(
            f"The system refuses to reserve {count * dtype.itemsize} bytes for a cache: {error}. "
            "Load with a smaller cache_bytes, or compile with a smaller max_context or max_batch."
        ) from error
    return torch.frombuffer(pages, dtype=dtype, count=count).view(shape)


def discard(cache: Tensor) -> None:
    """Give the memory behind a whole cache back to the system. It reads as zeros then, and is committed anew when written.

    Where the system refuses, nothing has changed.
    """
    ctypes.CDLL(None).madvise(
        ctypes.c_void_p(cache.data_ptr()), ctypes.c_size_t(cache.numel() * cache.itemsize), ctypes.c_int(mmap.MADV_DONTNEED)
    )
