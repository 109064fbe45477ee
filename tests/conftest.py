"""What the whole suite shares: compiled artifacts, each compiled once in a run, since AOTInductor takes 20 seconds and more.

The library of C++ ops is the same in all of them, and is built once as well.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

import oxfuse
from oxfuse.compiler import programs
from oxfuse.passes.fusions.build import CpuKernel, OpsBuild, cached_ops

from .parity.cases import CASES, NEOX_CASES, Case

BY_NAME = {case.name: case for case in [*CASES, *NEOX_CASES]}
Compiled = tuple[Case, Path, Path]


def pytest_configure(config: pytest.Config) -> None:
    """Let commands take the signals that tests send: background jobs ignore interrupts, what `nohup` runs ignores hangups.

    Where workers share the processors, each of them uses one: threads of OpenMP that wait for each other would spin.
    """
    if config.getoption("numprocesses", None):
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the workers, which begin later
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        signal.signal(signal.SIGHUP, lambda number, frame: None)  # children begin with the default, the suite itself goes on


@pytest.fixture(scope="session")
def ops_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where libraries of C++ ops lie, for `cached_ops`: one for each content, flags and ISA level included."""
    return tmp_path_factory.mktemp("ops")


@pytest.fixture(scope="session", autouse=True)
def ops_are_built_once(ops_folder: Path) -> Iterator[None]:
    """Let compiles in this process copy the library that the first of them built."""

    def build(kernels: Iterable[CpuKernel], isa: str, out: Path, compiler: str = "g++") -> OpsBuild:
        made = cached_ops(kernels, isa, ops_folder, compiler)
        return dataclasses.replace(made, path=Path(shutil.copy(made.path, out)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(programs, "build_ops", build)
        yield


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Compiled]:
    """Return (case, checkpoint, artifact) of a configuration by its name."""
    made: dict[str, Compiled] = {}

    def get(name: str, **options: object) -> Compiled:
        key = f"{name} {sorted(options.items())}"
        if key not in made:
            place = tmp_path_factory.mktemp(name)
            folder = BY_NAME[name].write(place / "checkpoint")
            made[key] = BY_NAME[name], folder, oxfuse.compile(folder, place / "artifact", **options)
        return made[key]

    return get
