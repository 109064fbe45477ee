"""The path for processors that multiply bfloat16, run anywhere: the one instruction is emulated, all around it is as it ships."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from oxfuse.passes.fusions.build import OpsBuild, load_ops
from oxfuse.passes.fusions.contract import OpCase
from oxfuse.passes.fusions.moe_dispatch.cases import CASES
from oxfuse.runtime.machine import cpu_features

TOLERANCE = 2.0**-8  # of the largest result: its own rounding, and that of the hidden values


@pytest.fixture(scope="module")
def emulated(build_with: Callable[..., OpsBuild]) -> OpsBuild:
    made = build_with("x86-64-v4", "-DOXFUSE_EMULATE_BF16", ops=("oxfuse::moe_dispatch",))
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
