"""Measures a grid of batches by sequences: ours beside transformers' eager and SDPA attention, inference and training.

In: a random checkpoint and its artifact for each dtype. Out: `grid_result.GridResult`. Every contender has a process of its own
(`grid_worker.py`) that lives through all cells of a part and dtype. Cells go from the cheapest to the dearest, turns from one
contender to the next, in the other direction every other round. How many rounds a cell gets follows from what its first costs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from oxfuse.compiler.bench.cost import cost_of, training_operations
from oxfuse.compiler.bench.grid_result import EAGER, INFERENCE, OURS, SDPA, TRAINING, TWIN, Cell, GridResult, Series
from oxfuse.compiler.bench.probe import ForeignLoad, matmul_peak, read_bandwidth
from oxfuse.compiler.bench.speed import correlation, machine_facts
from oxfuse.compiler.bench.worker_process import ATTEMPTS, Worker, take_quietly
from oxfuse.compiler.phases import Progress, silent
from oxfuse.errors import UserError
from oxfuse.models.checkpoint import Checkpoint
from oxfuse.runtime.machine import memory
from oxfuse.runtime.manifest import read_manifest

WORKER = "oxfuse.compiler.bench.grid_worker"
DTYPES = ("float32", "bfloat16")
BATCHES = (1, 2, 4)
SEQUENCES = (128, 256, 512, 1024, 2048)
LEAST_ROUNDS = 2
DEAR_ROUND = 60.0
"""Seconds. From here on the first round counts as one, and nothing is measured twice."""

DEAR_TURN = 10.0
"""Seconds. A longer turn that others disturbed is not taken again, only counted."""

MEMORY_SHARE = 0.8
"""What one contender may take of the memory that is available: others use the machine too."""


@dataclass(frozen=True, kw_only=True)
class GridPlan:
    """The cells and how long they may take.

    `peers`: of transformers' two attentions. `tokens` are decoded in a turn of inference, after the prefill. `budget`: seconds
    for the whole run, None without bounds. `cell_seconds`: what a cell's rounds may take together without a budget, if that is
    more than LEAST_ROUNDS; `rounds` bounds them as well. `wait` as in `speed.Plan`.
    """

    dtypes: tuple[str, ...] = DTYPES
    batches: tuple[int, ...] = BATCHES
    sequences: tuple[int, ...] = SEQUENCES
    parts: tuple[str, ...] = (INFERENCE, TRAINING)
    peers: tuple[str, ...] = (EAGER, SDPA)
    tokens: int = 16
    rounds: int = 7
    threads: int
    wait: float = 60.0
    budget: float | None = None
    cell_seconds: float = 60.0

    def __post_init__(self) -> None:
        counts = {"batch": self.batches, "sequence": self.sequences, "tokens": (self.tokens,), "rounds": (self.rounds,)}
        for name, values in counts.items():
            if any(value < 1 for value in values):
                raise UserError(f"--{name} is {min(values)}: give a number of at least 1.")
        if not 1 <= self.threads <= 1024:
            raise UserError(f"--threads is {self.threads}: give a number from 1 to 1024.")
        if unknown := [dtype for dtype in self.dtypes if dtype not in DTYPES]:
            raise UserError(f"--dtype is {unknown[0]}: give {' or '.join(DTYPES)}.")
        if not self.parts:
            raise UserError("--no-inference and --no-training leave nothing to measure: leave one of them out.")
        if self.budget is not None and not self.budget > 0:
            raise UserError(f"--budget is {self.budget:g}: give seconds, more than 0.")
        if not self.cell_seconds > 0:
            raise UserError(f"--cell-seconds is {self.cell_seconds:g}: give seconds, more than 0.")

    @property
    def longest(self) -> int:
        """Return the tokens of the longest sequence."""
        return max(self.sequences) + (self.tokens if INFERENCE in self.parts else 0)

    @property
    def count(self) -> int:
        """Return the number of cells."""
        return len(self.groups) * len(set(self.batches)) * len(set(self.sequences))

    @property
    def groups(self) -> list[tuple[str, str]]:
        """Return the parts and dtypes, each of which has its own processes."""
        return [(part, dtype) for part in self.parts for dtype in dict.fromkeys(self.dtypes)]


def allowance() -> int | None:
    """Return the bytes that one contender may take now; None where the system does not tell."""
    found = memory()
    return None if found is None else int(MEMORY_SHARE * min(found.available, found.usable))


def measure_grid(
    plan: GridPlan,
    model: str,
    checkpoint: Path,
    artifacts: Mapping[str, Path],
    *,
    began: float | None = None,
    progress: Progress = silent,
) -> GridResult:
    """Measure the grid on `checkpoint` and, for inference, on the artifact of each dtype in `artifacts`.

    `model` is what the result calls the model. `began`: `time.perf_counter()` where the budget begins, now by default. A
    contender that cannot run, or not in some cells, is named in the result with the reason. Raises UserError where an artifact is
    too small for the grid.
    """
    began = time.perf_counter() if began is None else began
    progress("probing the machine", None)
    bandwidth = read_bandwidth(plan.threads)
    single = matmul_peak(plan.threads, dtypes=(torch.float32,))
    peaks = {
        dtype: single if dtype == "float32" else max(single, matmul_peak(plan.threads, dtypes=(getattr(torch, dtype),)))
        for dtype in dict.fromkeys(plan.dtypes)
    }
    floors = {group: _floor(group, plan, checkpoint, artifacts, bandwidth, peaks[group[1]]) for group in plan.groups}
    grid = {
        (part, dtype): sorted(
            (
                Cell(part=part, dtype=dtype, batch=batch, sequence=sequence, floors=floors[part, dtype](batch, sequence))
                for batch in dict.fromkeys(plan.batches)
                for sequence in dict.fromkeys(plan.sequences)
            ),
            key=lambda cell: _weight(cell, plan),
        )
        for part, dtype in plan.groups
    }
    names: dict[str, str] = {}
    missing: dict[str, str] = {}
    groups = [*grid.items()]
    for number, ((part, dtype), cells) in enumerate(groups):
        now, end = time.perf_counter(), None
        if plan.budget is not None:
            share = _sum(cells, plan) / sum(_sum(others, plan) for _, others in groups[number:])
            end = now + share * (began + plan.budget - now)
            if end < now + LEAST_ROUNDS * _weight(cells[0], plan):  # not even the cheapest: no process need start
                for cell in cells:
                    cell.left_out = True
                continue
        with contextlib.ExitStack() as stack:
            contenders = {}
            for contender in (*plan.peers, OURS):
                progress(f"{part} {dtype}: starting {contender}", None)
                folder = artifacts[dtype] if (part, contender) == (INFERENCE, OURS) else checkpoint
                try:
                    one = _Contender(contender, folder, plan.threads, part, dtype)
                except UserError as error:
                    missing[f"{contender} ({part}, {dtype})"] = str(error)
                    continue
                stack.callback(one.close)
                contenders[contender] = one
                names[f"{part} {contender}"] = one.worker.name
            if contenders:
                _measure_cells(cells, contenders, plan, end, progress)
    return GridResult(
        model=model,
        plan=dataclasses.asdict(plan),
        machine=machine_facts(),
        bandwidth=bandwidth,
        peaks=peaks,
        names=names,
        missing=missing,
        cells=[cell for cells in grid.values() for cell in cells],
        seconds=time.perf_counter() - began,
    )


class _Contender:
    """A contender's process, begun anew after it died."""

    def __init__(self, *arguments: Any) -> None:
        """Start it. Raises UserError with the reason if it cannot run here."""
        self._arguments = arguments
        self.worker = self._start()

    def _start(self) -> Worker:
        contender, folder, threads, part, dtype = self._arguments
        return Worker(contender, folder, threads, part, dtype, module=WORKER)

    def turn(self, **request: Any) -> dict[str, Any]:
        """Take a turn. Raises UserError with the contender's own words if it cannot."""
        if self.worker.process.poll() is not None:
            self.worker.close()
            self.worker = self._start()
        return self.worker.ask(do="turn", allowance=allowance(), **request)

    def close(self) -> None:
        """End the process."""
        self.worker.close()


Floor = Callable[[int, int], dict[str, float]]


def _floor(
    group: tuple[str, str], plan: GridPlan, checkpoint: Path, artifacts: Mapping[str, Path], bandwidth: float, peak: float
) -> Floor:
    """Return the function that tells the floors of a cell, seconds by metric, from its batch and sequence."""
    part, dtype = group
    if part == TRAINING:
        source = Checkpoint.open(checkpoint)
        contract = source.contract()
        return lambda batch, sequence: {"step": batch * training_operations(contract, source.config, sequence) / peak}
    manifest = read_manifest(artifacts[dtype])
    limits, batch = manifest.limits, max(plan.batches)
    if plan.longest > limits.max_context or batch > limits.max_batch:
        raise UserError(
            f"The grid needs {batch} sequences of {plan.longest} tokens, the artifact takes {limits.max_batch} of "
            f"{limits.max_context}: choose smaller --batch, --sequence or --tokens."
        )
    cost = cost_of(manifest)
    return lambda batch, sequence: {
        "decode": cost.decode_bytes(sequence, batch=batch) / bandwidth,
        "prefill": batch * cost.prefill_operations(sequence) / peak,
    }


def _weight(cell: Cell, plan: GridPlan) -> float:
    """Return the least seconds of a turn."""
    return sum(seconds * (plan.tokens if metric == "decode" else 1) for metric, seconds in cell.floors.items())


def _sum(cells: list[Cell], plan: GridPlan) -> float:
    return sum(_weight(cell, plan) for cell in cells)


def _measure_cells(
    cells: list[Cell], contenders: dict[str, _Contender], plan: GridPlan, end: float | None, progress: Progress
) -> None:
    """Measure the cells of a part and dtype until `end`, by `time.perf_counter()`; None: all."""
    slowness = 1.0  # seconds of a round over those that the floors set
    for number, cell in enumerate(cells):
        seconds, floor = plan.cell_seconds, len(contenders) * _weight(cell, plan)
        if end is not None:
            left = end - time.perf_counter()
            if left < LEAST_ROUNDS * floor * slowness:
                cell.left_out = True
                continue
            seconds = left * _weight(cell, plan) / _sum(cells[number:], plan)
        progress(f"{cell.part} {cell.dtype} {cell.batch} × {cell.sequence}", number / len(cells))
        if found := _measure_cell(cell, contenders, plan, seconds):
            slowness = found / floor


def _measure_cell(cell: Cell, contenders: dict[str, _Contender], plan: GridPlan, seconds: float) -> float:
    """Fill the cell's series with as many rounds as `seconds` allow; return what one of all contenders takes.

    A first round finds what does not fit into memory, and warms the others up.
    """
    cell.series = {name: Series() for name in contenders}
    load = ForeignLoad(patience=plan.wait / plan.count, processes=())
    values: dict[str, dict[str, Any]] = {}

    def turn(name: str, attempts: int, check: bool = False) -> float:
        contender, series = contenders[OURS if name == TWIN else name], cell.series[name]
        load.processes = (os.getpid(), *(other.worker.process.pid for other in contenders.values()))
        request = dict(batch=cell.batch, sequence=cell.sequence, tokens=plan.tokens, check=check)

        def take() -> tuple[dict[str, Any], float]:
            began = time.perf_counter()
            return contender.turn(**request), time.perf_counter() - began

        try:
            (answer, took), disturbed = take_quietly(take, load, attempts)
        except UserError as error:
            series.failure, series.without_memory = str(error), "code -9" in str(error)  # the kernel's way to say so
            return 0.0
        if "no_memory" in answer:
            series.failure, series.without_memory = answer["no_memory"], True
            return 0.0
        for metric, value in answer["seconds"].items():
            series.samples.setdefault(metric, []).append(value)
        if answer["memory"] is not None:
            series.memory = max(series.memory or 0, answer["memory"])
        series.disturbed += disturbed
        values[name] = answer
        return took

    costs = {name: turn(name, 1, check=True) for name in contenders}
    cell.agreement = _agreement(cell.part, values)
    alive = [name for name in contenders if not cell.series[name].failure]
    if not alive:
        return 0.0
    once, done = sum(costs.values()), 1
    if once <= DEAR_ROUND:
        done = 0
        for series in cell.series.values():
            series.samples.clear()
            series.disturbed = 0
        if OURS in alive:
            cell.series[TWIN] = Series()
            alive = [*(name for name in alive if name != SDPA), *(name for name in alive if name == SDPA), TWIN]
            costs[TWIN] = costs[OURS]
    least, end = min(LEAST_ROUNDS, plan.rounds), time.perf_counter() + seconds
    rounds = max(least, min(plan.rounds, int(seconds / max(1e-9, sum(costs.values())))))
    for number in range(done, rounds):
        for name in alive if number % 2 == 0 else alive[::-1]:
            if not cell.series[name].failure:
                turn(name, 1 if costs[name] > DEAR_TURN or time.perf_counter() > end else ATTEMPTS)
        if number + 1 >= least and time.perf_counter() > end:
            break  # turns that were disturbed took their time as well
    return once


def _agreement(part: str, answers: Mapping[str, Mapping[str, Any]]) -> float | None:
    """Return how well ours agrees with the worst of the others: `Cell.agreement`."""
    peers = [answers[name] for name in (EAGER, SDPA) if name in answers]
    if OURS not in answers or not peers:
        return None
    ours = answers[OURS]
    if part == INFERENCE:
        return min(correlation(ours["logits"], peer["logits"]) for peer in peers)
    return float(max(abs(ours["loss"] / peer["loss"] - 1) for peer in peers))
