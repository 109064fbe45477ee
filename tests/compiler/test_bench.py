"""The speed benchmark: what it counts, how it judges a disturbed machine, and one run with both engines on a small model."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

import oxfuse
from oxfuse.compiler.bench.chart import draw_speed
from oxfuse.compiler.bench.cli import bench
from oxfuse.compiler.bench.cost import cost_of
from oxfuse.compiler.bench.probe import ForeignLoad, matmul_peak, read_bandwidth
from oxfuse.compiler.bench.speed import Figure, Plan, SpeedResult, fitted, measure_speed
from oxfuse.errors import UserError
from oxfuse.runtime.manifest import read_manifest


def result() -> SpeedResult:
    figures = [
        Figure(engine="oxfuse", phase="prefill", size=512, floor=0.002, samples=[0.005, 0.004, 0.006, 0.005], discarded=2),
        Figure(engine="transformers", phase="prefill", size=512, implementation="eager", floor=0.002, samples=[0.01] * 4),
        Figure(engine="oxfuse", phase="decode", size=1000, floor=0.01, samples=[0.02, 0.03, 0.04]),
    ]
    return SpeedResult(
        artifact="tiny",
        machine={"processor": "some (avx2)", "cores": 2, "torch": "2.13.0"},
        threads=2,
        bandwidth=20e9,
        peak=100e9,
        engines={"oxfuse": "oxfuse 0.1.0", "transformers": "transformers 5.23.0"},
        missing={"llama": "not installed"},
        agreement=0.9999,
        figures=figures,
    )


def test_table_states_median_floor_ratio_and_disturbance() -> None:
    text = result().to_markdown()
    assert "| prefill 512 | oxfuse 0.1.0 | 200.0 | 500.0 | 40% | 30% | 4 (2) | 2.00× |" in text
    assert "| prefill 512 | transformers 5.23.0 eager | 100.0 | 500.0 | 20% | 0% | 4 (0) |  |" in text
    assert "| decode at 1000 | oxfuse 0.1.0 | 33.3 | 100.0 | 33% | 0% | 3 (0) |  |" in text
    assert "llama was not measured: not installed" in text
    assert "2 samples were discarded" in text
    entry = json.loads(result().to_json())["figures"][0]
    assert entry["ratio"] == 2 and entry["samples"] == [0.005, 0.004, 0.006, 0.005]


def test_picture_is_drawn(tmp_path: Path) -> None:
    draw_speed(result(), tmp_path / "speed.png")
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match=r"cannot be drawn.*\.png"):
        draw_speed(result(), tmp_path / "speed.nothing")
    with pytest.raises(UserError, match="cannot be drawn"):
        draw_speed(result(), tmp_path / "no" / "speed.png")


def _spin(seconds: float) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def test_foreign_load_is_seen_and_own_load_is_not() -> None:
    own = ForeignLoad(processes=(os.getpid(),))
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy:
        try:
            both = ForeignLoad(processes=(os.getpid(), busy.pid))
            own.look()
            _spin(1.0)
            apart, together = own.look(), both.look()
        finally:
            busy.kill()
    assert apart is not None and together is not None
    assert apart - together > 0.3  # whatever else the machine does is in both; two cores may have three to serve


def test_probes_measure_something() -> None:
    assert 1e8 < read_bandwidth(1, rounds=1) < 1e13
    assert 1e8 < matmul_peak(1, size=256, rounds=1) < 1e14


def test_cost_counts_what_a_token_reads(compiled) -> None:
    case, _, artifact = compiled("mxfp4")
    manifest = read_manifest(artifact)
    cost, config = cost_of(manifest), manifest.model.config
    hidden, layers, experts = config["hidden_size"], config["num_hidden_layers"], config["num_local_experts"]
    heads, kv, dim = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    width, top = config["intermediate_size"], config["num_experts_per_tok"]
    attention = hidden * dim * (2 * heads + 2 * kv)
    assert cost.dense == layers * (attention + experts * hidden)
    assert cost.head == hidden * config["vocab_size"]
    # biases of experts are read with them
    assert cost.experts == layers * experts * (3 * hidden * width + 2 * width + hidden)
    assert cost.share == top / experts
    width_of = {"float32": 4, "bfloat16": 2}[manifest.model.dtype]
    assert cost.dense_bytes == width_of * (cost.dense + cost.head)
    assert cost.experts_bytes == layers * experts * (3 * hidden * width * 17 // 32 + width_of * (2 * width + hidden))
    both = [min(g.window, 1000) if g.window else 1000 for g in manifest.cache.groups]
    cached = sum(seen * len(g.layers) * 2 * kv * dim * width_of for seen, g in zip(both, manifest.cache.groups, strict=True))
    assert cost.decode_bytes(1000) == cost.dense_bytes + cost.share * cost.experts_bytes + cached
    assert cost.decode_bytes(1000, bfloat16=True) > 0
    one = cost.prefill_operations(1)
    assert one == 2 * (cost.dense + cost.share * cost.experts) + 2 * cost.head + 4 * heads * dim * layers
    assert cost.prefill_operations(100) > 99 * (one - 2 * cost.head)
    assert case.name == "mxfp4"


def test_run_with_both_engines(compiled, tmp_path: Path) -> None:
    _, checkpoint, artifact = compiled("base")
    plan = Plan(prompts=(20,), contexts=(30,), tokens=2, rounds=2, threads=1, wait=0)
    found = measure_speed(artifact, plan, checkpoint=checkpoint)
    assert [(f.engine, f.phase, len(f.samples)) for f in found.figures] == [
        (engine, phase, 2) for phase in ("prefill", "decode") for engine in ("oxfuse", "transformers")
    ]
    assert found.missing == {} and found.agreement is not None and found.agreement > 0.99
    assert all(f.implementation for f in found.figures if f.engine == "transformers")
    assert all(math.isfinite(f.rate) and f.floor > 0 for f in found.figures)


def test_a_peer_that_cannot_run_is_named(compiled, tmp_path: Path) -> None:
    _, _, artifact = compiled("base")
    plan = Plan(prompts=(4,), contexts=(4,), tokens=1, rounds=1, threads=1, wait=0)
    found = measure_speed(artifact, plan, checkpoint=tmp_path)
    assert "transformers" in found.missing and [f.engine for f in found.figures] == ["oxfuse"] * 2
    assert "transformers was not measured" in found.to_markdown()


def test_defaults_fit_the_artifact() -> None:
    plan = Plan(threads=1, tokens=8, rounds=5)
    assert fitted(plan, 131072, keep=()) == plan
    small = fitted(plan, 400, keep=())
    assert small.prompts == (400,) and small.contexts == (400 - 3 * 8 * 5,) and small.longest == 400
    assert fitted(plan, 400, keep=("prompts", "contexts")) == plan


def test_wrong_requests_are_refused(compiled, tmp_path: Path) -> None:
    _, _, artifact = compiled("base")
    longest = read_manifest(artifact).limits.max_context
    plan = Plan(threads=1)
    with pytest.raises(UserError, match=f"takes {longest}: choose smaller"):
        measure_speed(artifact, replace(plan, contexts=(longest,)))
    for change, message in (
        ({"rounds": 0}, "--rounds is 0"),
        ({"prompts": (0,)}, "--prompt is 0"),
        ({"threads": 0}, "--threads"),
    ):
        with pytest.raises(UserError, match=message):
            replace(plan, **change)
    for arguments, message in (
        ([str(artifact), "--peers"], "--peers needs the checkpoint"),
        (["--source", str(tmp_path)], "name the artifact"),
        (["--layers", "0", "--work", str(tmp_path)], "--layers is 0"),
    ):
        error = CliRunner().invoke(bench, arguments).exception
        assert isinstance(error, UserError) and message in str(error)
    (broken := tmp_path / "broken").mkdir()
    with pytest.raises(UserError):
        measure_speed(broken, plan)
    assert oxfuse.errors.UserError is UserError
