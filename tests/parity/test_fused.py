"""Float32 parity of the fused graph with transformers, for every configuration."""

from __future__ import annotations

import pytest

from .cases import CASES, NEOX_CASES, Case, assert_logits, assert_parity
from .fused import fused_model

ALWAYS = {"neox", "sequential", "odd_part_turns", "yarn", "tied_neox"}
SELDOM = [pytest.param(case, marks=() if case.name in ALWAYS else pytest.mark.slow) for case in NEOX_CASES]


@pytest.mark.parametrize("case", [*CASES, *SELDOM], ids=lambda case: case.name)
def test_fused_graph_equals_transformers(case: Case, ops, tmp_path):
    folder = case.write(tmp_path / "checkpoint")
    assert_parity(fused_model(folder, ops), case.transformers(folder, tmp_path / "theirs"), case, folder)


@pytest.mark.parametrize("case", [CASES[0], CASES[11], NEOX_CASES[6]], ids=lambda case: case.name)
def test_the_reference_ops_do_so_too(case: Case, tmp_path):
    folder = case.write(tmp_path / "checkpoint")
    assert_logits(fused_model(folder), case.transformers(folder, tmp_path / "theirs"), case)
