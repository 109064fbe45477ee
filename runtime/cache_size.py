"""How many blocks the paged cache needs, and what they take: arithmetic on the manifest alone.

It opens no library, so that `inspect` can tell an artifact's memory on a machine that has no torch; the block pool and the engine
size their caches with the same functions.
"""

from __future__ import annotations

from dataclasses import dataclass

from oxfuse.runtime.errors import UserError
from oxfuse.runtime.manifest import CacheGroup, CacheSpec, Limits
from oxfuse.runtime.units import item_bytes

PREFILL_CHUNK = 640
"""Most tokens that one sequence adds to a step: enough to fill the experts' tiles, few enough that decodes need not wait long."""

PREFIX_CACHE_BYTES = 1 << 30
"""Bytes of blocks that stay by default while no sequence holds them, where memory is committed as it is used: of gpt-oss-20b in
bfloat16 a conversation of 32k tokens, which takes 24 KiB a token in layers with full attention, and its last windows."""


@dataclass(frozen=True, kw_only=True)
class CacheSize:
    """How many blocks each group gets (block 0 included) and what they would take when all are written."""

    blocks: tuple[int, ...]
    bytes: int


def prefill_chunk(limits: Limits, chunk: int | None = None) -> int:
    """Return the most tokens that one sequence adds to a step: `chunk`, PREFILL_CHUNK by default, and no more than `limits`."""
    return min(chunk or PREFILL_CHUNK, limits.max_step_tokens, limits.max_context)


def prefix_bound(size: CacheSize, claimed: bool, asked: int | None = None) -> int:
    """Return the most bytes of a cache of `size` that stay for later sequences: `asked`, or by default PREFIX_CACHE_BYTES.

    Where the cache's memory is `claimed` at once, nothing is saved by less than all of it, which is the default there.
    """
    return min(size.bytes, asked if asked is not None else size.bytes if claimed else PREFIX_CACHE_BYTES)


def blocks_for(tokens: int, block_size: int) -> int:
    """Return how many blocks `tokens` tokens fill."""
    return -(-tokens // block_size)


def block_bytes(spec: CacheSpec, group: CacheGroup) -> int:
    """Return the bytes of one block of a group: keys and values of `block_size` tokens in each of its layers.

    Raises UserError for a dtype that no cache has.
    """
    return sum(2 * spec.block_size * spec.kv_heads[i] * spec.head_dim[i] * item_bytes(spec.dtype) for i in group.layers)


def sequence_blocks(group: CacheGroup, tokens: int, *, block_size: int, chunk: int, reserve: int) -> int:
    """Return the most blocks of a group that a sequence holds at any time while it grows to `tokens` tokens.

    A sliding group needs no more than its window, the reserve, one prefill chunk of `chunk` tokens, and the partial block at the
    window's old end.
    """
    blocks = blocks_for(tokens, block_size)
    return min(blocks, blocks_for(group.window + reserve + chunk, block_size) + 1) if group.window else blocks


def size_cache(spec: CacheSpec, limits: Limits, *, chunk: int, reserve: int, cache_bytes: int | None = None) -> CacheSize:
    """Choose the block counts: enough for `max_batch` sequences of `max_context`, or what fits in `cache_bytes` if that is less.

    With `cache_bytes` all groups shrink alike, but none below what one chunk needs. Raises UserError where not even that fits.
    """
    units = limits.max_batch * blocks_for(limits.max_context, spec.block_size)
    whole = _sized(spec, limits, units, chunk=chunk, reserve=reserve)
    if cache_bytes is None or whole.bytes <= cache_bytes:
        return whole
    least = least_cache(spec, limits, chunk=chunk, reserve=reserve)
    if least.bytes > cache_bytes:
        raise UserError(
            f"cache_bytes is {cache_bytes}; the smallest cache that can run a prefill chunk of {chunk} tokens takes "
            f"{least.bytes} bytes. Give at least that much."
        )
    low, high = 0, units  # low fits, high does not
    while high - low > 1:
        middle = (low + high) // 2
        fits = _sized(spec, limits, middle, chunk=chunk, reserve=reserve).bytes <= cache_bytes
        low, high = (middle, high) if fits else (low, middle)
    return _sized(spec, limits, low, chunk=chunk, reserve=reserve)


def least_cache(spec: CacheSpec, limits: Limits, *, chunk: int, reserve: int) -> CacheSize:
    """Return the smallest cache in which one sequence can run one chunk of `chunk` tokens."""
    return _sized(spec, limits, 0, chunk=chunk, reserve=reserve)


def _sized(spec: CacheSpec, limits: Limits, units: int, *, chunk: int, reserve: int) -> CacheSize:
    """Return the cache for `units` blocks' worth of sequences of `max_context`, of each group no less than one chunk needs."""
    size = spec.block_size
    longest = blocks_for(limits.max_context, size)
    blocks = []
    for group in spec.groups:
        # one more for the copy of a shared block
        full = sequence_blocks(group, limits.max_context, block_size=size, chunk=chunk, reserve=reserve) + 1
        least = full if group.window else min(full, blocks_for(chunk, size) + 2)
        blocks.append(1 + max(least, units * full // longest))
    total = sum(n * block_bytes(spec, group) for n, group in zip(blocks, spec.groups, strict=True))
    return CacheSize(blocks=tuple(blocks), bytes=total)
