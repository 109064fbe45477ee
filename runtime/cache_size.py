"""How many blocks the paged cache needs, and what they take: arithmetic on the manifest alone.

It opens no library, so that `inspect` can tell an artifact's memory on a machine that has no torch; the block pool and the engine
size their caches with the same functions.
"""

from __future__ import annotations

from dataclasses import dataclass

from oxfuse.runtime.errors import UserError
from oxfuse.runtime.manifest import CacheGroup, CacheSpec, Limits
from oxfuse.runtime.units import item_bytes

PREFILL_CHUNK = 1024
"""Most tokens that one sequence adds to a step: enough to fill the experts' tiles, few enough that decodes need not wait long."""


@dataclass(frozen=True, kw_only=True)
class CacheSize:
    """How many blocks each group gets (block 0 included) and what they would take when all are written."""

    blocks: tuple[int, ...]
    bytes: int


def prefill_chunk(limits: Limits, chunk: int | None = None) -> int:
    """Return the most tokens that one sequence adds to a step: `chunk`, PREFILL_CHUNK by default, and no more than `limits`."""
    return min(chunk or PREFILL_CHUNK, limits.max_step_tokens, limits.max_context)


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
    size = spec.block_size
    each = [block_bytes(spec, group) for group in spec.groups]
    longest = blocks_for(limits.max_context, size)
    full = [
        # one more for the copy of a shared block
        sequence_blocks(group, limits.max_context, block_size=size, chunk=chunk, reserve=reserve) + 1
        for group in spec.groups
    ]
    least = [n if group.window else min(n, blocks_for(chunk, size) + 2) for n, group in zip(full, spec.groups, strict=True)]

    def counts(units: int) -> tuple[int, ...]:
        return tuple(1 + max(low, units * n // longest) for low, n in zip(least, full, strict=True))

    def total(blocks: tuple[int, ...]) -> int:
        return sum(n * bytes_ for n, bytes_ in zip(blocks, each, strict=True))

    units = limits.max_batch * longest
    if cache_bytes is not None and total(counts(units)) > cache_bytes:
        if total(counts(0)) > cache_bytes:
            raise UserError(
                f"cache_bytes is {cache_bytes}; the smallest cache that can run a prefill chunk of {chunk} tokens takes "
                f"{total(counts(0))} bytes. Give at least that much."
            )
        low, high = 0, units  # low fits, high does not
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if total(counts(middle)) <= cache_bytes else (low, middle)
        units = low
    return CacheSize(blocks=counts(units), bytes=total(counts(units)))
