"""The seam between the engine and what steps run on: who keeps the caches, builds a step's inputs, and brings its logits back.

The engine plans in lists of tokens and blocks; a device turns a plan into tensors where its memory is. `HostDevice` is the CPU;
`oxfuse.runtime.graphs` has the one that runs on an accelerator.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from oxfuse.runtime.blocks import allocate_caches, check_caches, discard
from oxfuse.runtime.cache_size import CacheSize
from oxfuse.runtime.errors import InternalError
from oxfuse.runtime.manifest import CacheSpec
from oxfuse.runtime.sequence import Feed
from oxfuse.runtime.step_inputs import Ints, flat_inputs, move_on

Step = Callable[[list[Tensor]], Tensor]
"""The inputs in the order of the manifest, caches last, all int64 before them; returns logits [R, V]."""


@dataclass(frozen=True, kw_only=True)
class Best:
    """The most likely token of a row, of equals the one with the lowest id, and its logit; NaN where a logit is."""

    token: int
    logit: float


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a step gave for its rows: `logits` float32 [R, V] on the CPU, `best` one a row; None for what was not brought back."""

    logits: Tensor | None
    best: Sequence[Best] | None


class Device(ABC):
    """Memory and processor of steps. Guarded by whoever guards the engine; any thread may be the one that runs a step."""

    most_rows: int | None = None
    """Most rows whose logits a step may be asked for, None for any number."""

    claims = True
    """Whether the memory of the caches is taken when they are allocated, and not as they are written."""

    @abstractmethod
    def allocate(self, spec: CacheSpec, size: CacheSize) -> list[Tensor]:
        """Return the caches in the order of the program's inputs. Raises UserError where there is no memory for them."""

    def check(self, caches: Sequence[Tensor], spec: CacheSpec, size: CacheSize) -> None:
        """Raise InternalError unless `caches` are as the programs believe them to be."""
        check_caches(caches, spec, size)

    @abstractmethod
    def run(self, step: Step, feeds: Sequence[Feed], rows: Sequence[int], caches: Sequence[Tensor], *, greedy: bool) -> Outcome:
        """Run one step over secured feeds; `rows` are indices into its tokens, one or more.

        With `greedy` the most likely tokens are enough. Raises what the step raises, InternalError if it returns the wrong shape.
        """

    @abstractmethod
    def copy_block(self, caches: Sequence[Tensor], source: int, target: int, tokens: int) -> None:
        """Copy block `source` of each cache, whose first `tokens` are in use, to its block `target`, before any later step."""

    @abstractmethod
    def discard(self, caches: Sequence[Tensor], blocks: range | None = None) -> None:
        """Forget what the caches hold, in `blocks` or in all; where memory is committed as it is used, give it back."""


class HostDevice(Device):
    """The CPU: caches are virtual memory that is committed as it is written."""

    claims = False

    def __init__(self) -> None:
        """Begin without inputs."""
        self._arrays: list[Ints] = []
        self._inputs: list[Tensor] = []  # the same memory
        self._stamp: object = None  # of the tables in them, if they are of one token of one sequence
        self._rows = 0  # for which a program has been seen to return as many; to look again costs a token 1/500 of its time

    def allocate(self, spec: CacheSpec, size: CacheSize) -> list[Tensor]:
        """Reserve the caches."""
        return allocate_caches(spec, size)

    def run(self, step: Step, feeds: Sequence[Feed], rows: Sequence[int], caches: Sequence[Tensor], *, greedy: bool) -> Outcome:
        """Run the step; all logits are there anyway."""
        self._prepare(feeds, rows, block_size=caches[0].shape[-1])  # K is [blocks, KV, D, block_size]
        logits = step([*self._inputs, *caches])
        if len(rows) != self._rows:
            self._rows = len(checked_logits(logits, len(rows)))
        return Outcome(logits=logits.float(), best=None)

    def _prepare(self, feeds: Sequence[Feed], rows: Sequence[int], *, block_size: int) -> None:
        """Make the step's inputs, those of the last step where a sequence decodes on: new ones took 1/300 of a token of 20 ms."""
        feed = feeds[0]
        single = len(feeds) == 1 and feed.count == 1
        if single and feed.sequence.stamp is self._stamp:
            return move_on(self._arrays, feed.sequence, block_size)
        self._stamp = None  # in this order: an interrupt leaves nothing that the next step would take for right
        self._arrays = flat_inputs(feeds, rows, block_size)
        self._inputs = [torch.from_numpy(array) for array in self._arrays]
        self._stamp = feed.sequence.stamp if single else None
        return None

    def copy_block(self, caches: Sequence[Tensor], source: int, target: int, tokens: int) -> None:
        """Copy a block."""
        for cache in caches:
            cache[target].copy_(cache[source])

    def discard(self, caches: Sequence[Tensor], blocks: range | None = None) -> None:
        """Give the pages back to the system."""
        for cache in caches:
            discard(cache, blocks)


def checked_logits(logits: Tensor, rows: int) -> Tensor:
    """Return `logits` if they are [rows, V]. Raises InternalError."""
    if logits.dim() != 2 or logits.shape[0] != rows:
        raise InternalError(f"The step returned logits of shape {list(logits.shape)}, {rows} rows were asked for.")
    return logits
