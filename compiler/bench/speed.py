"""Measures prefill and decode of an artifact and of its peers in one run, turn by turn.

In: an artifact, and a checkpoint for peers. Out: medians, ratios and floors, as data, Markdown and (`chart.py`) a picture. Each
engine lives in a process of its own (`worker.py`) and only one works at a time; the order turns with every round. A sample
during which other processes used the machine is discarded and counted, and the run says how many there were.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from oxfuse.compiler.bench.cost import cost_of
from oxfuse.compiler.bench.probe import ForeignLoad, matmul_peak, read_bandwidth
from oxfuse.compiler.phases import Progress, silent
from oxfuse.errors import UserError
from oxfuse.runtime.machine import cpu_features, processors
from oxfuse.runtime.manifest import read_manifest

DISTURBED = 0.15  # cores that others may use during a sample
OURS, PEER = "oxfuse", "transformers"
VECTOR_FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16")
ATTEMPTS = 3  # to take a sample undisturbed
TRIAL_TOKENS = 4  # decoded to find an engine's best implementation
WORKER = "oxfuse.compiler.bench.worker"

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is measured: prefills of `prompts` tokens, and `tokens` decoded after each of `contexts`, in `rounds` turns.

    `wait`: seconds in all that the run may wait for a quiet machine.
    """

    prompts: tuple[int, ...] = (512,)
    contexts: tuple[int, ...] = (1000,)
    tokens: int = 16
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


def fitted(plan: Plan, max_context: int, keep: Container[str]) -> Plan:
    """Return the plan with shorter prompts and contexts where sequences end at `max_context`, but for the fields in `keep`."""
    prompts = plan.prompts if "prompts" in keep else tuple(min(n, max_context) for n in plan.prompts)
    room = max(1, max_context - ATTEMPTS * plan.rounds * plan.tokens)
    contexts = plan.contexts if "contexts" in keep else tuple(min(n, room) for n in plan.contexts)
    return replace(plan, prompts=prompts, contexts=contexts)


@dataclass(kw_only=True)
class Figure:
    """One engine in one phase: samples in seconds a token (decode: the median of a turn's), floor in the same unit."""

    engine: str
    phase: str
    size: int
    implementation: str = ""
    floor: float
    samples: list[float] = field(default_factory=list)
    discarded: int = 0

    @property
    def seconds(self) -> float:
        """Return the median of the samples that were not disturbed."""
        return statistics.median(self.samples) if self.samples else float("nan")

    @property
    def rate(self) -> float:
        """Return tokens a second."""
        return 1 / self.seconds

    @property
    def spread(self) -> float:
        """Return the distance between the quartiles over the median; 0 with fewer than 4 samples."""
        if len(self.samples) < 4:
            return 0.0
        low, _, high = statistics.quantiles(self.samples, n=4)
        return (high - low) / self.seconds


@dataclass(frozen=True, kw_only=True)
class SpeedResult:
    """A run. `bandwidth` in bytes a second, `peak` in floating-point operations a second, both measured in this run."""

    artifact: str
    machine: dict[str, Any]
    threads: int
    bandwidth: float
    peak: float
    engines: dict[str, str]
    missing: dict[str, str]
    agreement: float | None
    figures: list[Figure]

    def ratio(self, figure: Figure) -> float | None:
        """Return how many times as fast as the peer ours is in a phase, or None where one was not measured."""
        other = next((f for f in self.figures if (f.engine, f.phase, f.size) == (PEER, figure.phase, figure.size)), None)
        return other.seconds / figure.seconds if figure.engine == OURS and other and other.samples and figure.samples else None

    def to_json(self) -> str:
        """Return everything, samples included."""
        data = asdict(self)
        for figure, entry in zip(self.figures, data["figures"], strict=True):
            entry |= {"seconds": figure.seconds, "tokens_per_second": figure.rate, "ratio": self.ratio(figure)}
        return json.dumps(data, indent=1) + "\n"

    def to_markdown(self) -> str:
        """Return a table with the floor beside each figure."""
        machine = self.machine
        lines = [
            f"{self.artifact}, {machine['processor']}, {self.threads} threads of {machine['cores']} cores, torch "
            f"{machine['torch']}. Read bandwidth {self.bandwidth / 1e9:.1f} GB/s, matmul peak {self.peak / 1e9:.0f} GFLOP/s, "
            f"both of this run.",
            "",
            "| phase | engine | tokens/s | floor | of the floor | spread | samples (discarded) | ratio |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for f in self.figures:
            ratio = self.ratio(f)
            name = " ".join(filter(None, (self.engines[f.engine], f.implementation)))
            size = f"prefill {f.size}" if f.phase == "prefill" else f"decode at {f.size}"
            lines.append(
                f"| {size} | {name} | {f.rate:.1f} | {1 / f.floor:.1f} | {f.floor / f.seconds:.0%} | {f.spread:.0%} | "
                f"{len(f.samples)} ({f.discarded}) | {'' if ratio is None else f'{ratio:.2f}×'} |"
            )
        lines += ["", "Floor: bytes read over the bandwidth (decode), operations over the peak (prefill)."]
        if self.agreement is not None:
            lines.append(f"The engines' logits after the first prefill correlate by {self.agreement:.4f}.")
        lines += [f"{name} was not measured: {reason}" for name, reason in self.missing.items()]
        if dirty := sum(f.discarded for f in self.figures):
            lines.append(
                f"Disturbed: {dirty} samples were discarded, since other processes used more than {DISTURBED} cores meanwhile."
            )
        return "\n".join(lines) + "\n"


class Worker:
    """An engine in a process of its own."""

    def __init__(
        self,
        engine: str,
        folder: Path,
        threads: int,
        *more: str,
        module: str = WORKER,
        program: Sequence[str] | None = None,
    ) -> None:
        """Start it; `more` are further arguments of the `module`, or of the command `program` for another interpreter.

        Raises UserError with the reason if it cannot run here.
        """
        command = [*(program or (sys.executable, "-m", module)), engine, str(folder), str(threads), *more]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
        )
        self.engine = engine
        try:
            told = self._read()
        except UserError:
            self.close()
            raise
        self.name, self.implementations = str(told["name"]), tuple(told["implementations"])

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send a request and return the answer. Raises UserError with the engine's own words if it could not do it."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # then the missing answer tells
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise UserError(f"the {self.engine} process ended with code {self.process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise UserError(answer["error"])
        return answer

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it may be gone
            self.process.stdin.close()
        self.process.stdout.close()
        self.process.terminate()
        self.process.wait()


def measure_speed(artifact: Path, plan: Plan, *, checkpoint: Path | None = None, progress: Progress = silent) -> SpeedResult:
    """Measure the artifact, and transformers on `checkpoint` where one is given; `progress` gets a phase and its part done.

    Raises UserError where the artifact cannot run here; a peer that cannot is named in the result with the reason.
    """
    manifest = read_manifest(artifact)
    if plan.longest > manifest.limits.max_context:
        raise UserError(
            f"The run needs sequences of {plan.longest} tokens, the artifact takes {manifest.limits.max_context}: choose smaller "
            "--prompt, --context, --tokens or --rounds, or compile with a larger --max-context."
        )
    progress("probing the machine", None)
    bandwidth, peak, cost = read_bandwidth(plan.threads), matmul_peak(plan.threads), cost_of(manifest)
    missing: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        workers = []
        for engine, folder in ((OURS, artifact), *(((PEER, checkpoint),) if checkpoint else ())):
            progress(f"starting {engine}", None)
            try:
                workers.append(Worker(engine, folder, plan.threads))
                stack.callback(workers[-1].close)
            except UserError as error:
                if engine == OURS:
                    raise UserError(f"{artifact} cannot be measured: {error}") from error
                missing[engine] = str(error)
        figures: list[Figure] = []
        logits: dict[str, list[float]] = {}
        phases = [*(("prefill", n) for n in plan.prompts), *(("decode", n) for n in plan.contexts)]
        for phase, size in phases:
            turns = []
            for worker in workers:
                progress(f"{phase} {size}: trying {worker.engine}", None)
                if phase == "decode":
                    least = cost.decode_bytes(size, bfloat16=worker.engine == PEER) / bandwidth
                else:
                    least = cost.prefill_operations(size) / size / peak
                best = best_implementation(worker, phase, size)
                turns.append((worker, Figure(engine=worker.engine, phase=phase, size=size, implementation=best, floor=least)))
            for worker, figure in turns:
                if figure.implementation:
                    worker.ask(do="choose", implementation=figure.implementation)
                if phase == "decode":
                    worker.ask(do="context", tokens=size)
                elif phase == "prefill":  # also warms up what the trial of others may have cooled
                    logits.setdefault(worker.engine, worker.ask(do="prefill", tokens=size)["logits"])
            load = ForeignLoad(
                patience=plan.wait / len(phases), processes=(os.getpid(), *(worker.process.pid for worker in workers))
            )
            for done in range(plan.rounds):
                for worker, figure in turns if done % 2 == 0 else turns[::-1]:
                    progress(f"{phase} {size}", done / plan.rounds)
                    _sample(worker, figure, plan, load)
            figures += [figure for _, figure in turns]
        names = {worker.engine: worker.name for worker in workers}
    return SpeedResult(
        artifact=manifest.name,
        machine=machine_facts(),
        threads=plan.threads,
        bandwidth=bandwidth,
        peak=peak,
        engines=names,
        missing=missing,
        agreement=correlation(*logits.values()) if len(logits) == 2 else None,
        figures=figures,
    )


def best_implementation(worker: Worker, phase: str, size: int) -> str:
    """Try the engine's implementations and return the fastest one's name; "" where it has but one."""
    seconds = {}
    for implementation in worker.implementations:
        with contextlib.suppress(UserError):  # one that cannot do it is not the best
            worker.ask(do="choose", implementation=implementation)
            if phase == "prefill":
                seconds[implementation] = worker.ask(do="prefill", tokens=size)["seconds"]
            else:
                worker.ask(do="context", tokens=1)
                worker.ask(do="decode", tokens=1)
                seconds[implementation] = min(worker.ask(do="decode", tokens=TRIAL_TOKENS)["seconds"])
    return min(seconds, key=seconds.__getitem__) if seconds else ""


def _sample(worker: Worker, figure: Figure, plan: Plan, load: ForeignLoad) -> None:
    """Take one sample."""

    def take() -> float:
        if figure.phase == "prefill":
            return float(worker.ask(do="prefill", tokens=figure.size)["seconds"]) / figure.size
        return float(statistics.median(worker.ask(do="decode", tokens=plan.tokens)["seconds"]))

    value, disturbed = take_quietly(take, load)
    figure.samples.append(value)
    figure.discarded += disturbed


def take_quietly(take: Callable[[], T], load: ForeignLoad, attempts: int = ATTEMPTS) -> tuple[T, int]:
    """Take a sample; another for each that was disturbed, up to `attempts`. Return the last, and how many were disturbed."""
    for disturbed in range(attempts):
        load.wait(DISTURBED)
        value = take()
        foreign = load.look()
        if foreign is None or foreign < DISTURBED:
            return value, disturbed
    return value, attempts  # the machine does not get quieter: the count of disturbed ones says so


def machine_facts() -> dict[str, Any]:
    """Return what figures depend on besides the engines."""
    return {"processor": processor(), "cores": os.cpu_count(), "torch": torch.__version__, "system": platform.platform()}


def correlation(a: list[float], b: list[float]) -> float:
    """Return how alike two lists of logits are, 1 where one is the other times a number."""
    return float(torch.corrcoef(torch.tensor([a, b], dtype=torch.float64))[0, 1])


def processor() -> str:
    """Return the processor's name and what it has for small numbers, as /proc/cpuinfo tells."""
    has = [flag for flag in VECTOR_FEATURES if flag in cpu_features()]
    return f"{processors().model} ({', '.join(has) or 'no vector extensions known'})"


def result_lines(result: SpeedResult) -> Iterator[str]:
    """Yield one short line a figure, for a terminal."""
    for figure in result.figures:
        ratio = result.ratio(figure)
        what = f"{figure.phase} {figure.size}"
        floor = figure.floor / figure.seconds
        line = f"{what:<14} {result.engines[figure.engine]:<22} {figure.rate:9.1f} tokens/s {floor:5.0%} of the floor"
        yield line + (f"   {ratio:.2f}× {PEER}" if ratio else "")
