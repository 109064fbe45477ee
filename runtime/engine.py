"""Runs steps: turns "these tokens of these sequences" into the flat inputs of the `step` program, over paged caches it owns.

A sequence is its tokens, their positions, and how many of them the caches hold; the rest is pending. That is all the state there
is, so a sequence whose blocks were taken away is merely pending again, and a rewind is a shorter list. The engine knows nothing
of sampling, texts or queues, and `step` may be a compiled program or any callable with its signature.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from oxfuse.runtime.blocks import BlockPool, allocate_caches, discard
from oxfuse.runtime.cache_size import block_bytes, blocks_for, prefill_chunk, size_cache
from oxfuse.runtime.errors import InternalError
from oxfuse.runtime.manifest import CacheSpec, Limits

KEPT_BYTES = 8 << 20
"""Bytes of caches that stay in memory while nothing runs: to commit so few again is quick, but not for nothing."""

Step = Callable[[list[Tensor]], Tensor]
"""The inputs in the order of the manifest, caches last, all int64 before them; returns logits [R, V]."""

Rows = Literal["last", "all"] | frozenset[int]
"""Tokens whose logits are wanted: the sequence's last, all, or those at these indices in the sequence."""


class TokenSequence:
    """Tokens of one sequence and the blocks that hold the keys and values of the first `cached` of them."""

    def __init__(self, groups: int) -> None:
        """Make an empty sequence with an empty block table for each group."""
        self.tokens: list[int] = []
        self.positions: list[int] = []
        self.cached = 0
        self.tables: list[list[int]] = [[] for _ in range(groups)]
        self.live = [0] * groups
        """First entry of each table that is still held; those before it were freed and read 0."""

    @property
    def pending(self) -> int:
        """Tokens that no step has run yet."""
        return len(self.tokens) - self.cached

    def append(self, tokens: Sequence[int], positions: Sequence[int] | None = None) -> None:
        """Add tokens; their positions default to their indices in the sequence."""
        self.positions += range(len(self.tokens), len(self.tokens) + len(tokens)) if positions is None else positions
        self.tokens += tokens


@dataclass(frozen=True, kw_only=True)
class Feed:
    """The next `count` pending tokens of a sequence, and which of the sequence's logits are wanted as far as they come up."""

    sequence: TokenSequence
    count: int
    rows: Rows = "last"

    def wanted(self) -> Sequence[int]:
        """Return the indices in the sequence of those of the `count` tokens that need logits."""
        begin, end = self.sequence.cached, self.sequence.cached + self.count
        if self.rows == "all":
            return range(begin, end)
        if self.rows == "last":
            return range(end - 1 if self.count == self.sequence.pending else end, end)
        return [index for index in range(begin, end) if index in self.rows]


class Engine:
    """Caches, block pools and the step program. Not thread-safe: the scheduler's lock guards it."""

    def __init__(
        self,
        step: Step,
        cache: CacheSpec,
        limits: Limits,
        *,
        chunk: int | None = None,
        reserve: int | None = None,
        cache_bytes: int | None = None,
        threads: int | None = None,
    ) -> None:
        """Reserve the caches.

        `chunk` tokens of one sequence at most go into a step; `reserve` tokens beyond the window stay in a sliding group
        (default: one chunk), so that a rewind of that many needs no recomputation. `threads` holds during steps only. Raises
        UserError where `cache_bytes` is too small.
        """
        self.step, self.cache, self.limits, self.threads = step, cache, limits, threads
        self.chunk = prefill_chunk(limits, chunk)
        self.reserve = self.chunk if reserve is None else reserve
        self.size = size_cache(cache, limits, chunk=self.chunk, reserve=self.reserve, cache_bytes=cache_bytes)
        self.pools = [BlockPool(count) for count in self.size.blocks]
        self.caches = allocate_caches(cache, self.size)
        self.steps = 0

    @property
    def used_blocks(self) -> int:
        """Blocks that sequences hold, over all groups."""
        return sum(pool.used for pool in self.pools)

    def sequence(self) -> TokenSequence:
        """Return an empty sequence."""
        return TokenSequence(len(self.cache.groups))

    def fork(self, source: TokenSequence) -> TokenSequence:
        """Return a sequence with the same tokens that shares the blocks; whoever writes to a shared block copies it first."""
        twin = self.sequence()
        twin.tokens, twin.positions, twin.cached = [*source.tokens], [*source.positions], source.cached
        twin.tables, twin.live = [[*table] for table in source.tables], [*source.live]
        for pool, table in zip(self.pools, twin.tables, strict=True):
            pool.share(table)
        return twin

    def release(self, sequence: TokenSequence) -> None:
        """Give all blocks back. The tokens stay and are pending again."""
        for pool, table in zip(self.pools, sequence.tables, strict=True):
            pool.drop(table)
            table.clear()
        sequence.live, sequence.cached = [0] * len(self.pools), 0
        if not self.used_blocks:
            self._shrink()

    def _shrink(self) -> None:
        """Give the caches' memory back to the system, now that nobody uses them, if it is worth the trouble."""
        groups = zip(self.pools, self.cache.groups, strict=True)
        if sum(pool.touched * block_bytes(self.cache, group) for pool, group in groups) > KEPT_BYTES:
            for cache in self.caches:
                discard(cache)
            for pool in self.pools:
                pool.reset()

    def remembers(self, sequence: TokenSequence, length: int) -> bool:
        """Tell whether `sequence` can be continued after its first `length` tokens without running any of those again."""
        size = self.cache.block_size
        return length <= sequence.cached and all(
            max(0, length - group.window + 1) // size >= live
            for group, live in zip(self.cache.groups, sequence.live, strict=True)
            if group.window
        )

    def truncate(self, sequence: TokenSequence, length: int) -> None:
        """Keep the first `length` tokens.

        Where a sliding group has freed blocks that the next token would see, everything is pending again: keys and values of
        a layer follow from all earlier tokens, so nothing less than a new run gives them back exactly.
        """
        del sequence.tokens[length:], sequence.positions[length:]
        if length >= sequence.cached:
            return
        if not self.remembers(sequence, length):
            return self.release(sequence)
        sequence.cached = length
        keep = blocks_for(length, self.cache.block_size)
        for pool, table in zip(self.pools, sequence.tables, strict=True):
            pool.drop(table[keep:])
            del table[keep:]
        return None

    def secure(self, sequence: TokenSequence, count: int) -> bool:
        """Make the next `count` tokens' blocks the sequence's own: take new ones, copy a shared one. False if short."""
        size, end = self.cache.block_size, blocks_for(sequence.cached + count, self.cache.block_size)
        written = sequence.cached // size
        partial = sequence.cached % size > 0
        copies = [bool(partial and pool.shared(table[written])) for pool, table in zip(self.pools, sequence.tables, strict=True)]
        needs = [max(0, end - len(table)) + copy for table, copy in zip(sequence.tables, copies, strict=True)]
        if any(need > pool.free for need, pool in zip(needs, self.pools, strict=True)):
            return False
        for group, (pool, table, need, copy) in enumerate(zip(self.pools, sequence.tables, needs, copies, strict=True)):
            taken = pool.take(need)
            if copy:
                own = taken.pop()
                for layer in self.cache.groups[group].layers:
                    for kv in self.caches[2 * layer : 2 * layer + 2]:
                        kv[own].copy_(kv[table[written]])
                pool.drop([table[written]])
                table[written] = own
            table += taken
        return True

    def run(self, feeds: Sequence[Feed]) -> list[Tensor]:
        """Run one step over secured feeds and return the wanted logits of each, float32 [len(feed.wanted()), V].

        The sequences advance only if the step succeeds. Raises what the step raises, InternalError if it returns the wrong shape.
        """
        starts = np.cumsum([0, *(feed.count for feed in feeds)])
        wanted = [feed.wanted() for feed in feeds]
        rows = [
            int(start) + index - feed.sequence.cached
            for start, feed, indices in zip(starts, feeds, wanted, strict=False)
            for index in indices
        ]
        with torch.no_grad(), intra_op_threads(self.threads):
            logits = self.step([*self._inputs(feeds, starts, rows or [0]), *self.caches])
        if logits.dim() != 2 or logits.shape[0] != max(1, len(rows)):
            raise InternalError(
                f"The step returned logits of shape {list(logits.shape)}, {max(1, len(rows))} rows were asked for."
            )
        self.steps += 1
        for feed in feeds:
            feed.sequence.cached += feed.count
            self._free_old(feed.sequence)
        return list(torch.split(logits[: len(rows)].float(), [len(indices) for indices in wanted]))

    def _inputs(self, feeds: Sequence[Feed], starts: np.ndarray, rows: Sequence[int]) -> list[Tensor]:
        """Return int64 token_ids[T], positions[T], query_start[N+1], kv_lens[N], slots[G,T], block_tables[G,N,M], rows[R]."""
        size, groups, total = self.cache.block_size, len(self.pools), int(starts[-1])
        tokens, positions = np.empty(total, np.int64), np.empty(total, np.int64)
        kv_lens = np.array([feed.sequence.cached + feed.count for feed in feeds], np.int64)
        slots = np.empty((groups, total), np.int64)
        tables = np.zeros((groups, len(feeds), blocks_for(int(kv_lens.max()), size)), np.int64)
        for n, (feed, kv_len) in enumerate(zip(feeds, kv_lens, strict=True)):
            sequence, part, known = feed.sequence, slice(starts[n], starts[n + 1]), slice(feed.sequence.cached, int(kv_len))
            tokens[part], positions[part] = sequence.tokens[known], sequence.positions[known]
            index = np.arange(known.start, known.stop)
            for g, table in enumerate(sequence.tables):
                tables[g, n, : len(table)] = table
                slots[g, part] = tables[g, n, index // size] * size + index % size
        flat = tokens, positions, starts.astype(np.int64), kv_lens, slots, tables, np.array(rows, np.int64)
        return [torch.from_numpy(array) for array in flat]

    def _free_old(self, sequence: TokenSequence) -> None:
        for group, spec in enumerate(self.cache.groups):
            if (
                spec.window
            ):  # the next token sees `window` tokens, itself included; one after a rewind of `reserve` sees older ones
                live = max(0, sequence.cached - self.reserve - spec.window + 1) // self.cache.block_size
                old = slice(sequence.live[group], live)
                if old.start < old.stop:
                    self.pools[group].drop(sequence.tables[group][old])
                    sequence.tables[group][old] = [0] * (old.stop - old.start)
                    sequence.live[group] = live


_threads_lock = threading.RLock()


@contextmanager
def intra_op_threads(count: int | None) -> Iterator[None]:
    """Let torch use `count` threads inside an operator, and put the old number back; None changes nothing.

    The number belongs to the process: other threads that run torch meanwhile see it too.
    """
    if count is None:
        yield
        return
    with _threads_lock:  # two models with different numbers must not restore each other's
        before = torch.get_num_threads()
        torch.set_num_threads(count)
        try:
            yield
        finally:
            torch.set_num_threads(before)
