"""The flat inputs of a step: from sequences to the arrays that the `step` program takes, and how they lie in one buffer.

int64, in the program's order: token_ids [T], positions [T], query_start [N + 1], kv_lens [N], slots [G, T],
block_tables [G, N, M], rows [R].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oxfuse.runtime.cache_size import blocks_for
from oxfuse.runtime.sequence import Feed, TokenSequence

Ints = NDArray[np.int64]
ALIGNMENT = 8
"""Elements, 64 bytes: a program copies an input that does not begin at a multiple of 16 bytes."""


def flat_inputs(feeds: Sequence[Feed], rows: Sequence[int], block_size: int) -> list[Ints]:
    """Return the inputs of a step that runs secured feeds; `rows` are indices into its tokens. Tables are as wide as needed."""
    groups, size = len(feeds[0].sequence.tables), block_size
    starts = [*accumulate((feed.count for feed in feeds), initial=0)]
    ends = [feed.sequence.cached + feed.count for feed in feeds]
    tokens, positions = np.empty(starts[-1], np.int64), np.empty(starts[-1], np.int64)
    slots = np.empty((groups, starts[-1]), np.int64)
    tables = np.empty((groups, len(feeds), blocks_for(max(ends), size)), np.int64)
    for n, (feed, start, end) in enumerate(zip(feeds, starts, ends, strict=False)):
        sequence, first = feed.sequence, feed.sequence.cached
        copy_tables(sequence, tables[:, n])
        if feed.count == 1:
            _put_token(sequence, size, tokens, positions, slots, start)
        else:
            part = slice(start, start + feed.count)
            tokens[part], positions[part] = sequence.tokens[first:end], sequence.positions[first:end]
            index = np.arange(first, end)
            slots[:, part] = tables[:, n, index // size] * size + index % size
    return [tokens, positions, np.array(starts, np.int64), np.array(ends, np.int64), slots, tables, np.array(rows, np.int64)]


def move_on(inputs: Sequence[Ints], sequence: TokenSequence, block_size: int) -> None:
    """Change the inputs of a step that ran one token of `sequence` alone to those of its next one, while its tables stay."""
    tokens, positions, _, kv_lens, slots, *_ = inputs
    _put_token(sequence, block_size, tokens, positions, slots, 0)
    kv_lens[0] = sequence.cached + 1


def _put_token(sequence: TokenSequence, size: int, tokens: Ints, positions: Ints, slots: Ints, place: int) -> None:
    """Write the sequence's next token, by plain numbers: whoever decodes waits for each call of numpy."""
    first = sequence.cached
    tokens[place], positions[place] = sequence.tokens[first], sequence.positions[first]
    for group, table in enumerate(sequence.tables):
        slots[group, place] = table[first // size] * size + first % size


def copy_tables(sequence: TokenSequence, into: Ints) -> None:
    """Write the sequence's tables into `into` [G, M], and 0 behind their ends."""
    for table, row in zip(sequence.tables, into, strict=True):
        known = np.frombuffer(table, np.int64)[: len(row)] if len(table) else np.empty(0, np.int64)
        row[: len(known)] = known
        row[len(known) :] = 0


class Packing:
    """Places for arrays of given shapes in one flat int64 buffer, so that one copy moves them all."""

    def __init__(self, shapes: Sequence[tuple[int, ...]]) -> None:
        """Lay the arrays out one after the other, each on a boundary of 64 bytes."""
        self._shapes, self._begins, end = shapes, list[int](), 0
        for shape in shapes:
            self._begins.append(end)
            end += -(-math.prod(shape) // ALIGNMENT) * ALIGNMENT
        self.size = end
        """Elements of the buffer."""

    def views(self, buffer: Any) -> list[Any]:
        """Return the arrays in `buffer`, a flat torch tensor or numpy array of `size` elements, which they share."""
        return [
            buffer[begin : begin + math.prod(shape)].reshape(shape)
            for begin, shape in zip(self._begins, self._shapes, strict=True)
        ]
