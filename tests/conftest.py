"""What the whole suite shares: compiled artifacts, each compiled once in a run, since AOTInductor takes 20 seconds and more."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest

import oxfuse

from .parity.cases import CASES, NEOX_CASES, Case

BY_NAME = {case.name: case for case in [*CASES, *NEOX_CASES]}
Compiled = tuple[Case, Path, Path]


def pytest_configure() -> None:
    """Let commands take the signals that tests send: background jobs ignore interrupts, what `nohup` runs ignores hangups."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        signal.signal(signal.SIGHUP, lambda number, frame: None)  # children begin with the default, the suite itself goes on


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
