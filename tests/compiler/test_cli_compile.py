"""`oxfuse compile` and `quickstart`: what they print, what they pass on, what they leave behind, and what they never replace."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import pty
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from oxfuse.compiler import choices, options
from oxfuse.compiler.artifact import ArtifactWriter
from oxfuse.errors import UserError
from oxfuse.runtime.manifest import read_manifest

from ..runtime.commands import finish, run, spawn

BUNDLED = Path(str(files("oxfuse.artifacts") / "tiny-gpt-oss"))


@pytest.fixture
def pretend(compiled: Callable[..., tuple], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Let a compile copy an artifact that is there, and note how it was called."""
    _, _, artifact = compiled("base")
    called: dict[str, Any] = {}

    def compile(source: object, output: Path, *, progress: Callable[..., None], force: bool, **others: object) -> Path:
        called.update(source=source, output=output, force=force, **others)
        progress("export and fuse", None)
        progress("write weights", 0.5)
        with ArtifactWriter(output, force=force) as folder:
            shutil.copytree(artifact, folder, dirs_exist_ok=True)
        return output.resolve()

    monkeypatch.setattr("oxfuse.compiler.pipeline.compile", compile)
    return called


def test_the_result_is_told(pretend: dict[str, Any], tmp_path: Path) -> None:
    output = tmp_path / "made"
    ran = run("compile", "org/name@main", "-o", output, "--max-context", "64", "--cpu-isa", "x86-64-v3", "--dtype", "float32")
    assert ran.code == 0 and ran.err == ""  # no progress where no terminal is
    first, passes, parity, report = ran.out.splitlines()[:4]
    assert first.startswith(f"{output}  (") and " moe_dispatch, " in passes
    assert parity.startswith("Against the float32 reference: RMS error ") and report == f"Report: {output / 'report.md'}"
    assert pretend == dict(
        source="org/name@main",
        output=output,
        force=False,
        target="cpu",
        dtype="float32",
        task=None,
        max_context=64,
        max_batch=8,
        tokenizer=None,
        cpu_isa="x86-64-v3",
        experts="exact",
        activations="exact",
        dense="exact",
        provider="cpu",
        dump_graphs=None,
        emit_example=None,
    )


def test_what_is_told_is_the_task_s_own(
    pretend: dict[str, Any], compiled: Callable[..., tuple], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = read_manifest(compiled("base")[2])
    for task, labels, words, trial in (
        ("text-generation", (), ", same best token in 100% of ", "generate DIR -p 'Once upon a time'"),
        ("token-classification", ("A", "B"), ", same best label in 100% of ", "tag DIR -p 'Ada Lovelace lived in London.'"),
        ("question-answering", (), ", over ", "answer DIR -p 'Since when?' --context 'It opened in 1884.'"),
    ):
        model = dataclasses.replace(manifest.model, task=task, labels=labels)
        told = dataclasses.replace(manifest, model=model, tokenizer_files={"tokenizer.json": ""})
        monkeypatch.setattr("oxfuse.compiler.cli.read_manifest", lambda folder, told=told: told)
        folder = tmp_path / f"made {task}"
        *_, parity, _, last = run("compile", "org/name", "-o", folder).out.splitlines()
        assert words in parity and ("best" in parity) == (", over" not in words) and parity.endswith(" rows.")
        assert last == "Try: oxfuse " + trial.replace("DIR", f"'{folder}'")


def test_json_is_the_report_alone(pretend: dict[str, Any], tmp_path: Path) -> None:
    ran = run("compile", "x", "-o", tmp_path / "made", "--json")
    assert ran.code == 0 and ran.err == ""
    assert json.loads(ran.out) == json.loads((tmp_path / "made" / "report.json").read_text())


def test_progress_shows_at_a_terminal_and_is_gone_at_the_end(tmp_path: Path) -> None:
    code = "import time; from oxfuse.runtime.progress import PhaseLine\nwith PhaseLine() as line:\n"
    code += " line('export', None); time.sleep(2.3); line('write', 0.1); time.sleep(0.2); line('write', 0.5)"
    parent, child = pty.openpty()
    subprocess.run([sys.executable, "-c", code], stderr=child, stdout=child, check=True)
    os.close(child)
    seen = b""
    while True:
        try:
            seen += os.read(parent, 4096)
        except OSError:
            break
    os.close(parent)
    text = seen.decode()
    assert "export [00:00]" in text and "export [00:01]" in text and "write  50% |" in text
    *_, last, end = text.split("\r")
    assert last.strip() == end == "" and "\n" not in text  # wiped, and the next line begins where it was


def test_names_of_choices_are_those_of_the_options() -> None:
    for name, words in choices.POLICIES.items():
        with pytest.raises(UserError, match=", ".join(words)):
            options.CompileOptions(**{name: "nothing"})
    for dtype in choices.DTYPE_NAMES:
        if dtype != "float16":
            assert options.CompileOptions(dtype=dtype).dtype == dtype
    with pytest.raises(UserError, match="targets: cpu"):
        options.CompileOptions(target="tpu")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nowhere"], "There is no folder nowhere"),
        ([str(BUNDLED), "--target", "tpu"], "target 'tpu' is not a target; targets: cpu"),
        ([str(BUNDLED), "--target", "cuda:sm_70"], "not built by this version"),
        ([str(BUNDLED), "--target", "onnx", "--dtype", "bfloat16"], "dtype bfloat16 is not supported by target onnx"),
        ([str(BUNDLED), "--dtype", "int3"], "dtype 'int3'"),
        ([str(BUNDLED), "--cpu-isa", "mmx"], "cpu_isa is 'mmx'"),
        ([str(BUNDLED), "--experts", "int8"], "not available"),
        ([str(BUNDLED), "--max-context", "0"], "max_context is 0"),
        ([str(BUNDLED), "--max-context", "5000"], "the model reaches 1024"),
        ([str(BUNDLED), "--tokenizer", "nowhere"], "nowhere"),
    ],
)
def test_what_a_user_gets_wrong_is_one_line(tmp_path: Path, args: list[str], message: str) -> None:
    ran = run("compile", *args, "-o", tmp_path / "made")
    assert ran.code == 2 and message in ran.err and ran.err.count("\n") == 1 and not list(tmp_path.iterdir())


def test_a_folder_of_someone_else_is_never_replaced(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    for content in ('{"manifest_version": 3, "name": "a browser extension"}', "not JSON"):
        (mine / "manifest.json").write_text(content)
        ran = run("compile", BUNDLED, "-o", mine, "--force")
        assert ran.code == 2 and "not an oxfuse artifact" in ran.err
        assert (mine / "manifest.json").read_text() == content and [p.name for p in tmp_path.iterdir()] == ["mine"]


def test_quickstart_replaces_its_own_artifact_only(
    pretend: dict[str, Any], compiled: Callable[..., tuple], tmp_path: Path
) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "notes").write_text("mine")
    precious = Path(shutil.copytree(compiled("base")[2], tmp_path / "precious"))
    for folder in (mine, precious, mine / "notes"):
        ran = run("quickstart", "-o", folder)
        assert ran.code == 2 and "an earlier quickstart did not make it" in ran.err and not pretend
    assert (mine / "notes").read_text() == "mine" and (precious / "manifest.json").exists()
    manifest = json.loads((precious / "manifest.json").read_text())
    manifest["source"]["config_sha256"] = hashlib.sha256((BUNDLED / "config.json").read_bytes()).hexdigest()
    (precious / "manifest.json").write_text(json.dumps(manifest))
    run("quickstart", "-o", precious)
    assert pretend["force"] is True
    (tmp_path / "empty").mkdir()
    run("quickstart", "-o", tmp_path / "empty")
    assert pretend["force"] is False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, pytest.param(signal.SIGHUP, marks=pytest.mark.slow)])
def test_a_compile_that_is_ended_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    process = spawn("compile", BUNDLED, "-o", "deep/made", cwd=tmp_path, start_new_session=True)
    until = time.monotonic() + 120
    while not list(tmp_path.glob("deep/.made.partial/made/*")):
        assert process.poll() is None and time.monotonic() < until, finish(process)
        time.sleep(0.05)
    time.sleep(1)  # into the export
    os.killpg(process.pid, number)
    ran = finish(process)
    assert ran.code == (130 if number == signal.SIGINT else 128 + number), ran
    assert ran.out == "" and ran.err == ("\noxfuse: interrupted\n" if number == signal.SIGINT else "")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("lost", [True, False])
def test_a_signal_that_torch_takes_for_an_error_ends_the_compile(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, number: signal.Signals, lost: bool
) -> None:
    def compile(source: object, output: Path, *, progress: Callable[..., None], **others: object) -> Path:
        with contextlib.suppress(BaseException):
            signal.raise_signal(number)
        if lost:
            progress("export and fuse", None)
            raise AssertionError("The compile goes on.")
        raise RuntimeError("torch/csrc: an error in a callback")

    monkeypatch.setattr("oxfuse.compiler.pipeline.compile", compile)
    before = signal.getsignal(number)
    if number == signal.SIGINT:
        assert run("compile", BUNDLED, "-o", tmp_path / "made").code == 130
    else:
        with pytest.raises(SystemExit, match="143"):
            run("compile", BUNDLED, "-o", tmp_path / "made")
    assert signal.getsignal(number) == before


@pytest.mark.slow
def test_quickstart(tmp_path: Path) -> None:
    ran = finish(spawn("quickstart", "-n", "20", cwd=tmp_path))
    assert ran.code == 0 and ran.err == ""
    for word in (
        "Compiling tiny-gpt-oss",
        "Verified",
        "def read_file(path):",
        "20 tokens at",
        "oxfuse generate tiny-gpt-oss-cpu -p",
    ):
        assert word in ran.out
    assert [path.name for path in tmp_path.iterdir()] == ["tiny-gpt-oss-cpu"]
    (line,) = (line for line in ran.out.splitlines() if line.startswith("  oxfuse generate"))
    assert finish(spawn(*shlex.split(line)[1:], "-n", "4", cwd=tmp_path)).code == 0
