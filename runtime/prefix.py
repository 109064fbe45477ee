"""Finds the longest beginning of a sequence that the block pool still holds, from whoever ran the same tokens before.

Full blocks are never written again, so they may be read by any sequence that begins with the same tokens at the same positions.
They are kept in a tree: a node is one block's worth of tokens and positions after its parent's, compared value by value, so that
no two contents can be taken for each other. In each cache group a node has at most one block. Blocks stay when their last
sequence lets go of them, up to a bound, and leave least recently used first; a sequence lets go of its last block first, so that
a child leaves before its parent, without which nobody would find it.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from functools import partial
from itertools import count

from oxfuse.runtime.blocks import BlockPool
from oxfuse.runtime.sequence import Prefix, TokenSequence


class PrefixCache:
    """The tree over the pools of an engine, guarded as the engine is. With a bound of 0 bytes nothing is kept, and none found."""

    def __init__(
        self, pools: Sequence[BlockPool], *, windows: Sequence[int], block_bytes: Sequence[int], block_size: int, bound: int
    ) -> None:
        """Keep blocks of `pools`, of `block_bytes` bytes each, up to `bound` bytes while no sequence holds them."""
        self.bound = bound
        self._pools, self._windows, self._bytes, self._size = pools, windows, block_bytes, block_size
        self._full = [group for group, window in enumerate(windows) if not window]
        self._sliding = [group for group, window in enumerate(windows) if window]
        self._root = Prefix(None, b"", len(pools))
        self._nodes: list[dict[int, Prefix]] = [{} for _ in pools]
        clock = count()
        for group, pool in enumerate(pools):
            pool.clock, pool.on_forget = clock, partial(self._forget, group)

    @property
    def kept_bytes(self) -> int:
        """Bytes of blocks that no sequence holds and a later one may find."""
        return sum(pool.kept * size for pool, size in zip(self._pools, self._bytes, strict=True))

    def next_block(self, sequence: TokenSequence) -> tuple[Prefix, bytes] | None:
        """Return what names the block that the next pending token goes to; None where the tokens do not fill it, or if off."""
        index = sequence.cached // self._size
        if not self.bound or (index + 1) * self._size > len(sequence.tokens):
            return None
        return self._last(sequence), self._content(sequence, index)

    def end(self, block: tuple[Prefix, bytes]) -> int:
        """Return how many tokens a sequence has whose last block this is."""
        return (block[0].depth + 1) * self._size

    def adopt(self, sequence: TokenSequence, most: int) -> int:
        """Let `sequence` hold the longest run of kept blocks that its pending tokens go on with, up to its first `most` tokens.

        Full-attention groups need every block of it, sliding ones those that the next token sees. Returns how many tokens need
        not run any more.
        """
        size, depth, before = self._size, sequence.cached // self._size, sequence.cached
        if not self.bound or most // size <= depth:
            return 0
        path, best = self._follow(sequence, most // size), 0
        begins = [*sequence.live]  # of each group, where the entries begin that are there without a gap
        for end, node in enumerate(path, depth + 1):
            for group in self._sliding:
                if not node.blocks[group]:
                    begins[group] = end
            if all(begins[group] <= self._first_seen(group, end) for group in self._sliding):
                best = end
        if not best:
            return 0
        tables: list[array[int]] = []
        live: list[int] = []
        dropped: list[list[int]] = []
        for group, (pool, table) in enumerate(zip(self._pools, sequence.tables, strict=True)):
            first = max(sequence.live[group], self._first_seen(group, best))
            found = [node.blocks[group] if index >= first else 0 for index, node in enumerate(path[: best - depth], depth)]
            pool.share(found)
            old = min(first, depth)
            tables.append(array("q", [*[0] * old, *table[old:depth], *found]))
            dropped.append([*table[:old], *table[depth:]])
            live.append(first)
        last, stamp = path[best - depth - 1], object()
        last.holders += 1
        former = sequence.prefix
        # In one go: an interrupt comes before or after, and never finds tables of one state and a length of another.
        sequence.tables, sequence.live, sequence.prefix, sequence.stamp, sequence.cached = tables, live, last, stamp, best * size
        self._leave(former)
        for pool, blocks in zip(self._pools, dropped, strict=True):
            pool.drop(blocks)
        self.settle()
        return sequence.cached - before

    def record(self, sequence: TokenSequence, before: int) -> None:
        """Enter the blocks that have become full since `sequence` had `before` tokens in the caches.

        Where the tree has a block of the same content already, the sequence takes that in place of its own.
        """
        node = self._last(sequence)
        if not self.bound or node.depth != before // self._size:
            return
        for index in range(node.depth, sequence.cached // self._size):
            content = self._content(sequence, index)
            child = node.children.get(content)
            if child is None:
                child = node.children[content] = Prefix(node, content, len(self._pools))
            for group, (pool, table) in enumerate(zip(self._pools, sequence.tables, strict=True)):
                own, known = table[index], child.blocks[group]
                if not known:  # in this order: what an interrupt leaves undone must not be found
                    pool.remember(own)
                    self._nodes[group][own] = child
                    child.blocks[group] = own
                elif known != own:
                    pool.share([known])
                    table[index], sequence.stamp = known, object()
                    pool.drop([own])
            node = child
        self._move(sequence, node)

    def cut(self, sequence: TokenSequence, length: int) -> None:
        """Follow a sequence that was cut back to its first `length` tokens."""
        node = self._last(sequence)
        while node.parent is not None and node.depth > length // self._size:
            node = node.parent
        self._move(sequence, node)

    def fork(self, source: TokenSequence, twin: TokenSequence) -> None:
        """Let `twin`, which shares all blocks of `source`, go on from there."""
        self._move(twin, self._last(source))

    def settle(self) -> None:
        """Let the least recently used blocks go until those that nobody holds take no more than the bound."""
        while self.kept_bytes > self.bound:
            min((pool for pool in self._pools if pool.kept), key=lambda pool: pool.oldest).let_go()

    def crowded(self, needs: Sequence[int]) -> bool:
        """Tell whether `needs` blocks of each group should be taken from kept ones, before memory is used that was not yet.

        So it is where blocks held and kept take more than the bound together, and would have to go anyway once they are let go
        of. Half of the bound is left for those who come while others run.
        """
        wanted = sum(need * size for need, size in zip(needs, self._bytes, strict=True))
        held = sum(pool.used * size for pool, size in zip(self._pools, self._bytes, strict=True))
        return held + self.kept_bytes + wanted > self.bound and 2 * (self.kept_bytes - wanted) >= self.bound

    def _last(self, sequence: TokenSequence) -> Prefix:
        return self._root if sequence.prefix is None else sequence.prefix

    def _content(self, sequence: TokenSequence, index: int) -> bytes:
        part = slice(index * self._size, (index + 1) * self._size)
        return array("q", sequence.tokens[part] + sequence.positions[part]).tobytes()

    def _first_seen(self, group: int, end: int) -> int:
        """Return the first table entry of a group that a token sees which begins the block `end`."""
        window = self._windows[group]
        return max(0, end * self._size - window + 1) // self._size if window else 0

    def _follow(self, sequence: TokenSequence, end: int) -> list[Prefix]:
        """Return the nodes after those that the sequence has run, as far as full-attention groups have them, before `end`."""
        node, path = self._last(sequence), list[Prefix]()
        for index in range(sequence.cached // self._size, end if node.depth == sequence.cached // self._size else 0):
            child = node.children.get(self._content(sequence, index))
            if child is None or not all(child.blocks[group] for group in self._full):
                break
            path.append(child)
            node = child
        return path

    def _move(self, sequence: TokenSequence, node: Prefix) -> None:
        """Make `node` the sequence's last full block; nodes that are some sequence's last stay in the tree."""
        former = sequence.prefix
        if node is not former:
            node.holders += 1
            sequence.prefix = node
            self._leave(former)

    def _leave(self, node: Prefix | None) -> None:
        if node is not None:
            node.holders -= 1
            self._prune(node)

    def _forget(self, group: int, block: int) -> None:
        node = self._nodes[group].pop(block, None)
        if node is not None and node.blocks[group] == block:
            node.blocks[group] = 0
            self._prune(node)

    def _prune(self, node: Prefix) -> None:
        """Take a node out, and then its parents, where nothing hangs on it."""
        while node.parent is not None and not (node.holders or node.children or any(node.blocks)):
            if node.parent.children.get(node.content) is node:
                del node.parent.children[node.content]
            node = node.parent
