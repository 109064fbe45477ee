"""The block pool: which blocks of the paged caches are in use, by how many sequences, and the memory behind them.

A cache group is a set of layers that share block tables. Each group numbers its own blocks; block 0 is never handed out,
since it pads tables and stands for freed entries. Memory is reserved for all blocks and committed by the kernel page by page,
as blocks are first written; low numbers are handed out first, so what was never needed is never committed. When nobody holds a
block any more, the kernel may have the pages back, but for blocks that are kept since another sequence may begin as they do.
"""

from __future__ import annotations

import ctypes
import mmap
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count

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
    """Counted references to the blocks of one cache group, numbered from 1 to `blocks` - 1.

    A block whose content is remembered stays as it is when its last reference goes: it is kept, and free all the same, since
    it is handed out again, the least recently used first, when no other is left.
    """

    def __init__(self, blocks: int) -> None:
        """Make a pool with every block free. `blocks` counts block 0."""
        self.blocks = blocks
        self.clock: Iterator[int] = count()
        """Tells which of two blocks was let go of first; pools that share it can be compared."""
        self.on_forget: Callable[[int], object] = _nobody
        """Called with a remembered block before it may be written again."""
        self._references: dict[int, int] = {}
        self._remembered: set[int] = set()
        self._kept: OrderedDict[int, int] = OrderedDict()  # when they lost their last reference, the oldest first
        self._returned: list[int] = []
        self._blank: list[int] = []  # handed out before; their memory was given back to the system
        self._fresh = 1

    @property
    def free(self) -> int:
        """Blocks that nobody holds, kept ones included."""
        return self.blocks - 1 - len(self._references)

    @property
    def used(self) -> int:
        """Blocks that somebody holds."""
        return len(self._references)

    @property
    def kept(self) -> int:
        """Blocks that nobody holds and whose content is remembered."""
        return len(self._kept)

    @property
    def oldest(self) -> int:
        """When the least recently used of the kept blocks, of which there is one, lost its last reference."""
        return next(iter(self._kept.values()))

    @property
    def touched(self) -> int:
        """Blocks behind which there may be memory: handed out since the pool was made or reset, and not blanked since."""
        return self._fresh - 1 - len(self._blank)

    @property
    def returned(self) -> int:
        """Blocks behind which there may be memory for nothing."""
        return len(self._returned)

    def take(self, count: int, *, spare: bool = False) -> list[int]:
        """Hand out `count` blocks, each with one reference. The caller has looked at `free`.

        With `spare`, kept blocks are taken before those that have no memory behind them yet.
        """
        assert count <= self.free, f"{count} blocks wanted, {self.free} free"
        taken: list[int] = []
        while len(taken) < count:
            if not self._returned and self._kept and (spare or not (self._blank or self._fresh < self.blocks)):
                self.let_go()
            if self._returned:
                taken.append(self._returned.pop())
            elif self._blank:
                taken.append(self._blank.pop())
            else:
                taken.append(self._fresh)
                self._fresh += 1
        self._references.update(dict.fromkeys(taken, 1))
        return taken

    def reset(self) -> None:
        """Forget which blocks have been handed out; nobody holds one, and none is kept."""
        assert not self._references and not self._kept, f"{self.used} blocks are held, {self.kept} kept"
        self._returned.clear()
        self._blank.clear()
        self._fresh = 1

    def blank(self) -> list[range]:
        """Return the blocks behind which there is memory for nothing, as runs of neighbours; the caller gives it back."""
        runs: list[range] = []
        for block in sorted(self._returned):
            if runs and runs[-1].stop == block:
                runs[-1] = range(runs[-1].start, block + 1)
            else:
                runs.append(range(block, block + 1))
        self._blank += sorted(self._returned, reverse=True)  # low numbers first again
        self._returned.clear()
        return runs

    def share(self, blocks: Iterable[int]) -> None:
        """Add a reference to each block, held or kept; block 0 is passed over."""
        for block in blocks:
            if block:
                self._kept.pop(block, None)
                self._references[block] = self._references.get(block, 0) + 1

    def drop(self, blocks: Iterable[int]) -> None:
        """Remove a reference from each block, and take back those without any; block 0 is passed over."""
        for block in blocks:
            if not block:
                continue
            if self._references[block] > 1:
                self._references[block] -= 1
                continue
            del self._references[block]
            if block in self._remembered:
                self._kept[block] = next(self.clock)
            else:
                self._returned.append(block)

    def shared(self, block: int) -> bool:
        """Tell whether a block has more than one reference, so that a writer needs a copy of its own."""
        return self._references[block] > 1

    def remember(self, block: int) -> None:
        """Keep a held block's content beyond its last reference, until the block is needed or let go."""
        self._remembered.add(block)

    def remembers(self, block: int) -> bool:
        """Tell whether a block's content is remembered, so that a writer needs a copy, or has it forgotten."""
        return block in self._remembered

    def forget(self, block: int) -> None:
        """Remember a held block's content no more."""
        self.on_forget(block)
        self._remembered.discard(block)

    def let_go(self) -> None:
        """Forget the least recently used of the kept blocks, of which there is one, and take it back."""
        block = next(iter(self._kept))
        self.forget(block)
        del self._kept[block]
        self._returned.append(block)


def _nobody(block: int) -> None:
    """Nobody wants to know of a forgotten block."""


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


def discard(cache: Tensor, blocks: range | None = None) -> None:
    """Give the memory behind a whole cache back to the system, or behind some of its blocks as far as they fill pages.

    It reads as zeros then, and is committed anew when written. Where the system refuses, nothing has changed.
    """
    begin, end = cache.data_ptr(), cache.data_ptr() + cache.numel() * cache.itemsize
    if blocks is not None:
        size = cache[0].numel() * cache.itemsize
        first, last = begin + blocks.start * size, begin + blocks.stop * size
        begin, end = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE, last // mmap.PAGESIZE * mmap.PAGESIZE
    if begin < end:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), ctypes.c_int(mmap.MADV_DONTNEED))
