"""What a run of the speed benchmark found: figures, how far the engines agree, memory, and which bars were reached.

In: samples, floors and footprints. Out: ratios, JSON and Markdown; `chart.py` draws the same.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from oxfuse.compiler.bench.bars import bars
from oxfuse.compiler.bench.engines import PEER, EngineSpec
from oxfuse.compiler.bench.footprint import FIRST_PROMPT, Footprint
from oxfuse.compiler.bench.worker_process import DISTURBED
from oxfuse.runtime.units import size_text


@dataclass(kw_only=True)
class Figure:
    """One engine in one phase: samples in seconds a token, one a turn (decode: the median of a turn's), floor in the same unit.

    `work` is what the floor comes from: bytes that a decoded token reads, operations of a token of a prefill. `near`: samples
    at `near_size`, the phase's first, that were taken in the same turns; 0: none were. `bandwidths`: bytes a second that the
    machine read meanwhile, one a sample of a decode: from probes around it.
    """

    engine: str
    phase: str
    size: int
    implementation: str = ""
    work: float = 0.0
    floor: float = float("nan")
    samples: list[float] = field(default_factory=list)
    near_size: int = 0
    near: list[float] = field(default_factory=list)
    bandwidths: list[float] = field(default_factory=list)
    discarded: int = 0

    @property
    def seconds(self) -> float:
        """Return the median of the samples that were not disturbed."""
        return statistics.median(self.samples) if self.samples else float("nan")

    @property
    def of_near(self) -> float | None:
        """Return the part of the speed at `near_size` that is left, both measured in the same turns."""
        return _paired(self.near, self.samples) if self.near else None

    @property
    def rate(self) -> float:
        """Return tokens a second."""
        return 1 / self.seconds

    @property
    def of_floor(self) -> float:
        """Return the floor over the time that was taken: 1 where nothing could be faster.

        Turn by turn where the bandwidth was probed beside each: a shared machine's memory has another speed every minute.
        """
        if not self.bandwidths:
            return self.floor / self.seconds
        pairs = zip(self.bandwidths, self.samples, strict=True)
        return statistics.median(self.work / bandwidth / sample for bandwidth, sample in pairs)

    @property
    def spread(self) -> float:
        """Return the distance between the quartiles over the median; 0 with fewer than 4 samples."""
        if len(self.samples) < 4:
            return 0.0
        low, _, high = statistics.quantiles(self.samples, n=4)
        return (high - low) / self.seconds


def _paired(theirs: Sequence[float], ours: Sequence[float]) -> float:
    """Return the median of the quotients of samples that were taken one after the other.

    Where the machine becomes faster in the middle of a run, medians of each may be of two machines.
    """
    return statistics.median(a / b for a, b in zip(theirs, ours, strict=True))


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How alike an engine's logits are to those of `reference`, for the last tokens of the same prompts.

    `correlations`: by tokens of the prompt. `same`: prompts of which both rate the same token highest.
    """

    engine: str
    reference: str
    correlations: dict[int, float]
    same: int


@dataclass(frozen=True, kw_only=True)
class SpeedResult:
    """A run. `bandwidths` in bytes a second, `peak` and `int8_peak` in operations a second, all measured in this run.

    Bandwidth was probed around each turn of each context's decoding: on a machine that others share it changes by a quarter
    within seconds. Medians of it set floors, as medians are compared with them.
    `peak` is what torch's best matmul reaches, or half of `int8_peak`: an instruction takes half as many numbers of 16 bits.
    `engines` are by key, as are their `versions`.
    """

    artifact: str
    machine: dict[str, Any]
    threads: int
    bandwidths: dict[int, list[float]]
    peak: float
    int8_peak: float
    engines: dict[str, EngineSpec]
    versions: dict[str, str]
    missing: dict[str, str]
    figures: list[Figure]
    agreements: list[Agreement] = field(default_factory=list)
    footprints: list[Footprint] = field(default_factory=list)

    def figure(self, engine: str | None, phase: str, size: int) -> Figure | None:
        """Return an engine's figure in a phase, or None where it has no samples."""
        found = (f for f in self.figures if (f.engine, f.phase, f.size) == (engine, phase, size) and f.samples)
        return next(found, None)

    def footprint(self, engine: str | None) -> Footprint | None:
        """Return what an engine needs besides time for tokens, or None where it was not measured."""
        return next((f for f in self.footprints if f.engine == engine), None)

    def ratio(self, figure: Figure, peer: str | None) -> float | None:
        """Return how many times as fast as the peer an engine of ours is in a phase, or None where one was not measured."""
        other = self.figure(peer, figure.phase, figure.size)
        ours = self.engines[figure.engine].kind == "oxfuse"
        return _paired(other.samples, figure.samples) if ours and other and figure.samples else None

    def ratios(self, figure: Figure) -> dict[str, float]:
        """Return the ratios to the row of llama.cpp that holds the same weights, and to transformers, where there are any."""
        peers = filter(None, (self.engines[figure.engine].rival, PEER))
        return {peer: ratio for peer in peers if (ratio := self.ratio(figure, peer)) is not None}

    def name(self, figure: Figure) -> str:
        """Return what a figure's engine is called, with the implementation that it used."""
        return ", ".join(filter(None, (self.engines[figure.engine].title, figure.implementation)))

    def to_json(self) -> str:
        """Return everything, samples included."""
        data = asdict(self)
        for figure, entry in zip(self.figures, data["figures"], strict=True):
            entry |= {"seconds": figure.seconds, "tokens_per_second": figure.rate, "ratios": self.ratios(figure)}
        data["bars"] = [asdict(bar) | {"holds": bar.holds} for bar in bars(self)]
        return json.dumps(data, indent=1) + "\n"

    def to_markdown(self) -> str:
        """Return tables: figures with their floors, the bars, memory and first token; and how far the engines agree."""
        machine = self.machine
        bandwidths = "; ".join(
            f"{statistics.median(probes) / 1e9:.1f} GB/s beside decoding at {context} "
            f"({min(probes) / 1e9:.1f} to {max(probes) / 1e9:.1f})"
            for context, probes in self.bandwidths.items()
        )
        lines = [
            f"{self.artifact}, {machine['processor']}, {self.threads} threads of {machine['cores']} cores, torch "
            f"{machine['torch']}; {'; '.join(dict.fromkeys(self.versions.values()))}. Read bandwidth, the median of probes "
            f"around turns: {bandwidths or 'not probed'}. Peak of products {self.peak / 1e9:.0f} GOP/s, "
            f"in int8 {self.int8_peak / 1e9:.0f} GOP/s, all of this run.",
            "",
            "| phase | engine | tokens/s | floor | of the floor | spread | samples (discarded) | over llama.cpp | transformers |",
            "|---|---|---:|---:|---:|---:|---:|---:|---:|",
        ]
        for f in self.figures:
            size = f"prefill {f.size}" if f.phase == "prefill" else f"decode at {f.size}"
            over = [f"{r:.2f}×" if (r := self.ratio(f, peer)) else "" for peer in (self.engines[f.engine].rival, PEER)]
            lines.append(
                f"| {size} | {self.name(f)} | {f.rate:.1f} | {1 / f.floor:.1f} | {f.of_floor:.0%} | {f.spread:.0%} | "
                f"{len(f.samples)} ({f.discarded}) | {over[0]} | {over[1]} |"
            )
        lines += [
            "",
            "Floor: bytes that the engine's own weights and its caches half-way make it read, over the bandwidth around its "
            "turns (decode; of the floor is the median over turns); operations over the peak of the arithmetic that it may use "
            "(prefill). Ratios are medians over turns too, each of two that followed each other: a prefill, or some tokens of a "
            "decode.",
            "",
            *self._bar_lines(),
            *self._memory_lines(),
            *self._agreement_lines(),
        ]
        lines += [f"{self.engines[key].title} was not measured: {reason}" for key, reason in self.missing.items()]
        if dirty := self.discarded:
            lines.append(
                f"Disturbed: {dirty} samples were discarded, since other processes used more than {DISTURBED} cores meanwhile."
            )
        return "\n".join(lines).rstrip() + "\n"

    @property
    def discarded(self) -> int:
        """Return how many samples others disturbed."""
        return sum(f.discarded for f in self.figures) + sum(f.discarded for f in self.footprints)

    def _bar_lines(self) -> Iterator[str]:
        if found := bars(self):
            yield from ("| bar | wanted | found | |", "|---|---:|---:|---|")
            for bar in found:
                verdict = "not measured" if bar.holds is None else "holds" if bar.holds else "**DOES NOT HOLD**"
                yield f"| {bar.text} | {bar.wanted_text} | {bar.found_text} | {verdict} |"
            yield ""

    def _memory_lines(self) -> Iterator[str]:
        if not self.footprints:
            return
        sizes = sorted(self.footprints[0].peaks)
        heads = [f"peak, prompt {size}" for size in sizes]
        yield f"| engine | {' | '.join(heads)} | over a bare process | weights and caches | loading | load + first token (s) |"
        yield f"|---|{'---:|' * (len(sizes) + 4)}"
        for f in self.footprints:
            needed = "" if f.weights is None else size_text(f.weights + f.caches[sizes[-1]])
            times = f"{statistics.median(f.load_seconds):.2f} + {statistics.median(f.first_seconds):.2f}"
            cells = [size_text(f.peaks[size]) if size in f.peaks else "" for size in sizes]
            cells += [size_text(f.peak - f.bare), needed, size_text(f.loading), times]
            yield f"| {self.engines[f.engine].title} | {' | '.join(cells)} |"
        yield ""
        yield (
            "Memory is resident, mapped weights included, each engine alone in its process; a bare process has imported torch "
            "(or llama.cpp's package) alone. Weights are those of the file that is mapped, caches those of the longest prompt. "
            f"First token: the logits of a prompt of {FIRST_PROMPT} tokens, files in the page cache."
        )
        yield ""

    def _agreement_lines(self) -> Iterator[str]:
        for found in self.agreements:
            prompts = found.correlations
            least = min(prompts, key=prompts.__getitem__)
            yield (
                f"- {self.engines[found.engine].title}: logits correlate with {self.engines[found.reference].title} by "
                f"{statistics.mean(prompts.values()):.4f} in the mean of {len(prompts)} prompts, by {prompts[least]:.4f} at "
                f"least (prompt of {least} tokens); the same token is first in {found.same} of {len(prompts)}."
            )
        if self.agreements:
            yield ""
