"""The benchmark of the ops alone, at a small shape."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from oxfuse.compiler.bench import kernels
from oxfuse.compiler.bench.kernels import Shape, measure_kernels
from oxfuse.runtime.machine import processors

SMALL = Shape(hidden=64, experts=4, top_k=2, heads=4, kv_heads=2, head_dim=16, vocabulary=100, context=40, prompt=20)


def test_every_op_is_held_against_what_the_machine_can_do() -> None:
    result = measure_kernels(SMALL, threads=1, rounds=2, cold=1 << 16)
    rows = {(row["name"], row["tokens"]): row for row in json.loads(result.to_json())["kernels"]}
    names = {name for name, _ in rows}
    assert names >= {"q, k, v, bfloat16", "head, int8 and activations", "MXFP4 experts", "attention, 40 keys"}
    assert all(len(row["samples"]) == 2 and min(row["samples"]) > 0 and row["floor"] > 0 for row in rows.values())
    # 2 of 4 experts of 3 * 64 * 64 values in 17 / 32 bytes each; one token does 2 operations a value
    experts = rows["MXFP4 experts", 1]
    assert experts["bytes"] == 2 * 3 * 64 * 64 * 17 // 32 and experts["operations"] == 2 * 2 * 3 * 64 * 64
    assert rows["MXFP4 experts", 20]["bytes"] == 2 * experts["bytes"]
    # 40 keys and values of 2 heads of 16 in bfloat16; 4 heads of queries meet each, twice
    attention = rows["attention, 40 keys", 1]
    assert attention["bytes"] == 40 * 2 * 2 * 16 * 2 and attention["operations"] == 4 * 4 * 16 * 40
    text = result.to_markdown()
    assert "| attention, 20 keys | 20 |" in text and "of the floor" in text


def test_it_takes_the_threads_that_it_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    class Told(Exception):
        pass

    def measure(shape: Shape, *, threads: int, rounds: int) -> None:
        raise Told(threads)

    monkeypatch.setattr(kernels, "measure_kernels", measure)
    for args, expected in (["--threads", "3"], 3), ([], processors().threads):
        assert CliRunner().invoke(kernels.main, args).exception.args == (expected,)
