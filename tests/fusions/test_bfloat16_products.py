"""The path for processors that multiply bfloat16, run anywhere: the one instruction is emulated, all around it is as it ships."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from oxfuse.passes.fusions.build import OpsBuild, load_ops
from oxfuse.passes.fusions.contract import OpCase
from oxfuse.passes.fusions.moe_dispatch.cases import CASES
from oxfuse.passes.fusions.sink_attention.cases import CASES as ATTENTION
from oxfuse.runtime.machine import cpu_features

from .test_build import assert_cuts_do_not_matter, assert_nan_stays
from .test_contract import assert_rounds_once, assert_same_for_threads

TOLERANCE = 2.0**-8  # of the largest result: its own rounding, and that of the hidden values


@pytest.fixture(scope="module")
def emulated(build_with: Callable[..., OpsBuild]) -> OpsBuild:
    made = build_with("x86-64-v4", "-DOXFUSE_EMULATE_BF16", ops=("oxfuse::moe_dispatch", "oxfuse::sink_attention"))
    load_ops(made)
    return made


OURS = [case for case in CASES if case.op == "oxfuse::moe_dispatch" and "cpu" in case.kernels]


@pytest.mark.parametrize("case", OURS, ids=lambda case: case.name)
def test_experts(case: OpCase, emulated: OpsBuild) -> None:
    args = case.args(torch.bfloat16)
    got = getattr(torch.ops.oxfuse, emulated.names[case.op].removeprefix("oxfuse::"))(*args)
    wide = (x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in args)
    exact = torch.ops.oxfuse.moe_dispatch(*wide)
    assert (got.double() - exact).abs().max() <= TOLERANCE * exact.abs().max()


def test_the_path_is_taken(emulated: OpsBuild, ops: OpsBuild) -> None:
    """A processor that is slow at it takes another path and rounds otherwise; one that is not does what the emulation does."""
    (case,) = (case for case in CASES if case.name == "many tokens")
    args = case.args(torch.bfloat16)
    theirs, other = (
        getattr(torch.ops.oxfuse, made.names[case.op].removeprefix("oxfuse::"))(*args).double() for made in (emulated, ops)
    )
    own = ops.isa == "x86-64-v4" and "avx512_bf16" in cpu_features() and "GenuineIntel" not in Path("/proc/cpuinfo").read_text()
    assert torch.equal(theirs, other) == own


ATTENDED = [case for case in ATTENTION if case.op == "oxfuse::sink_attention" and "cpu" in case.kernels]


@pytest.mark.parametrize("case", ATTENDED, ids=lambda case: case.name)
def test_attention(case: OpCase, emulated: OpsBuild) -> None:
    assert_rounds_once(case, torch.bfloat16, emulated, {"avx512_bf16"})
    assert_same_for_threads(case, torch.bfloat16, emulated, (1, 4))


def test_attention_keeps_what_a_token_is_promised(emulated: OpsBuild) -> None:
    assert_nan_stays(emulated, torch.bfloat16)
    assert_cuts_do_not_matter(emulated, torch.bfloat16, block_size=16)


@pytest.mark.parametrize("name", ["a long decode", "window longer than a tile"])
def test_weights_of_keys_are_rounded(name: str, emulated: OpsBuild) -> None:
    """Without this path results are within a rounding of their own; the sums of rounded weights are not."""
    (case,) = (case for case in ATTENDED if case.name == name)
    with pytest.raises(AssertionError, match="too much"):
        assert_rounds_once(case, torch.bfloat16, emulated, frozenset())
