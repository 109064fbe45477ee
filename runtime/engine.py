"""Runs steps: turns "these tokens of these sequences" into steps of the program, over paged caches it owns.

A sequence is its tokens, their positions, and how many of them the caches hold; the rest is pending. That is all the state there
is, so a sequence whose blocks were taken away is merely pending again, and a rewind is a shorter list. The engine knows nothing
of sampling, texts or queues, and `step` may be a compiled program or any callable with its signature. What memory the caches are
and how inputs reach the program is the device's affair; the bookkeeping is on the host whatever the device.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from oxfuse.runtime.blocks import BlockPool
from oxfuse.runtime.cache_size import block_bytes, blocks_for, prefill_chunk, prefix_bound, size_cache
from oxfuse.runtime.device import Best, Device, HostDevice, Outcome, Step
from oxfuse.runtime.errors import InternalError
from oxfuse.runtime.manifest import CacheSpec, Limits
from oxfuse.runtime.prefix import PrefixCache
from oxfuse.runtime.program import TEAM_ROWS, TeamSwitch
from oxfuse.runtime.sequence import Feed, TokenSequence, split_feeds

KEPT_BYTES = 8 << 20
"""Bytes of caches that stay in memory while nothing runs: to commit so few again is quick, but not for nothing."""

Answer = Tensor | list[Best]
"""What a feed gets for its wanted rows: logits float32 [n, V], or the n most likely tokens where it asked for no more."""


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
        prefix_cache_bytes: int | None = 0,
        threads: int | None = None,
        device: Device | None = None,
        team: TeamSwitch | None = None,
    ) -> None:
        """Allocate the caches, on the CPU by default.

        `chunk` tokens of one sequence at most go into a step; `reserve` tokens beyond the window stay in a sliding group
        (default: one chunk), so that a rewind of that many needs no recomputation. Blocks of up to `prefix_cache_bytes` bytes
        stay when no sequence holds them, for those that begin with the same tokens (None: `prefix_bound`'s default); 0: none
        do, and running sequences share none either. `threads` holds during steps only; `team` is what `team_switch`
        returns. Raises UserError where `cache_bytes` is too small.
        """
        self.step, self.cache, self.limits, self.threads = step, cache, limits, threads
        self._team, self._regions = team, 0  # OpenMP's threads before the step, 0 where the team has none
        self.device = HostDevice() if device is None else device
        self.chunk = prefill_chunk(limits, chunk)
        self.reserve = self.chunk if reserve is None else reserve
        self.size = size_cache(cache, limits, chunk=self.chunk, reserve=self.reserve, cache_bytes=cache_bytes)
        self.pools = [BlockPool(count) for count in self.size.blocks]
        self.block_bytes = [block_bytes(cache, group) for group in cache.groups]
        self.prefixes = PrefixCache(
            self.pools,
            windows=[group.window for group in cache.groups],
            block_bytes=self.block_bytes,
            block_size=cache.block_size,
            bound=prefix_bound(self.size, self.device.claims, prefix_cache_bytes),
        )
        self.caches = self.device.allocate(cache, self.size)
        self.device.check(self.caches, cache, self.size)
        self.steps = 0
        self.reused_tokens = 0
        """Tokens that did not run since their keys and values were found in the pool, since the engine was made."""

    def close(self) -> None:
        """Let the program, its weights and the caches go. Sequences may still be released; nothing can be run."""
        self.step, self.caches, self.device = _closed, [], HostDevice()

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
        twin.tables, twin.live = [table[:] for table in source.tables], [*source.live]
        for pool, table in zip(self.pools, twin.tables, strict=True):
            pool.share(table)
        self.prefixes.fork(source, twin)
        return twin

    def adopt(self, sequence: TokenSequence, most: int) -> int:
        """Let the caches give as much of the sequence's pending tokens as they know, among its first `most`. Return how many."""
        found = self.prefixes.adopt(sequence, most)
        self.reused_tokens += found
        return found

    def release(self, sequence: TokenSequence) -> None:
        """Give all blocks back. The tokens stay and are pending again."""
        self._cut(sequence, 0)
        if not self.used_blocks:
            self._shrink()

    def _cut(self, sequence: TokenSequence, length: int) -> None:
        """Let go of what the caches hold beyond `length` tokens, the last blocks first, so that others are found without them."""
        keep, former = blocks_for(length, self.cache.block_size), sequence.tables
        tables, live, stamp = [table[:keep] for table in former], [min(first, keep) for first in sequence.live], object()
        # In one go: an interrupt comes before or after, and never finds a length of one state and tables of another.
        sequence.tables, sequence.live, sequence.cached, sequence.stamp = tables, live, length, stamp
        for index in reversed(range(keep, max(map(len, former)))):
            for pool, table in zip(self.pools, former, strict=True):
                pool.drop(table[index : index + 1])
        self.prefixes.cut(sequence, length)
        self.prefixes.settle()

    def _shrink(self) -> None:
        """Give memory that holds nothing of use back to the system, now that no sequence runs, if it is worth the trouble."""
        if sum(pool.returned * size for pool, size in zip(self.pools, self.block_bytes, strict=True)) <= KEPT_BYTES:
            return
        for pool, spec in zip(self.pools, self.cache.groups, strict=True):
            caches = [cache for layer in spec.layers for cache in self.caches[2 * layer : 2 * layer + 2]]
            if pool.kept:
                for run in pool.blank():
                    self.device.discard(caches, run)
            else:
                self.device.discard(caches)
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
        self._cut(sequence, length)
        return None

    def secure(self, sequence: TokenSequence, count: int) -> bool:
        """Make the next `count` tokens' blocks the sequence's own: take new ones, copy a shared one. False if short."""
        size, end = self.cache.block_size, blocks_for(sequence.cached + count, self.cache.block_size)
        written = sequence.cached // size
        partial = sequence.cached % size
        copies = [
            bool(partial) and (pool.shared(table[written]) or pool.remembers(table[written]))
            for pool, table in zip(self.pools, sequence.tables, strict=True)
        ]
        if any(copies) and self._short(self._needs(sequence, end, copies)):
            for group, (pool, table) in enumerate(zip(self.pools, sequence.tables, strict=True)):
                if copies[group] and not pool.shared(table[written]):  # kept for others alone: there is no room for that
                    pool.forget(table[written])
                    copies[group] = False
        needs = self._needs(sequence, end, copies)
        if not any(needs):
            return True
        if self._short(needs):
            return False
        spare = self.prefixes.crowded(needs)
        sequence.stamp = object()
        for group, (pool, table, need, copy) in enumerate(zip(self.pools, sequence.tables, needs, copies, strict=True)):
            taken = pool.take(need, spare=spare)
            if copy:
                own = taken.pop()
                layers = self.cache.groups[group].layers
                caches = [cache for layer in layers for cache in self.caches[2 * layer : 2 * layer + 2]]
                self.device.copy_block(caches, table[written], own, partial)
                pool.drop([table[written]])
                table[written] = own
            table.extend(taken)
        return True

    def _needs(self, sequence: TokenSequence, end: int, copies: Sequence[bool]) -> list[int]:
        return [max(0, end - len(table)) + copy for table, copy in zip(sequence.tables, copies, strict=True)]

    def _short(self, needs: Sequence[int]) -> bool:
        return any(need > pool.free for need, pool in zip(needs, self.pools, strict=True))

    def enter(self, feeds: Sequence[Feed]) -> None:
        """Prepare this thread for a step of `feeds` and what follows from its logits; `leave` undoes it.

        Of few tokens the ops' own threads multiply; torch's would be in their way, so it uses this one alone meanwhile.
        """
        if self._team and sum(feed.count for feed in feeds) <= TEAM_ROWS:
            self._regions = torch.get_num_threads()  # before the call: an interrupt may come after it
            self._team(self.threads or self._regions, 1)

    def leave(self) -> None:
        """Undo `enter`."""
        if self._team and self._regions:
            self._team(0, self._regions)
            self._regions = 0

    def run(self, feeds: Sequence[Feed]) -> list[Answer]:
        """Run secured feeds and return what each gets for its wanted rows.

        That is one step, or several where the device cannot bring so many rows back at once. The sequences advance as far as
        their steps succeed. Raises what the step raises, InternalError if it returns the wrong shape.
        """
        if self.device.most_rows is None:
            return self._step(feeds)
        parts: list[list[Answer]] = [[] for _ in feeds]
        for step in split_feeds(feeds, self.device.most_rows):
            for (number, _), answer in zip(step, self._step([feed for _, feed in step]), strict=True):
                if len(answer):
                    parts[number].append(answer)
        return [_joined(answers) for answers in parts]

    def _step(self, feeds: Sequence[Feed]) -> list[Answer]:
        starts = accumulate((feed.count for feed in feeds), initial=0)
        wanted = [feed.wanted() for feed in feeds]
        rows = [
            start + index - feed.sequence.cached
            for start, feed, indices in zip(starts, feeds, wanted, strict=False)
            for index in indices
        ]
        greedy = all(feed.greedy for feed, indices in zip(feeds, wanted, strict=True) if len(indices))
        outcome = self._run_step(feeds, rows or [0], greedy=greedy)
        self.steps += 1
        for feed in feeds:
            before = feed.sequence.cached
            feed.sequence.cached += feed.count
            self.prefixes.record(feed.sequence, before)
            self._free_old(feed.sequence)
        self.prefixes.settle()
        answers, begin = list[Answer](), 0
        for feed, indices in zip(feeds, wanted, strict=True):
            part = slice(begin, begin := begin + len(indices))
            if feed.greedy and outcome.best is not None:
                answers.append(list(outcome.best[part]))
            elif outcome.logits is not None:
                answers.append(outcome.logits if 0 < len(indices) == len(rows) else outcome.logits[part])
            else:
                assert not indices, "logits are wanted and were not brought back"
                answers.append([])
        return answers

    def _run_step(self, feeds: Sequence[Feed], rows: Sequence[int], *, greedy: bool) -> Outcome:
        # Not `with torch.no_grad()`, nor a context manager for the threads: a token waits for all their objects and calls, and
        # weights have pushed their code out of the processor's caches.
        gradients = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)
        try:
            if self.threads is None or self._regions:
                return self.device.run(self.step, feeds, rows, self.caches, greedy=greedy)
            with _threads_lock:  # two models with different numbers must not restore each other's
                before = torch.get_num_threads()
                if self.threads != before:  # to set it anew costs as much as an operator
                    torch.set_num_threads(self.threads)
                try:
                    return self.device.run(self.step, feeds, rows, self.caches, greedy=greedy)
                finally:
                    if self.threads != before:
                        torch.set_num_threads(before)
        finally:
            torch._C._set_grad_enabled(gradients)

    def _free_old(self, sequence: TokenSequence) -> None:
        for group, spec in enumerate(self.cache.groups):
            if (
                spec.window
            ):  # the next token sees `window` tokens, itself included; one after a rewind of `reserve` sees older ones
                live = max(0, sequence.cached - self.reserve - spec.window + 1) // self.cache.block_size
                old = slice(sequence.live[group], live)
                if old.start < old.stop:
                    table, sequence.stamp = sequence.tables[group], object()
                    self.pools[group].drop(table[old])
                    for index in range(old.start, old.stop):
                        table[index] = 0
                    sequence.live[group] = live


def _closed(*_: object) -> Tensor:
    raise InternalError("A step was asked of an engine that is closed.")


def _joined(answers: list[Answer]) -> Answer:
    """Return the answers to a feed's pieces as one."""
    tensors = [answer for answer in answers if isinstance(answer, Tensor)]
    if not tensors:
        return [best for answer in answers if isinstance(answer, list) for best in answer]
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


_threads_lock = threading.RLock()
"""Held where the number of threads may change. It belongs to the process: other threads that run torch meanwhile see it too."""
