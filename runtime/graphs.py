"""Steps on an accelerator: any mix of tokens as it comes, and decodes, one token for each sequence, as recorded graphs.

A graph runs on the addresses that it was recorded with, so each batch size that has one (a bucket) has inputs of its own, which
never move. A batch takes the next larger bucket; rows beyond it are padding, of kv_len 0 and slot -1, that neither reads nor
writes a cache. Block tables are as wide as the longest sequence needs: no kernel's grid depends on their width, so buckets of
widths would only multiply the graphs. They are sent again when one has changed, which for a sequence is once in a block's worth
of steps.

Memory beside weights and caches: the outputs of the largest bucket (float32 logits, 51 MB for 64 rows of 201,088), which all
graphs write to, so that none has to keep its own; one pool for what happens inside graphs, as large as the largest bucket's,
which is recorded first; and for other steps what a step of most tokens and rows takes, which `prepare` runs once, so that it is
there or is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from oxfuse.runtime.accelerator import Accelerator, Captured
from oxfuse.runtime.blocks import cache_dims, cache_dtype, check_caches
from oxfuse.runtime.cache_size import CacheSize
from oxfuse.runtime.device import Best, Device, Outcome, Step, checked_logits
from oxfuse.runtime.errors import InternalError, UserError
from oxfuse.runtime.manifest import CacheSpec, Limits
from oxfuse.runtime.memory_plan import MOST_ROWS
from oxfuse.runtime.sequence import Feed
from oxfuse.runtime.step_inputs import Packing, copy_tables, flat_inputs

BUCKETS = (1, 2, 4, *range(8, 65, 8))
"""Batch sizes that get a graph: beyond 4 a step's time hardly depends on whether 8 rows more are padding."""

WARM_UPS = 2
"""Runs before a recording: the first loads kernels, which a recording cannot; the second sees that all is loaded."""


def bucket_sizes(most: int) -> tuple[int, ...]:
    """Return the batch sizes that get a graph where a decode program takes up to `most` rows."""
    return (*(size for size in BUCKETS if size < most), most)


class _Bucket:
    """The inputs of the decode program for a batch of up to `size`: on the device, and as they are written in pinned memory."""

    def __init__(self, size: int, groups: int, width: int, accelerator: Accelerator) -> None:
        """Make inputs that are all padding: every sequence adds one token, and of none is anything known."""
        self.size = size
        packing = Packing([(size,), (size,), (size + 1,), (size,), (groups, size), (size,)])
        self._host = accelerator.pinned([packing.size], torch.int64).zero_()
        self._host_tables = accelerator.pinned([groups, size, width], torch.int64).zero_()
        self._device = torch.zeros(packing.size, dtype=torch.int64, device=accelerator.device)
        self._device_tables = torch.zeros(groups, size, width, dtype=torch.int64, device=accelerator.device)
        self._tokens, self._positions, starts, self._kv_lens, self.slots, rows = packing.views(self._host.numpy())
        self._tables = self._host_tables.numpy()
        starts[:], rows[:], self.slots[:] = range(size + 1), range(size), -1
        tokens, positions, starts, kv_lens, slots, rows = packing.views(self._device)
        self.inputs: list[Tensor] = [tokens, positions, starts, kv_lens, slots, self._device_tables, rows]
        self.graph: Captured | None = None
        self._stamps: list[object | None] = [None] * size
        """Whose tables each row holds, and in which state; None where it is padding."""
        self._tables_differ = True

    def fill(self, feeds: Sequence[Feed], block_size: int) -> None:
        """Write the next token of each feed's sequence; other rows become padding. May be interrupted, and is then done again."""
        live = len(feeds)
        for row, feed in enumerate(feeds):
            sequence, at = feed.sequence, feed.sequence.cached
            self._tokens[row], self._positions[row], self._kv_lens[row] = sequence.tokens[at], sequence.positions[at], at + 1
            for group, table in enumerate(sequence.tables):
                self.slots[group, row] = table[at // block_size] * block_size + at % block_size
            if self._stamps[row] is not sequence.stamp:
                self._tables_differ, self._stamps[row] = True, object()  # nobody's, until the copy is whole
                copy_tables(sequence, self._tables[:, row])
                self._stamps[row] = sequence.stamp
        for rows in (self._tokens, self._positions, self._kv_lens):
            rows[live:] = 0
        self.slots[:, live:] = -1
        for row in range(live, self.size):
            if self._stamps[row] is not None:
                self._tables_differ, self._tables[:, row] = True, 0
                self._stamps[row] = None

    def send(self) -> None:
        """Queue the copies to the device."""
        self._device.copy_(self._host, non_blocking=True)
        if self._tables_differ:
            self._device_tables.copy_(self._host_tables, non_blocking=True)
            self._tables_differ = False


@dataclass(frozen=True, kw_only=True)
class ReplayCheck:
    """Whether a graph and the program uncaptured did the same to the last bit: `logits`, and `caches` in the slots that were
    written.

    `finite` tells whether the logits of the live rows are numbers: where nothing was written, they are not.
    """

    bucket: int
    rows: int
    logits: bool
    caches: bool
    finite: bool


class GraphDevice(Device):
    """An accelerator with its caches, the decode program if there is one, and the graphs of it."""

    most_rows = MOST_ROWS

    def __init__(self, accelerator: Accelerator, *, decode: Step | None = None, most: int = 0, table: int = 1) -> None:
        """Take `decode`, a step program for one token of each of up to `most` sequences, whose tables have `table` entries."""
        self.accelerator = accelerator
        self._decode, self._most, self._table = decode, most, table
        self._sizes = bucket_sizes(most) if decode else ()
        self._buckets: dict[int, _Bucket] = {}
        self._spec: CacheSpec | None = None
        self._size: CacheSize | None = None
        self._results: tuple[Tensor, Tensor, Tensor] | None = None
        """Logits [most, V], and of each row the largest and its place: what graphs leave behind."""
        self._last: tuple[_Bucket, int] | None = None
        self._unfinished = False

    def allocate(self, spec: CacheSpec, size: CacheSize) -> list[Tensor]:
        """Allocate each cache by itself. What lies there is of no influence until it is written."""
        self._spec, self._size = spec, size
        try:
            with self.accelerator.active():
                dims, dtype = cache_dims(spec, size), cache_dtype(spec)
                return [torch.empty(shape, dtype=dtype, device=self.accelerator.device) for shape in dims]
        except torch.OutOfMemoryError as error:
            room = self.accelerator.room()
            raise UserError(
                f"{room.device} has {room.free:,} bytes free and refuses the {size.bytes:,} bytes of the caches: give a smaller "
                "cache_bytes, or end what else uses its memory."
            ) from error

    def prepare(self, step: Step, caches: Sequence[Tensor], limits: Limits) -> None:
        """Run the largest step that there will be, all padding, and record the largest graph: loads kernels, claims the memory.

        Raises UserError where that memory is not there.
        """
        tokens, sequences = limits.max_step_tokens, min(limits.max_batch, limits.max_step_tokens)
        rows, groups = min(MOST_ROWS, tokens), len(self._cache_spec.groups)
        try:
            with torch.no_grad(), self.accelerator.active():
                zeros = torch.zeros(tokens, dtype=torch.int64, device=self.accelerator.device)
                inputs = [
                    zeros,
                    zeros.clone(),
                    torch.arange(sequences + 1, device=zeros.device) * tokens // sequences,
                    zeros[:sequences].clone(),
                    torch.full((groups, tokens), -1, device=zeros.device),
                    torch.zeros(groups, sequences, 1, dtype=torch.int64, device=zeros.device),
                    zeros[:rows].clone(),
                ]
                logits = checked_logits(step([*inputs, *caches]), rows)
                extra = logits.float(), logits.max(-1)
                del logits, inputs, extra
                self.accelerator.synchronize()
                if self._sizes:
                    self._bucket(self._sizes[-1], caches)
        except (torch.OutOfMemoryError, InternalError) as error:
            if isinstance(error, InternalError) and "out of memory" not in str(error):
                raise
            room, memory = self.accelerator.room(), self.accelerator.memory()
            raise UserError(
                f"{room.device} has no room for a step of {tokens} tokens: weights and caches take {memory.allocated:,} bytes, "
                f"and {room.free:,} are free. Give a smaller cache_bytes, or end what else uses its memory."
            ) from error

    def run(self, step: Step, feeds: Sequence[Feed], rows: Sequence[int], caches: Sequence[Tensor], *, greedy: bool) -> Outcome:
        """Replay a graph for a pure decode, run `step` for anything else, and wait for the result."""
        with self.accelerator.active():
            if self._unfinished:  # an interrupted step may still read what is written next
                self.accelerator.synchronize()
            self._unfinished = True
            if self._is_decode(feeds, rows):
                logits, largest, places = self._replay(feeds, caches)
            else:
                logits = checked_logits(step([*self._send(feeds, rows), *caches]), len(rows))
                largest, places = logits.max(-1)
            fetched = [self._fetch(places, torch.int64), self._fetch(largest, torch.float32)]
            whole = None if greedy else self._fetch(logits, torch.float32)
            self.accelerator.synchronize()
            self._unfinished = False
        best = [Best(token=token, logit=logit) for token, logit in zip(*(part.tolist() for part in fetched), strict=True)]
        return Outcome(logits=whole, best=best)

    def copy_block(self, caches: Sequence[Tensor], source: int, target: int, tokens: int) -> None:
        """Queue the copies, in order with the steps."""
        with self.accelerator.active():
            for cache in caches:
                cache[target].copy_(cache[source])

    def discard(self, caches: Sequence[Tensor], blocks: range | None = None) -> None:
        """Do nothing: the memory was claimed at load, and nobody else gets it."""

    def record_all(self, caches: Sequence[Tensor]) -> None:
        """Record the graphs of all buckets now, largest first, instead of each when it is first needed."""
        with torch.no_grad(), self.accelerator.active():
            for size in reversed(self._sizes):
                self._bucket(size, caches)

    def check_replay(self, caches: Sequence[Tensor]) -> ReplayCheck:
        """Run the last decode twice more, uncaptured and as its graph, and compare what they leave behind, bit by bit.

        A step that is run again writes what it wrote before, so this changes nothing. Before each run the slots that it must
        write are made NaN. Raises InternalError where no decode was run before.
        """
        if self._last is None:
            raise InternalError("There was no decode whose replay could be checked.")
        bucket, live = self._last
        assert bucket.graph is not None and self._results is not None
        logits, largest, places = (result[: bucket.size] for result in self._results)
        seen = []
        with torch.no_grad(), self.accelerator.active():
            runs: tuple[Callable[[], None], ...] = (lambda: self._run_decode(bucket, caches)), bucket.graph.replay
            for run in runs:
                for result in (logits, largest, places):
                    result.zero_()
                for slots in self._written(bucket, live, caches):
                    slots.cache[slots.index] = torch.nan
                run()
                left = [logits.clone(), largest.clone(), places.clone()]
                seen.append((left, [slots.cache[slots.index].clone() for slots in self._written(bucket, live, caches)]))
            self.accelerator.synchronize()
            ((first, first_caches), (second, second_caches)) = seen
            return ReplayCheck(
                bucket=bucket.size,
                rows=live,
                logits=all(map(same_bits, first, second)),
                caches=all(map(same_bits, first_caches, second_caches)),
                finite=bool(first[0][:live].isfinite().all()),
            )

    @property
    def _cache_spec(self) -> CacheSpec:
        assert self._spec is not None, "there are no caches yet"
        return self._spec

    def _is_decode(self, feeds: Sequence[Feed], rows: Sequence[int]) -> bool:
        one_each = all(feed.count == 1 for feed in feeds) and list(rows) == list(range(len(feeds)))
        return self._decode is not None and one_each and len(feeds) <= self._most

    def _replay(self, feeds: Sequence[Feed], caches: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        live = len(feeds)
        bucket = self._bucket(next(size for size in self._sizes if size >= live), caches)
        bucket.fill(feeds, self._cache_spec.block_size)
        bucket.send()
        assert bucket.graph is not None and self._results is not None
        bucket.graph.replay()
        self._last = bucket, live
        logits, largest, places = (result[:live] for result in self._results)
        return logits, largest, places

    def _bucket(self, size: int, caches: Sequence[Tensor]) -> _Bucket:
        """Return a bucket with its graph, which is recorded if it was not yet, all rows being padding."""
        if (known := self._buckets.get(size)) is not None:
            return known
        assert self._size is not None
        check_caches(caches, self._cache_spec, self._size)
        bucket = _Bucket(size, len(self._cache_spec.groups), self._table, self.accelerator)
        bucket.send()
        for _ in range(WARM_UPS):
            self._run_decode(bucket, caches)
        self.accelerator.synchronize()
        try:
            bucket.graph = self.accelerator.capture(lambda: self._run_decode(bucket, caches))
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            raise InternalError(f"The decode program cannot be recorded for {size} rows: {reason}") from error
        self._buckets[size] = bucket
        return bucket

    def _run_decode(self, bucket: _Bucket, caches: Sequence[Tensor]) -> None:
        """Run the decode program on the bucket's inputs and put what it gives where all graphs put it."""
        assert self._decode is not None
        logits = checked_logits(self._decode([*bucket.inputs, *caches]), bucket.size)
        if self._results is None:  # outside of a recording: the first run of all is a warm-up
            self._results = (
                logits.new_empty(self._most, logits.shape[1], dtype=torch.float32),
                logits.new_empty(self._most),
                logits.new_empty(self._most, dtype=torch.int64),
            )
        whole, largest, places = (result[: bucket.size] for result in self._results)
        whole.copy_(logits)
        torch.max(logits, -1, out=(largest, places))

    def _send(self, feeds: Sequence[Feed], rows: Sequence[int]) -> list[Tensor]:
        """Queue the copy of a step's inputs to the device and return them there."""
        arrays = flat_inputs(feeds, rows, self._cache_spec.block_size)
        packing = Packing([array.shape for array in arrays])
        host = self.accelerator.pinned([packing.size], torch.int64)
        for view, array in zip(packing.views(host.numpy()), arrays, strict=True):
            view[...] = array
        device = torch.empty(packing.size, dtype=torch.int64, device=self.accelerator.device)
        device.copy_(host, non_blocking=True)
        return packing.views(device)

    def _fetch(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """Queue the copy of a tensor to the host, as `dtype`."""
        return self.accelerator.pinned(tensor.shape, dtype).copy_(tensor.to(dtype), non_blocking=True)

    def _written(self, bucket: _Bucket, live: int, caches: Sequence[Tensor]) -> list[_Slots]:
        """Return the places that the bucket's live rows write, in each cache."""
        found = []
        for group, spec in enumerate(self._cache_spec.groups):
            slots = torch.from_numpy(bucket.slots[group, :live].copy()).to(self.accelerator.device)
            block, offset = slots // self._cache_spec.block_size, slots % self._cache_spec.block_size
            for layer in spec.layers:
                found.append(_Slots(cache=caches[2 * layer], index=(block, slice(None), slice(None), offset)))
                found.append(_Slots(cache=caches[2 * layer + 1], index=(block, slice(None), offset)))
        return found


@dataclass(frozen=True, kw_only=True)
class _Slots:
    """Keys or values of some tokens: `cache[index]`."""

    cache: Tensor
    index: tuple[Tensor | slice, ...]


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Tell whether two tensors have the same dtype, shape and bits, so that NaN equals NaN, and 0 is not -0."""
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    return torch.equal(first.contiguous().view(torch.uint8), second.contiguous().view(torch.uint8))
