"""Measures prefill and decode of artifacts and of their peers in one run, turn by turn.

In: contenders (`contenders.py`), each made ready from one checkpoint. Out: a `SpeedResult`. Each engine lives in a process of its
own (`worker.py`) and only one works at a time; the order turns with every turn. All stay loaded, since turns must follow each
other closely on a machine whose speed drifts, those of a decode every few tokens: a shared memory was seen to give 31 GB/s in one
minute and 51 in the next. Where they do not fit into memory together, the run is refused. A sample during which other processes
used the machine is discarded and counted, and the run says how many there were.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import platform
import statistics
from collections.abc import Callable, Collection, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from oxfuse.compiler.bench.bars import bars
from oxfuse.compiler.bench.contenders import Contender
from oxfuse.compiler.bench.cost import Cost, cost_of
from oxfuse.compiler.bench.engines import PEER, EngineSpec
from oxfuse.compiler.bench.footprint import Footprint, footprints
from oxfuse.compiler.bench.probe import BandwidthProbe, ForeignLoad, matmul_peak
from oxfuse.compiler.bench.speed_result import Agreement, Figure, SpeedResult
from oxfuse.compiler.bench.worker_process import ATTEMPTS, Worker, best_implementation, take_quietly
from oxfuse.compiler.phases import Progress, silent
from oxfuse.errors import UserError
from oxfuse.runtime.machine import cpu_features, memory, processors
from oxfuse.runtime.manifest import Manifest, read_manifest
from oxfuse.runtime.units import size_text

VECTOR_FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16")
SLICE = 16  # tokens that an engine decodes in a turn: few, as a shared memory's speed changes; the first of them are slower
AGREEMENT_PROMPTS = (1, 7, 40, 100, 128, 129, 300, 512)
"""Tokens of the prompts whose last logits are compared, on both sides of a window of 128."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is measured: in each of `rounds`, prefills of `prompts` tokens, and `tokens` decoded after each of `contexts`.

    `wait`: seconds in all that the run may wait for a quiet machine.
    """

    prompts: tuple[int, ...] = (512,)
    contexts: tuple[int, ...] = (1000,)
    tokens: int = 64
    rounds: int = 7
    threads: int
    wait: float = 60.0

    def __post_init__(self) -> None:
        counts = {"prompt": self.prompts, "context": self.contexts, "tokens": (self.tokens,), "rounds": (self.rounds,)}
        for name, values in counts.items():
            if any(value < 1 for value in values):
                raise UserError(f"--{name} is {min(values)}: give a number of at least 1.")
        if not 1 <= self.threads <= 1024:
            raise UserError(f"--threads is {self.threads}: give a number from 1 to 1024.")

    @property
    def longest(self) -> int:
        """Return the tokens of the longest sequence, disturbed turns taken again included."""
        return max(*self.prompts, *(context + ATTEMPTS * self.rounds * self.tokens for context in self.contexts))

    @property
    def phases(self) -> tuple[tuple[str, int], ...]:
        """Return what is measured, in order."""
        return (*(("decode", n) for n in self.contexts), *(("prefill", n) for n in self.prompts))


def fitted(plan: Plan, max_context: int, keep: Container[str]) -> Plan:
    """Return the plan with less of what is not in `keep`, where sequences end at `max_context`."""
    prompts = plan.prompts if "prompts" in keep else tuple(dict.fromkeys(min(n, max_context) for n in plan.prompts))
    turns = ATTEMPTS * plan.rounds
    tokens = plan.tokens if "tokens" in keep else min(plan.tokens, max(1, max_context // 2 // turns))
    room = max(1, max_context - turns * tokens)
    contexts = plan.contexts if "contexts" in keep else tuple(dict.fromkeys(min(n, room) for n in plan.contexts))
    return replace(plan, prompts=prompts, contexts=contexts, tokens=tokens)


def measure_speed(
    contenders: Sequence[Contender],
    plan: Plan,
    *,
    missing: Mapping[str, str] | None = None,
    wanted: Collection[EngineSpec] = (),
    with_footprints: bool = False,
    progress: Progress = silent,
) -> SpeedResult:
    """Measure the contenders, of which one at least is an artifact; `progress` gets a phase and its part done.

    `wanted`: all engines that were asked for, `missing`: why some are not among the contenders; both go into the result.
    With `with_footprints`, memory and the first token as well, first and one engine after the other.

    Raises UserError where a required contender, or every artifact, cannot run here; any other that cannot is named in the result.
    """
    manifests = _manifests(contenders, plan)
    cost = cost_of(next(iter(manifests.values())))
    absent = dict(missing or {})
    found: list[Footprint] = []
    if with_footprints:
        found, failed = footprints(contenders, plan, cost, progress)
        absent |= failed
        contenders = [contender for contender in contenders if contender.spec.key not in absent]
        _check_memory(found)
    progress("probing the machine", None)
    bandwidth, bandwidths = BandwidthProbe(plan.threads), dict[int, list[float]]()
    peaks, int8_peaks = [matmul_peak(plan.threads)], [matmul_peak(plan.threads, dtypes=(torch.int8,))]

    def probe_bandwidth(size: int) -> float:
        found = bandwidth()
        bandwidths.setdefault(size, []).append(found)
        return found

    def probe_peaks() -> None:
        peaks.append(matmul_peak(plan.threads))
        int8_peaks.append(matmul_peak(plan.threads, dtypes=(torch.int8,)))

    with contextlib.ExitStack() as stack:
        workers = _start(contenders, plan.threads, stack, absent, progress)
        if not any(contender.spec.kind == "oxfuse" for contender, _ in workers):
            raise UserError(f"No artifact could be measured: {next(iter(absent.values()))}")
        agreements = _agreements(workers, plan, progress)
        figures: list[Figure] = []
        for phase, size in plan.phases:
            figures += _phase(phase, size, workers, plan, cost, progress, probe_bandwidth, probe_peaks)
        versions = {contender.spec.key: worker.name for contender, worker in workers}
    specs = {spec.key: spec for spec in (*wanted, *(contender.spec for contender in contenders))}
    int8_peak = max(*peaks, *int8_peaks)
    peak = max(*peaks, int8_peak / 2)  # an instruction takes half as many numbers of 16 bits as of 8
    for figure in figures:
        if figure.phase == "decode":
            figure.floor = figure.work / statistics.median(figure.bandwidths)
        else:
            figure.floor = figure.work / (int8_peak if specs[figure.engine].int8 else peak)
    return SpeedResult(
        artifact=next(iter(manifests.values())).name,
        machine=machine_facts(),
        threads=plan.threads,
        bandwidths=bandwidths,
        peak=peak,
        int8_peak=int8_peak,
        engines=specs,
        versions=versions,
        missing=absent,
        agreements=agreements,
        figures=figures,
        footprints=found,
    )


def _manifests(contenders: Sequence[Contender], plan: Plan) -> dict[str, Manifest]:
    """Return the artifacts' manifests. Raises UserError where one does not take the plan's sequences."""
    manifests = {c.spec.key: read_manifest(c.path) for c in contenders if c.spec.kind == "oxfuse"}
    for manifest in manifests.values():
        if plan.longest > manifest.limits.max_context:
            raise UserError(
                f"The run needs sequences of {plan.longest} tokens, the artifact takes {manifest.limits.max_context}: choose "
                "smaller --prompt, --context, --tokens or --rounds, or compile with a larger --max-context."
            )
    return manifests


def _check_memory(found: Collection[Footprint]) -> None:
    """Raise UserError if the engines, measured one by one, do not fit into memory together: all loaded, and one at work."""
    standing = {one.engine: min(one.loading, one.peak) for one in found}
    machine, needed = memory(), sum(standing.values()) + max((one.peak - standing[one.engine] for one in found), default=0)
    if machine is not None and needed > min(machine.available, machine.limit or machine.total):
        raise UserError(
            f"The engines need {size_text(needed)} together, {size_text(machine.available)} are available: leave some out with "
            "--skip, or choose fewer --layers."
        )


def _start(
    contenders: Sequence[Contender], threads: int, stack: contextlib.ExitStack, absent: dict[str, str], progress: Progress
) -> list[tuple[Contender, Worker]]:
    """Start all engines; those that cannot run are added to `absent`, or raise UserError where they are required."""
    workers = []
    for contender in contenders:
        progress(f"starting {contender.spec.title}", None)
        try:
            workers.append((contender, stack.enter_context(Worker.of(contender, threads))))
        except UserError as error:
            if contender.required:
                raise UserError(f"{contender.path} cannot be measured: {error}") from error
            absent[contender.spec.key] = str(error)
    return workers


def _agreements(workers: Sequence[tuple[Contender, Worker]], plan: Plan, progress: Progress) -> list[Agreement]:
    """Compare the last logits of the same prompts with transformers', or without it with those of the first engine."""
    if len(workers) < 2:
        return []
    logits: dict[str, dict[int, list[float]]] = {}
    for contender, worker in workers:
        progress(f"asking {contender.spec.title} for logits", None)
        if worker.implementations:
            worker.ask(do="choose", implementation=worker.implementations[0])
        prompts = [prompt for prompt in AGREEMENT_PROMPTS if prompt <= plan.longest]
        logits[contender.spec.key] = {prompt: worker.ask(do="prefill", tokens=prompt)["logits"] for prompt in prompts}
    reference = PEER if PEER in logits else next(iter(logits))
    right = {prompt: torch.tensor(values).argmax() for prompt, values in logits[reference].items()}
    return [
        Agreement(
            engine=key,
            reference=reference,
            correlations={prompt: correlation(values, logits[reference][prompt]) for prompt, values in own.items()},
            same=sum(bool(torch.tensor(values).argmax() == right[prompt]) for prompt, values in own.items()),
        )
        for key, own in logits.items()
        if key != reference
    ]


def _phase(
    phase: str,
    size: int,
    workers: Sequence[tuple[Contender, Worker]],
    plan: Plan,
    cost: Cost,
    progress: Progress,
    probe_bandwidth: Callable[[int], float],
    probe_peaks: Callable[[], None],
) -> list[Figure]:
    """Take the samples of all engines in one phase, in turns: a prefill, or SLICE tokens of a decode.

    Probes of the bandwidth stand around each turn of a decode; of a prefill, probes of the peak begin each round.

    An artifact is also measured at the phase's first size in the same turn: the machine's speed changes from phase to phase.
    """
    turns, shortest = [], next(n for name, n in plan.phases if name == phase)
    for contender, worker in workers:
        if not contender.spec.takes(size):
            continue
        progress(f"{phase} {size}: trying {contender.spec.title}", None)
        if phase == "decode":  # a sequence grows from turn to turn: what a token in its middle reads
            work = contender.decode_bytes(size + plan.rounds * plan.tokens // 2)
        else:
            work = cost.prefill_operations(size) / size
        best = best_implementation(worker, phase, size)
        near = shortest if contender.spec.kind == "oxfuse" and size != shortest else 0
        figure = Figure(engine=contender.spec.key, phase=phase, size=size, near_size=near, implementation=best, work=work)
        turns.append((worker, figure))
    for worker, figure in turns:
        if figure.implementation:
            worker.ask(do="choose", implementation=figure.implementation)
        for n in {figure.near_size, size} - {0}:
            worker.ask(do="context" if phase == "decode" else "prefill", tokens=n)  # warms up what others' trials cooled
    load = ForeignLoad(patience=plan.wait / len(plan.phases), processes=(os.getpid(), *(w.process.pid for w, _ in turns)))
    firsts = range(0, plan.tokens, SLICE) if phase == "decode" else range(1)
    for done, (_, first) in enumerate(itertools.product(range(plan.rounds), firsts)):
        if phase == "prefill":
            probe_peaks()
        for worker, figure in turns if done % 2 == 0 else turns[::-1]:
            progress(f"{phase} {size}", done / (plan.rounds * len(firsts)))
            into = [(figure.samples, size)]
            if figure.near_size:
                into.append((figure.near, figure.near_size))
            for samples, n in into if done % 2 == 0 else into[::-1]:
                if phase == "decode":
                    tokens = range(first, min(first + SLICE, plan.tokens))
                    take = functools.partial(_decode_turn, worker, n, tokens, functools.partial(probe_bandwidth, size))
                else:
                    take = functools.partial(_prefill_turn, worker, n)
                (value, beside), disturbed = take_quietly(take, load)
                samples.append(value)
                figure.discarded += disturbed
                if samples is figure.samples:
                    figure.bandwidths += beside
    return [figure for _, figure in turns]


def _prefill_turn(worker: Worker, size: int) -> tuple[float, list[float]]:
    """Return seconds a token of a prompt, and no bandwidth."""
    return float(worker.ask(do="prefill", tokens=size)["seconds"]) / size, []


def _decode_turn(worker: Worker, size: int, tokens: range, probe: Callable[[], float]) -> tuple[float, list[float]]:
    """Return seconds a token, the median of `tokens` decoded in the sequence that began with `size`, and the bandwidth then.

    That is the mean of a probe before them and one after them. The first token after another engine's turn is slower than the
    others: the median is not one of it.
    """
    before = probe()
    seconds = worker.ask(do="decode", tokens=len(tokens), first=tokens.start, context=size)["seconds"]
    return statistics.median(seconds), [(before + probe()) / 2]


def machine_facts() -> dict[str, Any]:
    """Return what figures depend on besides the engines."""
    return {"processor": processor(), "cores": os.cpu_count(), "torch": torch.__version__, "system": platform.platform()}


def processor() -> str:
    """Return the processor's name and what it has for small numbers, as /proc/cpuinfo tells."""
    has = [feature for feature in VECTOR_FEATURES if feature in cpu_features()]
    return f"{processors().model} ({', '.join(has) or 'no vector extensions known'})"


def correlation(a: list[float], b: list[float]) -> float:
    """Return how alike two lists of logits are, 1 where one is the other times a number."""
    return float(torch.corrcoef(torch.tensor([a, b], dtype=torch.float64))[0, 1])


def result_lines(result: SpeedResult) -> list[str]:
    """Return what the command line prints: a line a figure, a line a bar."""
    width = max(len(result.name(figure)) for figure in result.figures)
    lines = []
    for f in result.figures:
        ratios = "".join(f"   {ratio:.2f} x {result.engines[peer].title}" for peer, ratio in result.ratios(f).items())
        speed = f"{f.rate:>9.1f} tokens/s   {f.of_floor:>5.0%} of the floor"
        lines.append(f"{f.phase:<7} {f.size:>5}  {result.name(f):<{width}}  {speed}{ratios}")
    for bar in bars(result):
        verdict = {True: "holds", False: "does not hold", None: "not measured"}[bar.holds]
        lines.append(f"{verdict:<13}  {bar.text}: {bar.found_text} (wanted {bar.wanted_text})")
    return lines
