"""A compile that is killed, or meets another one, leaves the place as it was, or whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from ..checkpoints import random_gpt_oss
from .kills import kill_compiles, start_compile, whole

POINTS = 8  # of the 50 that `python -m tests.robustness.kills` runs, a quarter of an hour long


@pytest.mark.slow
def test_killed_compiles_leave_nothing_half(tmp_path: Path) -> None:
    killed = kill_compiles(POINTS, tmp_path)
    assert [fault for result in killed for fault in result.faults] == []
    assert sum(not result.finished for result in killed) >= POINTS // 2  # or nothing was killed


@pytest.mark.slow
def test_of_two_compiles_to_one_place_one_is_refused(tmp_path: Path) -> None:
    checkpoint = random_gpt_oss(tmp_path / "checkpoint", num_hidden_layers=2)
    (place := tmp_path / "place").mkdir()
    output = place / "artifact"
    compiles = [start_compile(checkpoint, output) for _ in range(2)]
    errors = [process.communicate()[1].decode() for process in compiles]
    assert sorted(process.returncode for process in compiles) == [0, 2], errors
    (refused,) = (error for process, error in zip(compiles, errors, strict=True) if process.returncode)
    assert refused.count("\n") == 1 and "Another compile (process" in refused and "Traceback" not in refused
    assert whole(output) is None
    assert [path.name for path in place.iterdir()] == ["artifact"]
