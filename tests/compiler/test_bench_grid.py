"""The grid of batches and sequences: its tables, what it does without memory or time, one run of each part on a small model."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from oxfuse.__main__ import run
from oxfuse.compiler.bench import grid
from oxfuse.compiler.bench.chart import draw_grid
from oxfuse.compiler.bench.cost import training_operations
from oxfuse.compiler.bench.grid import GridPlan, measure_grid
from oxfuse.compiler.bench.grid_result import Cell, GridResult, Series
from oxfuse.compiler.bench.random_checkpoint import write_checkpoint
from oxfuse.errors import UserError
from oxfuse.models.contract import flavour, lookup
from oxfuse.models.load import load_reference

SMALL = dict(hidden_size=32, num_attention_heads=2, intermediate_size=64, vocab_size=97)
PLAN = GridPlan(dtypes=("float32",), batches=(2,), sequences=(24,), tokens=3, rounds=2, threads=1, wait=0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("grid") / "checkpoint"
    write_checkpoint(folder, 2, **{**flavour("pythia-410m"), **SMALL})
    return folder


@pytest.fixture
def known_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The probes take seconds, and have a test of their own."""
    monkeypatch.setattr(grid, "read_bandwidth", lambda threads: 10e9)
    monkeypatch.setattr(grid, "matmul_peak", lambda threads, dtypes: 100e9)


def result() -> GridResult:
    def inference(decode: float, prefill: float, memory: int) -> Series:
        return Series(samples={"decode": [decode] * 3, "prefill": [prefill] * 3}, memory=memory)

    floors = {"decode": 0.005, "prefill": 0.1}
    full = Cell(part="inference", dtype="float32", batch=1, sequence=128, floors=floors, agreement=0.9999)
    full.series = {
        "eager": inference(0.02, 0.5, 900_000_000),
        "sdpa": inference(0.015, 0.6, 800_000_000),
        "oxfuse": inference(0.01, 0.25, 400_000_000),
        "oxfuse again": inference(0.0102, 0.25, 400_000_000),
    }
    large = Cell(part="training", dtype="float32", batch=4, sequence=2048, floors={"step": 50.0}, agreement=1e-6)
    without = Series(failure="RuntimeError: can't allocate memory", without_memory=True)
    large.series = {"eager": without, "sdpa": without, "oxfuse": Series(samples={"step": [60.0, 70.0]}, memory=9_000_000_000)}
    late = Cell(part="training", dtype="bfloat16", batch=4, sequence=2048, floors={"step": 50.0}, left_out=True)
    return GridResult(
        model="pythia-410m",
        plan={"threads": 2, "rounds": 3, "budget": 600.0},
        machine={"processor": "some (avx2)", "cores": 2, "torch": "2.13.0", "system": "Linux"},
        bandwidth=20e9,
        peaks={"float32": 100e9},
        names={"inference eager": "transformers 5.23.0", "inference oxfuse": "oxfuse 0.1.0"},
        missing={"sdpa (training, bfloat16)": "not supported"},
        cells=[full, large, late],
        seconds=590.0,
    )


def test_tables_have_medians_floors_speedups_memory_and_twins() -> None:
    text = result().to_markdown()
    assert "| 1 | 128 | 20.00 | 15.00 | 10.00 | 5.000 | 50.0 | 900.0 | 800.0 | 400.0 | 100.0 | 2.0 | 3 |" in text
    assert "| 1 | 128 | 0.5000 | 0.6000 | 0.2500 | 0.1000 | 100.0 | 900.0 | 800.0 | 400.0 | 100.0 | 0.0 | 3 |" in text
    assert "| 4 | 2048 | OOM | OOM | 65.00 | 50.00 | / | OOM | OOM | 9000 | oxfuse does not OOM | / | 2 |" in text
    assert "A/A of inference (decode): median 2.0%, at most 2.0%, over 1 cells." in text
    assert "Eager: more memory than the machine has (training float32 4 × 2048)." in text
    assert "Left out, for the budget of 600 s: training bfloat16 4 × 2048." in text
    assert "sdpa (training, bfloat16) was not measured: not supported" in text
    assert "correlate with the others' by 0.99990" in text and "differ from the others' by 1.0e-06" in text
    entry = json.loads(result().to_json())["cells"][0]
    assert entry["speedup"] == {"decode": 1.5, "prefill": 2.0} and entry["series"]["sdpa"]["samples"]["prefill"] == [0.6] * 3


def test_picture_is_drawn(tmp_path: Path) -> None:
    draw_grid(result(), tmp_path / "grid.png")
    assert (tmp_path / "grid.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match=r"cannot be drawn.*\.png"):
        draw_grid(result(), tmp_path / "grid.nothing")


def test_random_neox_checkpoint_is_whole_and_its_logits_vary(checkpoint: Path) -> None:
    model = load_reference(checkpoint)
    norms = {name: value for name, value in model.named_parameters() if "layernorm" in name}
    assert all((value.mean() > 0.5) == name.endswith("weight") for name, value in norms.items())
    logits = model(torch.arange(40)[None]).logits[0].detach()
    assert 0.5 < float(logits.std()) < 2 and len(logits.argmax(-1).unique()) > 10


def test_training_floor_counts_three_forwards() -> None:
    config = {**flavour("pythia-410m"), **SMALL, "num_hidden_layers": 3}
    matrices = 3 * (4 * 32 * 32 + 2 * 32 * 64) + 32 * 97
    attention = 3 * 4 * 32 * (10 * 11 / 2)
    assert training_operations(lookup("gpt_neox"), config, 10) == 3 * (2 * 10 * matrices + attention)


@pytest.mark.slow
def test_inference_of_three_contenders_and_the_twin(compiled, known_machine: None) -> None:
    _, folder, artifact = compiled("neox")
    found = measure_grid(replace(PLAN, parts=("inference",)), "tiny", folder, {"float32": artifact})
    (cell,) = found.cells
    assert found.missing == {} and [*cell.series] == ["eager", "sdpa", "oxfuse", "oxfuse again"]
    for series in cell.series.values():
        assert series.failure == "" and series.memory is not None and series.memory > 0
        assert {metric: len(values) for metric, values in series.samples.items()} == {"decode": 2, "prefill": 2}
    assert cell.agreement is not None and cell.agreement > 0.999
    assert all(floor > 0 for floor in cell.floors.values())
    assert all(math.isfinite(cell.speedup(name)) and cell.twins_differ(name) is not None for name in ("decode", "prefill"))
    with pytest.raises(UserError, match="The grid needs 9 sequences of 27 tokens"):
        plan = replace(PLAN, parts=("inference",), batches=(9,))
        measure_grid(plan, "tiny", folder, {"float32": artifact})


@pytest.mark.slow
def test_training_with_too_little_memory_and_too_little_time(
    checkpoint: Path, known_machine: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first cell fits; the last needs more memory than is allowed to it; a second run has no time at all."""
    monkeypatch.setattr(grid, "allowance", lambda: 128 << 20)
    plan = replace(PLAN, parts=("training",), batches=(1, 256), sequences=(256,), rounds=1, peers=("sdpa",), cell_seconds=1e-9)
    found = measure_grid(plan, "tiny", checkpoint, {})
    small, large = found.cells[0], found.cells[-1]
    assert (small.batch, large.batch) == (1, 256)
    assert not any(series.failure for series in small.series.values()) and small.rounds == 1
    assert small.agreement is not None and small.agreement < 1e-4 and small.twins_differ("step") is not None
    assert all(series.without_memory for series in large.series.values()) and large.speedup("step") is None
    assert "| 256 | 256 | / | OOM | OOM |" in found.to_markdown()
    late = measure_grid(replace(plan, budget=1e-3), "tiny", checkpoint, {})
    assert all(cell.left_out for cell in late.cells) and "Left out, for the budget" in late.to_markdown()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--grid", "--batch", "0"], "--batch is 0"),
        (["--grid", "--sequence", "-1"], "--sequence is -1"),
        (["--grid", "--rounds", "0"], "--rounds is 0"),
        (["--grid", "--dtype", "float16"], "--dtype is float16: give float32 or bfloat16"),
        (["--grid", "--budget", "0"], "--budget is 0"),
        (["--grid", "--cell-seconds", "0"], "--cell-seconds is 0"),
        (["--grid", "--budget", "nan"], "--budget is nan"),
        (["--grid", "--threads", "0"], "--threads is 0"),
        (["--grid", "--layers", "0"], "--layers is 0"),
        (["--grid", "--flavour", "pythia-9t"], "no model called"),
        (["--grid", "--no-training", "--no-inference"], "nothing to measure"),
        (["--grid", "--peers"], "--peers does not go with --grid"),
        (["--grid", "somewhere"], "DIR does not go with --grid"),
        (["--batch", "2"], "--batch is for --grid"),
    ],
)
def test_wrong_requests_are_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", *arguments]) == 2 and message in capsys.readouterr().err
