"""The GPU report's own logic, without a GPU: budget, failures, writing, and that what is made from a seed is always the same."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from . import processes, report
from .checkout import ROOT, command
from .document import FAILED, RAN, SKIPPED, Document, ItemResult, Row, SectionResult, shown, table


def make(
    tmp_path: Path, *names: str, budget: float = 100.0, said: list[str] | None = None
) -> tuple[Document, dict[str, Any], str]:
    """Make a report of fake sections; return it, and what was written as JSON and as Markdown."""
    work, out = tmp_path / "work", tmp_path / "out"
    work.mkdir()
    document = report.make_report(
        "tests.gpu.fakes",
        names,
        budget,
        out,
        work,
        file_name="fake",
        header={"GPU": "none", "commit": "0123"},
        say=(said if said is not None else []).append,
    )
    return document, json.loads((out / "fake.json").read_text()), (out / "fake.md").read_text()


def statuses(data: dict[str, Any], section: str) -> dict[str, str]:
    (found,) = (part for part in data["sections"] if part["name"] == section)
    return {item["name"]: item["status"] for item in found["items"]}


def test_rows_facts_and_notes_arrive(tmp_path: Path) -> None:
    document, data, text = make(tmp_path, "good")
    assert document.ended and data["ended"] and statuses(data, "good") == {"rows": RAN, "nothing": RAN}
    assert data["facts"] == {"bandwidth": 4.2} and "- A note." in text
    assert data["counts"] == {"ran": 2, "failed": 0, "skipped": 0, "passed": 1, "missed": 1}
    assert data["faults"] == ["good: second: not ≥ 0.4"] and "**FAIL**" in text and "first \\| one" in text
    assert data["sections"][0]["items"][0]["rows"][2]["cells"]["value"] is None, "JSON knows no NaN"


def test_a_failure_leaves_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "LEAST_LIMIT", 1.0)
    said: list[str] = []
    document, data, text = make(tmp_path, "good", "bad", "broken", "long", said=said)
    assert statuses(data, "bad") == {
        "raises": FAILED,
        "breaks the GPU": FAILED,
        "dies": FAILED,
        "hangs": FAILED,
        "comes after": RAN,
    }
    errors = {item["name"]: item["error"] for item in data["sections"][1]["items"]}
    assert errors["raises"].endswith("ValueError: this item fails") and "in raises" in errors["raises"]
    assert "illegal memory access" in errors["breaks the GPU"]
    assert "died of signal 11" in errors["dies"] and "ran for more than 1 s" in errors["hangs"]
    before = [row for item in data["sections"][1]["items"] for row in item["rows"] if row["table"] == "Before"]
    assert len(before) == 2, "rows before a failure are kept"
    (after,) = data["sections"][1]["items"][4]["rows"]
    assert after["cells"]["fact"] == 4.2 and after["cells"]["fresh"], "a new process, which knows what the first measured"
    assert statuses(data, "broken") == {"import": FAILED} and "no_such_module" in text
    assert statuses(data, "long") == {"an hour": SKIPPED, "an instant": RAN}
    assert "Skipped (no time left): an hour." in text and "about 3600 s" in text
    (instant,) = data["sections"][3]["items"][1]["rows"]
    assert instant["cells"]["fresh"] and instant["cells"]["prepared"]
    assert document.ended and len(said) == 9 and "raises: failed in" in said[2]


def test_nothing_is_begun_without_time(tmp_path: Path) -> None:
    _, data, text = make(tmp_path, "good", "bad", budget=0.0)
    assert set(statuses(data, "good").values()) | set(statuses(data, "bad").values()) == {SKIPPED}
    assert "5 skipped" not in text and data["counts"]["skipped"] == 7


def test_what_was_found_is_written_after_each_item(tmp_path: Path) -> None:
    seen = []

    class Watching(list[str]):
        def append(self, line: str) -> None:
            seen.append(statuses(json.loads((tmp_path / "out" / "fake.json").read_text()), "good"))

    make(tmp_path, "good", said=Watching())
    assert seen == [{"rows": RAN}, {"rows": RAN, "nothing": RAN}]


def test_a_report_that_is_cut_off_leaves_what_it_had(tmp_path: Path) -> None:
    """In a process of its own: ended by a signal while an item hangs."""
    code = (
        "import importlib, sys; from pathlib import Path; report = importlib.import_module('tests.gpu.report');"
        f"report.make_report('tests.gpu.fakes', ['good', 'bad'], 100.0, Path({str(tmp_path / 'out')!r}), Path({str(tmp_path)!r}),"
        " file_name='fake', header={}, say=lambda line: print(line, flush=True))"
    )
    written = tmp_path / "out" / "fake.json"
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        until = time.monotonic() + 30
        while not written.exists() or '"hangs"' not in written.read_text():
            assert time.monotonic() < until and process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        process.wait(30)
    data = json.loads((tmp_path / "out" / "fake.json").read_text())
    assert not data["ended"] and statuses(data, "good")["rows"] == RAN
    hanging = data["sections"][1]["items"][3]
    assert hanging["name"] == "hangs" and "cut off" in hanging["error"]
    assert "It was cut off" in (tmp_path / "out" / "fake.md").read_text()


def test_a_worker_that_does_not_start_is_an_error(tmp_path: Path) -> None:
    workers = processes.Workers("tests.gpu.nothing_of_this_name", ["good"], tmp_path)
    with pytest.raises(RuntimeError, match="nothing_of_this_name"):
        workers.listing()


def test_tables_are_aligned() -> None:
    lines = [*table(["name", "µs"], [["a", 1.5], ["a | longer name", 12345678.9]])]
    assert len({len(line) for line in lines}) == 1
    assert lines[1] == "| ---------------- | --------: |" and lines[2].startswith("| a                |")
    assert [shown(value) for value in (None, True, 1234567, 0.123456, 4567.8, 1e-7, "x\ny")] == [
        "", "yes", "1,234,567", "0.1235", "4,568", "1e-07", "x y",
    ]  # fmt: skip


def test_a_document_without_sections_can_be_read() -> None:
    text = Document(header={"GPU": "x"}, budget=5).to_markdown()
    assert text.startswith("# GPU report\n") and "cut off" in text
    section = SectionResult(name="a", title="A", items=[ItemResult(name="b", status=FAILED, rows=[Row(table="", cells={})])])
    assert "it said nothing" in Document(header={}, sections=[section]).to_markdown()


def test_without_a_gpu_one_line_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    if not report.missing():
        pytest.skip("there is a GPU here")
    assert report.main(["--out", str(tmp_path / "out")]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("No GPU report can be made here: ") and printed.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main(["--list"]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert names == ["environment", "kernels", "shipped", "capture", "timing", "memory", "tuning"]
    assert report.main(["--sections", "kernels,nothing"]) == 2 and "no section nothing" in capsys.readouterr().err


def test_it_runs_by_its_path_too() -> None:
    """As on a machine where oxfuse is not installed and some package is called `tests`."""
    code = f"import sys; sys.argv = {command('report', '--list')[1:]!r}; sys.path.insert(0, {str(ROOT / 'tests' / 'gpu')!r})"
    code += "; import runpy, types; sys.modules['tests'] = types.ModuleType('tests')"
    code += "; runpy.run_path(sys.argv[0], run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("environment"), done.stderr
