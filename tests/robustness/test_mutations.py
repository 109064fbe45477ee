"""Mutated configurations, indexes, headers, tokenizers and manifests: success or a UserError, whatever the bytes are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .campaign import run_mutants
from .subjects import SUBJECTS, prepare, subject_of

FEW, MANY = 200, 2000


@pytest.fixture(scope="module")
def base(compiled: Callable[..., tuple[Any, Path, Path]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    prepare(place := tmp_path_factory.mktemp("mutants") / "base", compiled("mxfp4")[2])
    return place


@pytest.mark.parametrize("seeds", [range(FEW), pytest.param(range(FEW, MANY), marks=pytest.mark.slow)], ids=["few", "many"])
def test_mutants(seeds: range, base: Path, tmp_path: Path) -> None:
    outcomes = list(run_mutants(seeds, base, tmp_path / "work"))
    faults = [f"{outcome.seed} ({subject_of(outcome.seed)}): {outcome.text}" for outcome in outcomes if outcome.fault]
    assert not faults, f"{len(faults)} of {len(outcomes)}; run them alone with tests.robustness.campaign:\n" + "\n".join(faults)
    refused = Counter(subject_of(outcome.seed) for outcome in outcomes if outcome.text.startswith("refused"))
    assert all(refused[subject] > len(seeds) / len(SUBJECTS) / 3 for subject in SUBJECTS), refused  # or nothing was mutated
