"""The report says what is so, reads well as plain text, and never passes silence off as a measurement."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from oxfuse.compiler.report import MemoryReport, Parity, ProgramReport, Report, write_report
from oxfuse.runtime.manifest import Limits, ModelSpec, PassRecord, Requirements

PARITY = {"rows": 32, "rms": 1.25e-3, "max": 2e-2, "top1": 31 / 32, "reference_rms": 0.5, "reference_max": 4.0}
REPORT = Report(
    name="tiny",
    created_by={"oxfuse": "0.1.0", "torch": "2.13.0"},
    source={"kind": "hub", "name": "org/tiny", "revision": "abc"},
    model=ModelSpec(model_type="gpt_oss", task="text-generation", dtype="bfloat16", vocab_size=211, config={}),
    limits=Limits(max_context=131072, max_batch=8, max_step_tokens=8192),
    programs=(
        ProgramReport(name="step", target="cpu", bytes=1_234_567, ops={"aten::linear": 13, "oxfuse::rms_norm": 7}),
        ProgramReport(name="a|b", target="cpu", bytes=999, ops={}),
    ),
    sizes={"programs": 1_235_566, "weights": 2_500_000_000, "other": 12_000},
    passes=(
        PassRecord(name="drop_noops", count=1029, checked=0, max_error=None),
        PassRecord(name="rms_norm", count=7, checked=2, max_error=3.2e-7),
        PassRecord(name="rotary", count=3, checked=1, max_error=0.0),
    ),
    seconds={"export and fuse": 30.0, "compile program": 90.0},
    memory=MemoryReport(anonymous_and_shared=700_000_000, file_backed=3_100_000_000),
    parity=Parity(**PARITY),
    numerics={"experts": "exact: the checkpoint's own values"},
    requirements=Requirements(
        torch="2.13",
        platform="linux",
        machine="x86_64",
        cpu_isa="x86-64-v3",
        cpu_features=("avx2", "fma"),
        glibc="2.28",
        gpu_archs=(),
    ),
    notes=("rope_scaling: null means YaRN with its defaults.",),
)


def test_both_files(tmp_path: Path) -> None:
    write_report(tmp_path, REPORT)
    told = json.loads((tmp_path / "report.json").read_text())
    assert told["parity"] == {**PARITY, "reason": None, "kl": None, "own_rms": None, "own_max": None, "note": None}
    assert told["seconds"] == REPORT.seconds
    assert told["passes"][0]["max_error"] is None
    assert (tmp_path / "report.md").read_text() == REPORT.to_markdown()


def test_text_tells_everything() -> None:
    text = REPORT.to_markdown()
    for words in (
        "# tiny",
        "oxfuse 0.1.0, torch 2.13.0",
        "131,072 tokens",
        "| accuracy       | RMS error 0.25% of the reference's, best token the same in 96.9%",
        "| size           | 2.5 GB: programs 1.2 MB, weights 2.5 GB, other 12.0 kB",
        "| runs on        | torch 2.13, linux on x86_64 (x86-64-v3), glibc 2.28 or later",
        "| compiling took | 120 s, 700 MB of memory",
        "oxfuse generate . -p",
        "32 rows of logits",
        "| RMS     |          0.00125 |       0.5 | 0.25% |",
        "| largest |             0.02 |         4 |  0.5% |",
        "best token is the same in 96.9% of the rows",
        "| drop_noops |    1,029 |        – |             – |",
        "| rms_norm   |        7 |        2 |       3.2e-07 |",
        "| rotary     |        3 |        1 |             0 |",
        "| step    | cpu    | 1.2 MB |",
        "- step calls 7 oxfuse::rms_norm, 13 aten::linear",
        "- a|b calls nothing",
        "| compile program |  90.0 s |   75% |",
        "700 MB anonymous and shared",
        "3.1 GB of mapped files",
        "| weights  |  2.5 GB |",
        "| together |  2.5 GB |",
        "- experts: exact: the checkpoint's own values",
        "- torch 2.13",
        "- linux on x86_64 (x86-64-v3)",
        "- glibc 2.28 or later",
        "- processor flags avx2, fma",
        "- name: org/tiny",
        "- revision: abc",
        "- rope_scaling: null means YaRN with its defaults.",
    ):
        assert words in text, text


def test_what_could_not_be_measured_has_a_reason() -> None:
    parity = Parity(rows=0, reason="it does not run here: the processor lacks avx512f.")
    report = dataclasses.replace(REPORT, parity=parity, memory=None)
    text = report.to_markdown()
    assert "Not measured: it does not run here: the processor lacks avx512f." in text
    assert "oxfuse verify" in text
    assert "Peak memory" not in text
    assert json.loads(report.to_json())["parity"]["rms"] is None
    assert "| accuracy       | not measured, see below" in text
    for wrong in ({"rms": 1.0, "reason": "why"}, {"rms": 1.0}, {}):
        with pytest.raises(AssertionError):
            Parity(rows=1, **wrong)


def test_tables_are_aligned_and_escape_bars() -> None:
    lines = REPORT.to_markdown().splitlines()
    for i, line in enumerate(lines):
        if line.startswith("|") and lines[i - 1].startswith("|"):
            assert len(line) == len(lines[i - 1])
            assert line.replace("\\|", "").count("|") == lines[i - 1].replace("\\|", "").count("|")


def test_nothing_to_tell_is_no_crash() -> None:
    text = dataclasses.replace(REPORT, programs=(), passes=(), seconds={}, sizes={}, numerics={}).to_markdown()
    assert "## Passes" in text
