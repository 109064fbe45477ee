"""The root of the command line: its list, its errors and exit codes, completion, and what it must not cost."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import click
import pytest

from oxfuse import __main__ as command_line
from oxfuse.errors import InternalError, UserError
from oxfuse.runtime.help_page import HelpPage

from .runtime.commands import OXFUSE, finish, run, spawn

NAMES = list(command_line._COMMANDS)
HEAVY = ("torch", "numpy", "tqdm", "jinja2", "huggingface_hub", "tokenizers")


def command(name: str) -> click.Command:
    found = getattr(importlib.import_module(command_line._COMMANDS[name][0]), name)
    assert isinstance(found, click.Command)
    return found


@pytest.fixture
def fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[BaseException], object]:
    """Let `oxfuse inspect` raise an error; files for bug reports go to the test's folder."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def use(error: BaseException) -> None:
        @click.command()
        def inspect() -> None:
            raise error

        monkeypatch.setattr("oxfuse.runtime.cli.inspect", inspect)

    return use


def test_help_lists_every_command_and_imports_none() -> None:
    for args in ([], ["-h"], ["--help"]):
        ran = run(*args)
        assert ran.code == 0 and all(re.search(rf"^  {name} +\S", ran.out, re.MULTILINE) for name in NAMES)
    code = f"""
import sys
from oxfuse.__main__ import run
run(["--help"])
print([m for m in {HEAVY!r} if m in sys.modules], [m for m in sys.modules if m.startswith("oxfuse.") and "cli" in m])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[] []"
    assert run("--version").out.startswith("oxfuse, version ")


@pytest.mark.parametrize("name", NAMES)
def test_a_commands_help_needs_no_library_and_its_examples_work(name: str) -> None:
    found = command(name)
    assert isinstance(found, HelpPage) and found.examples, f"{name} has no examples"
    shown = run(name, "--help")
    assert shown.code == 0 and all(f"\n  {line}\n" in shown.out for line in found.examples)
    options = shown.out.partition(":\n  -")[2]
    assert not re.search(r"^  (DIR|SRC|SHELL|\[-\])\s", options, re.MULTILINE)  # arguments are told above, and are no options
    for line in found.examples:
        words = shlex.split(line, comments=True)
        at = next(i for i, word in enumerate(words) if "oxfuse" in word)
        if words[at] != "oxfuse":  # eval "$(oxfuse completion bash)"
            words, at = shlex.split(words[at].strip("$()")), 0
        args = words[at + 1 :]
        args = args[: next((i for i, word in enumerate(args) if word in ("|", ">", ">>", "&&", "<")), len(args))]
        assert args[0] == name
        context = command(name).make_context(name, args[1:])  # raises for an option that there is not
        context.close()


def test_help_pages_import_no_library() -> None:
    code = f"""
import sys
from oxfuse.__main__ import run
for name in {NAMES!r}:
    assert run([name, "--help"]) == 0
print([m for m in {HEAVY!r} if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["genrate"], "There is no command 'genrate'. Did you mean generate?"),
        (["zzz"], "Commands: compile, verify"),
        (["--versoin"], "--version"),
        (["inspect"], "Missing argument 'DIR'. See `oxfuse inspect --help`."),
        (["inspect", "a", "b"], "unexpected extra argument"),
        (["compile", "x"], "--output"),
        (["completion", "tcsh"], "'bash', 'zsh', 'fish'"),
    ],
)
def test_a_wrong_command_line_is_one_line(args: list[str], message: str) -> None:
    ran = run(*args)
    assert ran.code == 2 and message in ran.err and ran.err.startswith("oxfuse: error: ") and ran.err.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "code", "begin"),
    [
        (UserError("Two\nlines."), 2, "oxfuse: error: Two lines."),
        (OSError(28, "No space left on device", "x"), 2, "oxfuse: error: [Errno 28] No space left on device: 'x'"),
        (MemoryError(), 2, "oxfuse: error: This machine's memory"),
        (KeyboardInterrupt(), 130, ""),
        (InternalError("A graph broke."), 70, "oxfuse: internal error: A graph broke. This is a fault of oxfuse"),
        (ValueError("odd"), 70, "oxfuse: internal error: ValueError: odd. This is a fault of oxfuse"),
        (FileNotFoundError(2, "No such file"), 70, "oxfuse: internal error: FileNotFoundError"),
    ],
)
def test_errors_become_exit_codes(
    fails: Callable[[BaseException], object], tmp_path: Path, error: BaseException, code: int, begin: str
) -> None:
    fails(error)
    ran = run("inspect")
    assert ran.code == code and ran.out == ""
    if isinstance(error, KeyboardInterrupt):
        assert ran.err == "\noxfuse: interrupted\n"
    else:
        assert ran.err.startswith(begin) and ran.err.count("\n") == 1 and "Traceback" not in ran.err
    reports = list(tmp_path.iterdir())
    assert len(reports) == (code == 70)
    for report in reports:
        assert str(report) in ran.err
        text = report.read_text()
        assert "Traceback" in text and type(error).__name__ in text and text.startswith("oxfuse 0")


@pytest.mark.parametrize("how", ["option", "variable"])
def test_a_traceback_is_shown_on_request(
    fails: Callable[[BaseException], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    fails(ValueError("odd"))
    if how == "variable":
        monkeypatch.setenv("OXFUSE_TRACEBACK", "1")
    ran = run(*(["--traceback"] if how == "option" else []), "inspect")
    assert ran.code == 70 and "Traceback (most recent call last)" in ran.err and "raise error" in ran.err
    assert "report it with the traceback above" in ran.err and not list(tmp_path.iterdir())


def test_no_place_for_the_report(fails: Callable[[BaseException], object], monkeypatch: pytest.MonkeyPatch) -> None:
    fails(ValueError("odd"))
    monkeypatch.setattr(tempfile, "tempdir", "/nonexistent")
    assert "report it with what `oxfuse --traceback" in run("inspect").err


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, code in (("tqdm.auto", 2), ("oxfuse.runtime.nothing", 70)):

        def missing(module: str, name: str = name) -> object:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

        monkeypatch.setattr(command_line.importlib, "import_module", missing)
        ran = run("inspect")
        assert ran.code == code
        assert ("pip install tqdm" in ran.err) == (code == 2) and ran.err.count("\n") == 1
        assert run("--help").code == 0


def test_a_path_that_is_no_text(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path) + b"/\xff"
    done = subprocess.run([*OXFUSE, "inspect", folder], capture_output=True)
    assert done.returncode == 2 and b"does not exist" in done.stderr and b"Traceback" not in done.stderr


def complete(shell: str, *words: str) -> list[str]:
    """Ask as the shell's script does; an item a line, as the shell gets it."""
    variables = {"_OXFUSE_COMPLETE": f"{shell}_complete", "COMP_WORDS": shlex.join(words), "COMP_CWORD": str(len(words) - 1)}
    if shell == "fish":
        variables |= {"COMP_WORDS": " ".join(words), "COMP_CWORD": words[-1]}
    ran = finish(spawn(environment=variables))
    assert ran.code == 0 and ran.err == ""
    return ran.out.splitlines()


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (("oxfuse", ""), [f"plain,{name}" for name in NAMES]),
        (("oxfuse", "in"), ["plain,inspect"]),
        (("oxfuse", "generate", "/x"), ["dir,/x"]),
        (("oxfuse", "compile", "mod"), ["dir,mod"]),
        (("oxfuse", "compile", "x", "--cpu-isa", "x86"), ["plain,x86-64-v3", "plain,x86-64-v4"]),
        (("oxfuse", "compile", "x", "--dty"), ["plain,--dtype"]),
        (("oxfuse", "compile", "x", "-o", "ar"), ["dir,ar"]),
        (("oxfuse", "generate", "x", "--file", "pro"), ["file,pro"]),
        (("oxfuse", "generate", "x", "--top"), ["plain,--top-k", "plain,--top-p"]),
        (("oxfuse", "completion", "z"), ["plain,zsh"]),
        (("oxfuse", "--tra"), ["plain,--traceback"]),
    ],
)
def test_completion_in_bash(words: tuple[str, ...], offered: list[str]) -> None:
    assert complete("bash", *words) == offered


def test_completion_in_other_shells() -> None:
    assert complete("zsh", "oxfuse", "insp") == ["plain", "inspect", command_line._COMMANDS["inspect"][1]]
    assert complete("fish", "oxfuse", "insp") == ["plain,inspect\t" + command_line._COMMANDS["inspect"][1]]
    assert complete("zsh", "oxfuse", "generate", "/x") == ["dir", "/x", "_"]


def test_completion_imports_no_library() -> None:
    code = f"""
import os, sys
os.environ |= {{"_OXFUSE_COMPLETE": "bash_complete", "COMP_CWORD": "3"}}
for words in ("oxfuse compile x --exp", "oxfuse generate x --top", "oxfuse bench x --pe", "oxfuse chat x --sys"):
    os.environ["COMP_WORDS"] = words
    from oxfuse.__main__ import run
    try:
        run([])
    except SystemExit as exit_:
        assert exit_.code == 0
print([m for m in {HEAVY!r} if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]" and "--experts" in done.stdout


def test_the_completion_script_works_in_bash(tmp_path: Path) -> None:
    script = run("completion", "bash")
    assert script.code == 0 and script.err == ""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "oxfuse").write_text(f'#!/bin/sh\nexec {shlex.join(OXFUSE)} "$@"\n')
    (tmp_path / "bin" / "oxfuse").chmod(0o755)
    asked = script.out + '\nCOMP_WORDS=(oxfuse insp); COMP_CWORD=1; _oxfuse_completion oxfuse; echo "${COMPREPLY[@]}"'
    environment = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", asked], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == "inspect" and done.stderr == ""


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_the_other_scripts(shell: str) -> None:
    script = run("completion", shell)
    assert script.code == 0 and f"_OXFUSE_COMPLETE={shell}_complete" in script.out and script.err == ""
