"""Measures what an engine needs besides time for tokens: memory at its peak, and seconds until the first token.

In: a contender. Out: a `Footprint`. Each measurement has a process of its own, with nothing else of the benchmark beside it.
Memory is what the kernel counts as resident (VmHWM): mapped weights are in it, as are pages that others share, so that a bare
process of the same interpreter is taken off.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from oxfuse.compiler.bench.contenders import Contender
from oxfuse.compiler.bench.cost import Cost
from oxfuse.compiler.bench.llama import MODULE
from oxfuse.compiler.bench.probe import ForeignLoad
from oxfuse.compiler.bench.worker_process import Worker, take_quietly
from oxfuse.compiler.phases import Progress
from oxfuse.compiler.process_memory import peak_resident, reset_peak, resident
from oxfuse.errors import UserError

if TYPE_CHECKING:
    from oxfuse.compiler.bench.speed import Plan

FIRST_PROMPT = 8  # tokens
STARTS = 4  # the first warms the page cache, and its time does not count
SLOW = 5.0  # seconds of loading, after which an engine is not started for its time again
BARE = "import sys, {}; print('ready', flush=True); sys.stdin.read()"


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """One engine. Bytes by tokens of the prompt: `peaks` resident at most since it was loaded, `caches` of keys and values.

    `bare` is a process that has imported torch, or for llama.cpp its package, and nothing else. `loading` is the peak until the
    engine was loaded. `load_seconds` and `first_seconds` (from loaded to the logits of 8 tokens) belong together, start by
    start, with the files in the page cache. `discarded` starts were disturbed.
    """

    engine: str
    weights: int | None
    bare: int
    loading: int
    peaks: dict[int, int]
    caches: dict[int, int]
    load_seconds: list[float]
    first_seconds: list[float]
    discarded: int = 0

    @property
    def first_token(self) -> float:
        """Return seconds from the call that loads to the first token, the median of the starts."""
        return statistics.median(map(sum, zip(self.load_seconds, self.first_seconds, strict=True)))

    @property
    def peak(self) -> int:
        """Return the most bytes that were resident at any prompt."""
        return max(self.peaks.values())

    def over_needed(self, prompt: int) -> float | None:
        """Return the peak over a bare process as a multiple of weights and caches; None where no weights are mapped."""
        return None if self.weights is None else (self.peaks[prompt] - self.bare) / (self.weights + self.caches[prompt])


def bare_memory(contender: Contender) -> int | None:
    """Return the resident bytes of a process of the engine's interpreter that holds no model."""
    python, module = (contender.program[0], MODULE) if contender.program else (sys.executable, "torch")
    with subprocess.Popen([python, "-c", BARE.format(module)], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        found = resident(process.pid)
        process.terminate()
    return found


def measure_footprint(contender: Contender, plan: Plan, cost: Cost, load: ForeignLoad) -> Footprint | None:
    """Start the engine, give it each prompt of the plan and let it decode after; then start it again for its time alone.

    `load` watches others while it starts: this process's own children are its own once they have ended.

    Returns None where the system does not tell memory. Raises UserError where the engine cannot run.
    """
    bare = bare_memory(contender)
    if bare is None:
        return None
    peaks, loads, firsts, discarded, threads = dict[int, int](), list[float](), list[float](), 0, plan.threads
    with Worker.of(contender, threads) as engine:
        loading = peak_resident(engine.process.pid) or 0
        if engine.implementations:
            engine.ask(do="choose", implementation=engine.implementations[0])
        reset_peak(engine.process.pid)  # where that is not allowed, the peak of loading is in what follows
        for prompt in [n for n in sorted(plan.prompts) if contender.spec.takes(n)] or [FIRST_PROMPT]:
            engine.ask(do="prefill", tokens=prompt)
            if prompt + plan.tokens <= plan.longest:
                engine.ask(do="decode", tokens=plan.tokens)
            peaks[prompt] = peak_resident(engine.process.pid) or 0
        slow = engine.ask(do="loaded")["seconds"] > SLOW

    def start() -> tuple[float, float]:
        with Worker.of(contender, threads) as engine:
            if engine.implementations:
                engine.ask(do="choose", implementation=engine.implementations[0])
            loaded, first = engine.ask(do="loaded"), engine.ask(do="prefill", tokens=FIRST_PROMPT)
            return float(loaded["seconds"]), float(first["seconds"])

    for _ in range(1 if slow else STARTS - 1):
        (loaded, first), disturbed = take_quietly(start, load)
        loads.append(loaded)
        firsts.append(first)
        discarded += disturbed
    return Footprint(
        engine=contender.spec.key,
        weights=contender.weights,
        bare=bare,
        loading=loading,
        peaks=peaks,
        caches={prompt: cost.cache_bytes(prompt + plan.tokens) for prompt in peaks},
        load_seconds=loads,
        first_seconds=firsts,
        discarded=discarded,
    )


def footprints(
    contenders: Sequence[Contender], plan: Plan, cost: Cost, progress: Progress
) -> tuple[list[Footprint], dict[str, str]]:
    """Measure one engine after the other; return what was found, and why an engine could not be measured."""
    found, missing = list[Footprint](), dict[str, str]()
    load = ForeignLoad(patience=plan.wait, processes=(os.getpid(),))
    for contender in contenders:
        progress(f"memory of {contender.spec.title}", None)
        try:
            if (one := measure_footprint(contender, plan, cost, load)) is not None:
                found.append(one)
        except UserError as error:
            missing[contender.spec.key] = str(error)
    return found, missing
