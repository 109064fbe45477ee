"""The contract of every fusion folder: the naive loop, the plain-torch op and the C++ op mean the same.

The plain op in float64 is checked against the naive loop, and everything else against the plain op in float64 on the same
inputs. Nothing here names an op: a folder brings its cases.
"""

from __future__ import annotations

import importlib
import math
import pkgutil
from collections.abc import Set
from typing import Any

import pytest
import torch

from oxfuse.passes import fusions
from oxfuse.passes.fusions.build import OpsBuild
from oxfuse.passes.fusions.contract import OpCase
from oxfuse.passes.fusions.isa import resolve_isa
from oxfuse.runtime.machine import cpu_features
from oxfuse.runtime.program import team_switch

DTYPES = [torch.float32, torch.bfloat16]
FEATURES = cpu_features()
# Half a unit in the last place for each rounding of a result, and what sums of some hundred float32 products may lose besides,
# relative to the largest result. bfloat16 has 8 significant bits.
HALF_UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}
SUMS = 3e-6
# add_rms_norm's definition rounds the sum, then the normalised sum.
ROUNDINGS = {"oxfuse::add_rms_norm": 2, "oxfuse::norm_router": 2}
# The definition rounds what results are then made of: half units of that, relative to the largest result.
ROUNDED_INSIDE = {"oxfuse::qkv_rotary": 2, "oxfuse::norm_router": 2}
# Results in promote(dtype, float32), by op and place.
WIDE = {("oxfuse::norm_router", 2)}
# Angles are float32 by definition, and so are their cos and sin.
NAIVE_TOLERANCE = {"oxfuse::rotary_embedding": 3e-7}


def folders() -> list[str]:
    return [info.name for info in pkgutil.iter_modules(fusions.__path__) if info.ispkg]


def load(folder: str, module: str) -> Any:
    importlib.import_module(f"{fusions.__name__}.{folder}.reference")
    return importlib.import_module(f"{fusions.__name__}.{folder}.{module}")


CASES = [pytest.param(case, id=f"{case.op}-{case.name}") for folder in folders() for case in load(folder, "cases").CASES]
NAIVE = {op: loop for folder in folders() for op, loop in load(folder, "cases").NAIVE.items()}
OUR_CASES = [param for param in CASES if param.values[0].op.startswith("oxfuse::")]  # of torch's own, only our kernels are judged
CPP_OPS = {op: kernel.dtypes for folder in folders() if (kernel := load(folder, "cpu").KERNEL) for op in kernel.ops}
CPP_CASES = [param for param in CASES if param.values[0].op in CPP_OPS and "cpu" in param.values[0].kernels]
CPP_CALLS = [
    pytest.param(*param.values, dtype, id=f"{param.id}-{dtype}") for param in CPP_CASES for dtype in CPP_OPS[param.values[0].op]
]


def op(name: str) -> Any:
    namespace, _, function = name.partition("::")
    return getattr(getattr(torch.ops, namespace), function)


def tensors(result: Any) -> tuple[torch.Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def in_float64(args: tuple[Any, ...]) -> tuple[Any, ...]:
    widen = lambda x: x.double() if isinstance(x, torch.Tensor) and x.dtype in DTYPES else x  # noqa: E731
    return tuple(map(widen, args))


STEP = 0.02  # of the largest result: what an inner value that is rounded to the next of 255 steps changes
STEPPED = 0.1  # of the rows may have one


def assert_close(got: Any, exact: Any, dtype: torch.dtype, roundings: int = 1, inner: float = 0.0, steps: bool = False) -> None:
    for a, b in zip(tensors(got), tensors(exact), strict=True):
        assert a.dtype == dtype and a.shape == b.shape and a.is_contiguous()
        if steps:
            off = (a.double() - b).abs().amax(-1).flatten()
            assert off.max() <= STEP * b.abs().max()
            kept = off.argsort()[: len(off) - math.floor(len(off) * STEPPED)]
            a, b = a.flatten(0, -2)[kept], b.flatten(0, -2)[kept]
        subnormal = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # the grid that results end on near zero
        room = roundings * (HALF_UNIT[dtype] * b.abs() + subnormal / 2) + (SUMS + inner) * b.abs().max()
        excess = ((a.double() - b).abs() - room).max()
        assert excess <= 0, f"off by {(a.double() - b).abs().max():.3g}, {float(excess):.3g} too much"


def inner_of(case: OpCase, dtype: torch.dtype, isa: str, features: Set[str]) -> float:
    """What the C++ op may lose inside in a build for `isa` on a processor with `features`, relative to the largest result.

    Where it multiplies bfloat16, hidden values and the weights of keys are rounded to it: half a unit of each, of which sums are
    made. Where it multiplies bytes but not that, many rows of bfloat16 become numbers of 16 bits: 2^-16 of a block's largest
    value is lost.
    """
    if case.op not in ("oxfuse::moe_dispatch", "oxfuse::sink_attention") or dtype != torch.bfloat16 or isa != "x86-64-v4":
        return 0.0
    if "avx512_bf16" in features:
        return 2.0**-9
    return 2.0**-13 if "avx512_vnni" in features and case.op == "oxfuse::moe_dispatch" else 0.0


def assert_same_bits(got: tuple[Any, ...], expected: tuple[Any, ...]) -> None:
    for a, b in zip(got, expected, strict=True):
        if isinstance(a, torch.Tensor):
            integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
            assert torch.equal(a.contiguous().view(integer), b.contiguous().view(integer))


def test_every_folder_has_cases() -> None:
    for folder in folders():
        cases = load(folder, "cases")
        assert {case.op for case in cases.CASES} == set(cases.NAIVE)
        assert len({(case.op, case.name) for case in cases.CASES}) == len(cases.CASES)
        kernel = load(folder, "cpu").KERNEL
        assert kernel is None or (set(kernel.ops) <= set(cases.NAIVE) and kernel.source.is_file())


@pytest.mark.parametrize("case", CASES)
def test_plain_op_means_the_naive_loop(case: OpCase) -> None:
    args, plain = case.args(torch.float64), case.args(torch.float64)
    expected, got = NAIVE[case.op](*args), op(case.op)(*plain)
    if case.steps:
        return assert_close(got, expected, torch.float64, steps=True)
    for a, b in zip(tensors(got), tensors(expected), strict=True):
        assert torch.isfinite(b).all()
        torch.testing.assert_close(a, b, rtol=0, atol=NAIVE_TOLERANCE.get(case.op, 1e-12) * max(1.0, float(b.abs().max())))
    assert_same_bits(plain, args)


@pytest.mark.parametrize("case", OUR_CASES)
def test_plain_op_registers_what_the_compiler_relies_on(case: OpCase) -> None:
    torch.library.opcheck(op(case.op), case.args(torch.float32), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", OUR_CASES)
def test_plain_op_rounds_once(case: OpCase, dtype: torch.dtype) -> None:
    exact, got = op(case.op)(*in_float64(case.args(dtype))), op(case.op)(*case.args(dtype))
    inside = ROUNDED_INSIDE.get(case.op, 0) * HALF_UNIT[dtype]
    for i, (a, b) in enumerate(zip(tensors(got), tensors(exact), strict=True)):
        if not b.is_floating_point():  # whole numbers: there is nothing to round
            assert torch.equal(a, b)
            continue
        if (case.op, i) in WIDE:
            assert a.dtype == torch.promote_types(dtype, torch.float32)
        assert_close(a.to(dtype) if (case.op, i) in WIDE else a, b, dtype, ROUNDINGS.get(case.op, 1), inside, case.steps)


@pytest.mark.parametrize(("case", "dtype"), CPP_CALLS)
def test_cpp_op_rounds_once(case: OpCase, dtype: torch.dtype, ops: OpsBuild) -> None:
    assert_rounds_once(case, dtype, ops)


def assert_rounds_once(case: OpCase, dtype: torch.dtype, ops: OpsBuild, features: Set[str] = FEATURES) -> None:
    args, plain = case.args(dtype), case.args(dtype)
    got = op(ops.names[case.op])(*args)
    exact = op(case.op)(*in_float64(case.args(dtype)))
    assert_close(got, exact, dtype, inner=inner_of(case, dtype, ops.isa, features), steps=case.steps)
    op(case.op)(*plain)
    assert_same_bits(args, plain)
    assert {i for i, (a, b) in enumerate(zip(args, case.args(dtype), strict=True)) if changed(a, b)} <= set(case.mutated)


def changed(a: Any, b: Any) -> bool:
    return isinstance(a, torch.Tensor) and not torch.equal(a.nan_to_num(7.5), b.nan_to_num(7.5))


@pytest.mark.parametrize(("case", "dtype"), CPP_CALLS)
def test_cpp_op_is_the_same_for_any_number_of_threads(case: OpCase, dtype: torch.dtype, ops: OpsBuild) -> None:
    assert_same_for_threads(case, dtype, ops, (1, 2, 3, 7, 16))


def assert_same_for_threads(case: OpCase, dtype: torch.dtype, ops: OpsBuild, counts: tuple[int, ...]) -> None:
    results = []
    switch = team_switch(ops.names[case.op])
    assert switch is not None
    for count in counts:
        args = case.args(dtype)
        torch.set_num_threads(count)
        results.append((*tensors(op(ops.names[case.op])(*args)), *args))
        torch.set_num_threads(1)
        args = case.args(dtype)
        switch(count, 1)
        results.append((*tensors(op(ops.names[case.op])(*args)), *args))
        switch(0, 1)
    for result in results[1:]:
        assert_same_bits(result, results[0])


@pytest.mark.parametrize("case", CPP_CASES)
def test_cpp_op_registers_what_the_compiler_relies_on(case: OpCase, ops: OpsBuild) -> None:
    name = ops.names[case.op]
    plain, cpp = (str(op(n).default._schema).replace("SymInt", "int") for n in (case.op, name))
    for i, argument in enumerate(op(case.op).default._schema.arguments):
        assert (argument.alias_info is not None and argument.alias_info.is_write) == (i in case.mutated)
    aliases = {f"(a{i}!)": f"({letter}!)" for i, letter in zip(case.mutated, "abc", strict=False)}
    for theirs, ours in aliases.items():
        plain = plain.replace(theirs, ours)
    assert cpp.replace(name, case.op) == plain
    if ops.isa == resolve_isa("native")[0]:  # at other levels the same source says the same
        torch.library.opcheck(op(name), case.args(CPP_OPS[case.op][0]), test_utils=("test_schema", "test_faketensor"))
