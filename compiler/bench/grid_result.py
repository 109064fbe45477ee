"""A run of the grid as data, Markdown and JSON: batches by sequences, each contender beside the others and the floor.

Tables are laid out like transformers' own for GPT-NeoX: a row a cell, OOM where memory did not suffice, what is saved in percent.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

INFERENCE, TRAINING = "inference", "training"
EAGER, SDPA, OURS = "eager", "sdpa", "oxfuse"
TWIN = "oxfuse again"
"""Ours measured as a series of its own: how much two equal things differ in this run."""

CONTENDERS = (EAGER, SDPA, OURS)
SHOWN = {EAGER: "Eager", SDPA: "SDPA", OURS: "oxfuse"}
MEGABYTE = 1e6
WITHOUT_MEMORY = "OOM"


@dataclass(frozen=True, kw_only=True)
class Metric:
    """What is measured in a part, by its name in samples, and the unit that tables give it in."""

    name: str
    title: str
    unit: str
    scale: float


METRICS = {
    INFERENCE: (
        Metric(name="decode", title="Per-token latency of decode", unit="ms", scale=1e3),
        Metric(name="prefill", title="Prefill, time to the first token", unit="s", scale=1.0),
    ),
    TRAINING: (Metric(name="step", title="Time per batch, forward and backward", unit="s", scale=1.0),),
}


@dataclass(kw_only=True)
class Series:
    """Samples of one contender in one cell, seconds by metric; the most memory of any turn, bytes, None where unknown.

    `failure`: why there is none, "" if all is well. `without_memory`: because the machine's did not suffice. `disturbed`: turns
    during which other processes used the machine.
    """

    samples: dict[str, list[float]] = field(default_factory=dict)
    memory: int | None = None
    failure: str = ""
    without_memory: bool = False
    disturbed: int = 0

    def seconds(self, metric: str) -> float | None:
        """Return the median; None without samples."""
        values = self.samples.get(metric)
        return statistics.median(values) if values and not self.failure else None


@dataclass(kw_only=True)
class Cell:
    """One row: `floors` are seconds by metric. `left_out`: the budget did not suffice.

    `agreement`: the least correlation of our logits after the prefill with a peer's; in training, the largest relative difference
    of the loss. None without both.
    """

    part: str
    dtype: str
    batch: int
    sequence: int
    floors: dict[str, float]
    series: dict[str, Series] = field(default_factory=dict)
    agreement: float | None = None
    left_out: bool = False

    @property
    def rounds(self) -> int:
        """Return the most samples that a contender has."""
        return max((len(values) for series in self.series.values() for values in series.samples.values()), default=0)

    def seconds(self, contender: str, metric: str) -> float | None:
        """Return a contender's median; None where it has none."""
        return self.series[contender].seconds(metric) if contender in self.series else None

    def speedup(self, metric: str) -> float | None:
        """Return how many times as fast as the better peer ours is; None without both."""
        ours, peers = self.seconds(OURS, metric), [self.seconds(peer, metric) for peer in (EAGER, SDPA)]
        known = [seconds for seconds in peers if seconds is not None]
        return min(known) / ours if ours is not None and known else None

    def twins_differ(self, metric: str) -> float | None:
        """Return by what part of it the median of ours differs from that of the same measured again."""
        ours, again = self.seconds(OURS, metric), self.seconds(TWIN, metric)
        return abs(again / ours - 1) if ours is not None and again is not None else None


@dataclass(frozen=True, kw_only=True)
class GridResult:
    """A run. `peaks`: floating-point operations a second by dtype; `bandwidth`: bytes a second; both of this run."""

    model: str
    plan: dict[str, Any]
    machine: dict[str, Any]
    bandwidth: float
    peaks: dict[str, float]
    names: dict[str, str]
    missing: dict[str, str]
    cells: list[Cell]
    seconds: float

    def tables(self) -> Iterator[tuple[str, str, Metric, list[Cell]]]:
        """Yield part, dtype, metric and the cells that were measured, batches and sequences in order."""
        for part, dtype in dict.fromkeys((cell.part, cell.dtype) for cell in self.cells):
            cells = [c for c in self.cells if (c.part, c.dtype) == (part, dtype) and not c.left_out]
            for metric in METRICS[part] if cells else ():
                yield part, dtype, metric, sorted(cells, key=lambda cell: (cell.batch, cell.sequence))

    def to_json(self) -> str:
        """Return everything, samples included."""
        data = asdict(self)
        for cell, entry in zip(self.cells, data["cells"], strict=True):
            names = [metric.name for metric in METRICS[cell.part]]
            entry["speedup"] = {name: cell.speedup(name) for name in names}
            entry["twins_differ"] = {name: cell.twins_differ(name) for name in names}
            for contender, series in cell.series.items():
                entry["series"][contender]["seconds"] = {name: series.seconds(name) for name in names}
        return json.dumps(data, indent=1) + "\n"

    def to_markdown(self) -> str:
        """Return a table for each part, dtype and metric, and what must be known to read them."""
        machine, plan, names = self.machine, self.plan, "; ".join(sorted(set(self.names.values())))
        peaks = ", ".join(f"{peak / 1e9:.0f} GFLOP/s in {dtype}" for dtype, peak in self.peaks.items())
        lines = [
            f"The shape of {self.model}, with random weights; {machine['processor']}, {plan['threads']} threads of "
            f"{machine['cores']} cores, {machine['system']}, torch {machine['torch']}; {names}.",
            f"Read bandwidth {self.bandwidth / 1e9:.1f} GB/s, matmul peak {peaks}, of this run, which took {self.seconds:.0f} s.",
        ]
        for part, dtype, metric, cells in self.tables():
            lines += ["", f"### {part.capitalize()}, {dtype}: {metric.title}", "", *_table(metric, cells)]
        return "\n".join([*lines, "", *self.notes()]) + "\n"

    def notes(self) -> Iterator[str]:
        """Yield what a reader of the tables must know, a line each."""
        yield (
            "Medians of turns taken one after the other. Speedup: of oxfuse over the better of the others. Floor: operations "
            "over the peak (prefill, training), bytes read over the bandwidth (decode). Mem: the most that the process had in "
            "memory, over its state after imports. A/A: by how much oxfuse differs from itself, measured as two series."
        )
        for part in dict.fromkeys(cell.part for cell in self.cells):
            for metric in METRICS[part]:
                found = [c.twins_differ(metric.name) for c in self.cells if c.part == part]
                if spread := [value for value in found if value is not None]:
                    yield (
                        f"A/A of {part} ({metric.name}): median {statistics.median(spread):.1%}, at most {max(spread):.1%}, over "
                        f"{len(spread)} cells."
                    )
            agreed = [c.agreement for c in self.cells if c.part == part and c.agreement is not None]
            if agreed and part == INFERENCE:
                yield f"Our logits after the prefill correlate with the others' by {min(agreed):.5f} or more."
            elif agreed:
                yield f"Our losses differ from the others' by {max(agreed):.1e} of them, or less."
        yield from (f"{name} was not measured: {reason}" for name, reason in self.missing.items())
        without = dict[str, list[str]]()
        for cell in self.cells:
            for contender, series in cell.series.items():
                if contender != TWIN and series.failure:
                    what = f"{cell.part} {cell.dtype} {cell.batch} × {cell.sequence}"
                    reason = "more memory than the machine has" if series.without_memory else series.failure
                    without.setdefault(f"{SHOWN[contender]}: {reason}", []).append(what)
        yield from (f"{reason} ({', '.join(cells)})." for reason, cells in without.items())
        if left := [f"{c.part} {c.dtype} {c.batch} × {c.sequence}" for c in self.cells if c.left_out]:
            yield f"Left out, for the budget of {self.plan['budget']:.0f} s: {', '.join(left)}."
        if few := [c for c in self.cells if not c.left_out and c.rounds < self.plan["rounds"]]:
            rounds = self.plan["rounds"]
            yield f"{len(few)} of {len(self.cells)} cells had fewer than {rounds} rounds, for their cost or the budget."
        if disturbed := sum(series.disturbed for cell in self.cells for series in cell.series.values()):
            yield f"Other processes used the machine during {disturbed} turns; those were taken again where that was cheap."


def _table(metric: Metric, cells: list[Cell]) -> Iterator[str]:
    shown = [SHOWN[name] for name in CONTENDERS]
    heads = ["Batch size", "Seq len", *(f"{name} ({metric.unit})" for name in shown), f"Floor ({metric.unit})", "Speedup (%)"]
    heads += [*(f"{name} mem (MB)" for name in shown), "Mem saved (%)", "A/A (%)", "Rounds"]
    yield f"| {' | '.join(heads)} |"
    yield "|" + "---:|" * len(heads)
    for cell in cells:
        speedup, differ = cell.speedup(metric.name), cell.twins_differ(metric.name)
        row = [str(cell.batch), str(cell.sequence), *(_time(cell, name, metric) for name in CONTENDERS)]
        row += [_number(cell.floors[metric.name] * metric.scale), "/" if speedup is None else f"{100 * (speedup - 1):.1f}"]
        row += [*(_memory(cell, name) for name in CONTENDERS), _saved(cell)]
        row += ["/" if differ is None else f"{100 * differ:.1f}", str(cell.rounds)]
        yield f"| {' | '.join(row)} |"


def _time(cell: Cell, contender: str, metric: Metric) -> str:
    return _shown(cell, contender, lambda series: series.seconds(metric.name), metric.scale)


def _memory(cell: Cell, contender: str) -> str:
    return _shown(cell, contender, lambda series: series.memory, 1 / MEGABYTE)


def _shown(cell: Cell, contender: str, value: Any, scale: float) -> str:
    series = cell.series.get(contender)
    if series is None:
        return "/"
    if series.failure:
        return WITHOUT_MEMORY if series.without_memory else "failed"
    found = value(series)
    return "/" if found is None else _number(found * scale)


def _number(value: float) -> str:
    """Return a figure with four digits that count, or all before the point."""
    digits = 3 if value == 0 else max(0, 3 - math.floor(math.log10(abs(value))))
    return f"{value:.{min(digits, 6)}f}"


def _saved(cell: Cell) -> str:
    peers: Mapping[str, Series] = {name: cell.series[name] for name in (EAGER, SDPA) if name in cell.series}
    ours = cell.series.get(OURS)
    if ours is None or ours.failure or not ours.memory:
        return "/"
    least = [series.memory for series in peers.values() if series.memory and not series.failure]
    if least:
        return f"{100 * (min(least) / ours.memory - 1):.1f}"
    return f"{SHOWN[OURS]} does not {WITHOUT_MEMORY}" if any(series.without_memory for series in peers.values()) else "/"
