"""The C++ ops on processors that this machine is not: the least level, and instructions that a level need not have.

Macros stand for a processor without one, and the build's other instructions are those of its level: what is tested is what ships.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable

import pytest
import torch

from oxfuse.passes.fusions.build import OpsBuild, load_ops
from oxfuse.passes.fusions.contract import OpCase

from .test_contract import CPP_CALLS, FEATURES, assert_rounds_once, assert_same_bits, assert_same_for_threads, op

PACKED = ("oxfuse::moe_dispatch", "oxfuse::linear_int8")
INT8_CALLS = [call for call in CPP_CALLS if call.values[0].op in PACKED and call.values[0].name.startswith("int8, ")]
MOE_CALLS = [call for call in CPP_CALLS if call.values[0].op == "oxfuse::moe_dispatch" and call.values[1] == torch.bfloat16]
VNNI = {"x86-64-v4": "avx512_vnni", "x86-64-v3": "avx_vnni"}  # the level's instruction that multiplies bytes
# Of AVX-512: Skylake has neither instruction, Ice Lake has that for bytes.
PROCESSORS = {
    "Skylake": (("-DOXFUSE_NO_BF16", "-DOXFUSE_NO_VNNI"), FEATURES - {"avx512_bf16", "avx512_vnni"}),
    "Ice Lake": (("-DOXFUSE_NO_BF16",), FEATURES - {"avx512_bf16"}),
}
BuildOps = Callable[..., OpsBuild]


def loaded(made: OpsBuild) -> OpsBuild:
    load_ops(made)
    return made


@pytest.fixture(scope="module", params=sorted(VNNI))
def without_vnni(request: pytest.FixtureRequest, build_with: BuildOps) -> OpsBuild:
    return loaded(build_with(request.param, "-DOXFUSE_NO_VNNI", ops=PACKED))


@pytest.fixture(scope="module")
def with_vnni(without_vnni: OpsBuild, build_with: BuildOps) -> OpsBuild:
    if VNNI[without_vnni.isa] not in FEATURES:
        pytest.skip(f"this CPU does not have {VNNI[without_vnni.isa]}: the ordinary build multiplies bytes in two steps as well")
    return loaded(build_with(without_vnni.isa, ops=PACKED))


@pytest.fixture(scope="module")
def portable(build_with: BuildOps) -> OpsBuild:
    return loaded(build_with("x86-64-v2"))


@pytest.fixture(scope="module", params=PROCESSORS)
def processor(request: pytest.FixtureRequest, build_with: BuildOps) -> tuple[OpsBuild, frozenset[str]]:
    flags, features = PROCESSORS[request.param]
    return loaded(build_with("x86-64-v4", *flags, ops=PACKED)), features


@pytest.mark.parametrize(("case", "dtype"), INT8_CALLS)
def test_bytes_multiplied_in_two_steps(case: OpCase, dtype: torch.dtype, without_vnni: OpsBuild) -> None:
    assert_rounds_once(case, dtype, without_vnni)


@pytest.mark.parametrize(("case", "dtype"), INT8_CALLS)
def test_bytes_multiplied_in_one_step_or_two(
    case: OpCase, dtype: torch.dtype, without_vnni: OpsBuild, with_vnni: OpsBuild
) -> None:
    """Sums of whole numbers are exact, so there is nothing to differ in."""
    one, two = (op(made.names[case.op])(*case.args(dtype)) for made in (with_vnni, without_vnni))
    assert_same_bits((two,), (one,))


@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs binutils")
def test_the_builds_multiply_bytes_in_different_ways(without_vnni: OpsBuild, with_vnni: OpsBuild) -> None:
    one, two = (
        subprocess.run(["objdump", "-d", "--no-show-raw-insn", made.path], capture_output=True, text=True, check=True).stdout
        for made in (with_vnni, without_vnni)
    )
    assert "vpdpbusd" in one and "vpdpbusd" not in two


@pytest.mark.slow
@pytest.mark.parametrize(("case", "dtype"), MOE_CALLS)
def test_bfloat16_on_processors_that_do_not_multiply_it(
    case: OpCase, dtype: torch.dtype, processor: tuple[OpsBuild, frozenset[str]]
) -> None:
    made, features = processor
    assert_rounds_once(case, dtype, made, features)
    assert_same_for_threads(case, dtype, made, (1, 3))


@pytest.mark.slow
@pytest.mark.parametrize(("case", "dtype"), CPP_CALLS)
def test_portable_level(case: OpCase, dtype: torch.dtype, portable: OpsBuild) -> None:
    assert_rounds_once(case, dtype, portable)
    assert_same_for_threads(case, dtype, portable, (1, 3))
