"""Runs commands as a user does: in this process for speed, in one of their own where signals and pipes are what is tested."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from click.testing import CliRunner

from oxfuse import __main__ as command_line

OXFUSE = (sys.executable, "-m", "oxfuse")


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str


def run(*args: str | Path, stdin: str | bytes = "") -> Ran:
    """Run a command line in this process, errors turned into exit codes as the program does."""
    codes: list[int] = []
    runner = CliRunner()
    with runner.isolation(stdin) as (out, err, *_):
        codes.append(command_line.run([str(arg) for arg in args]))
    return Ran(codes[0], out.getvalue().decode(), err.getvalue().decode())


def spawn(*args: str | Path, environment: dict[str, str] | None = None, **options: Any) -> subprocess.Popen[bytes]:
    """Start a command in a process of its own."""
    pipes: dict[str, Any] = dict(stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    return subprocess.Popen([*OXFUSE, *map(str, args)], env=os.environ | (environment or {}), **(pipes | options))


def finish(process: subprocess.Popen[bytes]) -> Ran:
    out, err = process.communicate(timeout=120)
    return Ran(process.returncode, (out or b"").decode(), (err or b"").decode())
