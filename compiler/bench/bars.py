"""What the comparison with peers is to reach, as data, and what a run found of it.

In: a result. Out: a `Bar` for every demand on an engine that took part, with the figure found, or None where it was not measured.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from oxfuse.compiler.bench.engines import INT8, INT8_DENSE, LLAMA_BF16, LLAMA_Q8, OURS, PEER

if TYPE_CHECKING:
    from oxfuse.compiler.bench.speed_result import SpeedResult

SHORT, LONG = 128, 4096
PROMPT, LONG_PROMPT = 512, 4096
OVER_PEER = (
    ("decode", SHORT, INT8, LLAMA_BF16, 1.0),
    ("decode", SHORT, INT8_DENSE, LLAMA_Q8, 1.15),
    ("prefill", PROMPT, OURS, PEER, 1.7),
    ("prefill", PROMPT, INT8, PEER, 2.3),
)
"""Phase, size, engine, peer: how many times as fast the engine must be."""
OF_FLOOR = ((INT8, 0.95), (OURS, 0.85))
"""Decode at `SHORT`: the part of the floor's speed that an engine must reach."""
KEPT = (("decode", SHORT, LONG, 0.92), ("prefill", PROMPT, LONG_PROMPT, 0.90))
"""The part of the speed at the first size that must be left at the second."""
MEMORY = 1.05
FIRST_TOKEN = 1.0


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One demand. `found` must be `wanted` or more, or with `at_most` no more; None where it was not measured."""

    text: str
    wanted: float
    found: float | None
    unit: str = "×"
    at_most: bool = False

    @property
    def holds(self) -> bool | None:
        """Tell whether the demand is met; None where it was not measured."""
        if self.found is None:
            return None
        return self.found <= self.wanted if self.at_most else self.found >= self.wanted

    @property
    def wanted_text(self) -> str:
        """Return the demand as a person reads it."""
        return f"{'≤' if self.at_most else '≥'} {self._text(self.wanted)}"

    @property
    def found_text(self) -> str:
        """Return the figure in the same unit, with more digits where it would seem to meet a demand that it misses, or a dash."""
        if self.found is None:
            return "–"
        seems = self.holds is False and self._text(self.found) == self._text(self.wanted)
        return self._text(self.found, 2 if seems else 0)

    def _text(self, value: float, more: int = 0) -> str:
        """Return `value` with `more` digits than usual."""
        return f"{value:.{more}%}" if self.unit == "%" else f"{value:.{2 + more}f}{' s' if self.unit == 's' else self.unit}"


def bars(result: SpeedResult) -> list[Bar]:
    """Return all demands on the engines of a comparison; none where no peer was asked for."""
    if not any(spec.kind != "oxfuse" for spec in result.engines.values()):
        return []
    return [*_speed(result), *_memory(result)]


def _speed(result: SpeedResult) -> Iterator[Bar]:
    titles = {key: spec.title for key, spec in result.engines.items()}
    for phase, size, engine, peer, wanted in OVER_PEER:
        if engine in titles and peer in titles:
            figure = result.figure(engine, phase, size)
            found = result.ratio(figure, peer) if figure else None
            yield Bar(text=f"{phase} {size}: {titles[engine]} over {titles[peer]}", wanted=wanted, found=found)
    for engine, wanted in OF_FLOOR:
        if engine in titles:
            figure = result.figure(engine, "decode", SHORT)
            text = f"decode {SHORT}: {titles[engine]}, of the floor"
            yield Bar(text=text, wanted=wanted, found=figure.of_floor if figure else None, unit="%")
    for phase, near, far, wanted in KEPT:
        for engine, spec in result.engines.items():
            if spec.kind == "oxfuse":
                last = result.figure(engine, phase, far)
                text = f"{phase} {far}: {spec.title}, of its speed at {near} in the same turns"
                yield Bar(text=text, wanted=wanted, found=last.of_near if last and last.near_size == near else None, unit="%")


def _memory(result: SpeedResult) -> Iterator[Bar]:
    for engine, spec in result.engines.items():
        if spec.kind != "oxfuse":
            continue
        own = result.footprint(engine)
        ratios = [own.over_needed(prompt) for prompt in own.peaks] if own else []
        text = f"peak memory over `import torch`: {spec.title}, of weights and caches"
        most = max((ratio for ratio in ratios if ratio is not None), default=None)
        yield Bar(text=text, wanted=MEMORY, found=most, at_most=True)
        for peer in (spec.rival, PEER):
            if peer in result.engines:
                other = result.footprint(peer)
                text = f"peak memory: {spec.title} over {result.engines[peer].title}"
                yield Bar(text=text, wanted=1.0, found=own.peak / other.peak if own and other else None, at_most=True)
        text = f"load and first token: {spec.title}"
        yield Bar(text=text, wanted=FIRST_TOKEN, found=own.first_token if own else None, unit="s", at_most=True)
