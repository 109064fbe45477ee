"""One sequence of tokens as the engine knows it, and what a step is fed with of it."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Rows = Literal["last", "all"] | frozenset[int]
"""Tokens whose logits are wanted: the sequence's last, all, or those at these indices in the sequence."""


class Prefix:
    """A block's worth of tokens and their positions after those of `parent`, and where the caches hold their keys and values."""

    __slots__ = ("blocks", "children", "content", "depth", "holders", "parent")

    def __init__(self, parent: Prefix | None, content: bytes, groups: int) -> None:
        """Make a node without blocks. The caller enters it with its parent, under `content`."""
        self.parent, self.content = parent, content
        self.depth: int = 0 if parent is None else parent.depth + 1
        self.children: dict[bytes, Prefix] = {}
        self.blocks = [0] * groups
        """Of each group the block, 0 where there is none any more."""
        self.holders = 0
        """Sequences whose last full block this is."""


class TokenSequence:
    """Tokens of one sequence and the blocks that hold the keys and values of the first `cached` of them."""

    def __init__(self, groups: int) -> None:
        """Make an empty sequence with an empty block table for each group."""
        self.tokens: list[int] = []
        self.positions: list[int] = []
        self.cached = 0
        self.tables = [array("q") for _ in range(groups)]
        """Block numbers, int64, so that a table of thousands goes into a step's inputs as one copy."""
        self.live = [0] * groups
        """First entry of each table that is still held; those before it were freed and read 0."""
        self.prefix: Prefix | None = None
        """Its last full block, as `oxfuse.runtime.prefix` knows it."""
        self.stamp = object()
        """Another object whenever a table has changed, so that who has a copy of them can tell whether it is still right."""

    @property
    def pending(self) -> int:
        """Tokens that no step has run yet."""
        return len(self.tokens) - self.cached

    def append(self, tokens: Sequence[int], positions: Sequence[int] | None = None) -> None:
        """Add tokens; their positions default to their indices in the sequence."""
        self.positions += range(len(self.tokens), len(self.tokens) + len(tokens)) if positions is None else positions
        self.tokens += tokens


def first_wanted(sequence: TokenSequence, rows: Rows) -> int:
    """Return the index of the first pending token that must run, because its logits are wanted or it is the last."""
    last = len(sequence.tokens) - 1
    if rows == "last":
        return last
    return sequence.cached if rows == "all" else min((row for row in rows if row >= sequence.cached), default=last)


@dataclass(frozen=True, kw_only=True)
class Feed:
    """The next `count` pending tokens of a sequence, and which of the sequence's logits are wanted as far as they come up.

    With `greedy` the most likely token and its logit are enough, where the device can tell them without the others.
    """

    sequence: TokenSequence
    count: int
    rows: Rows = "last"
    greedy: bool = False

    def wanted(self) -> Sequence[int]:
        """Return the indices in the sequence of those of the `count` tokens that need logits."""
        begin, end = self.sequence.cached, self.sequence.cached + self.count
        if self.rows == "all":
            return range(begin, end)
        if self.rows == "last":
            return range(end - 1 if self.count == self.sequence.pending else end, end)
        return [index for index in range(begin, end) if index in self.rows]


def split_feeds(feeds: Sequence[Feed], most_rows: int) -> list[list[tuple[int, Feed]]]:
    """Return the steps that together run `feeds`, each with at most `most_rows` wanted rows; a feed comes with its number.

    A feed that wants more rows is run in pieces, which are feeds themselves and must be run in this order.
    """
    steps, rows = [list[tuple[int, Feed]]()], 0
    for number, feed in enumerate(feeds):
        wanted, begin, done = feed.wanted(), feed.sequence.cached, 0
        while done < feed.count:
            taken = min(len(wanted), most_rows - rows)
            # Up to before the first row that does not fit any more.
            end = wanted[taken] - begin if taken < len(wanted) else feed.count
            if end > done:
                steps[-1].append((number, Feed(sequence=feed.sequence, count=end - done, rows=feed.rows, greedy=feed.greedy)))
            wanted, done, rows = wanted[taken:], end, rows + taken
            if done < feed.count:
                steps.append([])
                rows = 0
    return steps
