"""The GPU kernels of the experts: what they compute, under Triton's interpreter, and what they become for three archs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from oxfuse.compiler.lowering.kernels import SHARED_MEMORY, Launches, compile_launch
from oxfuse.passes.fusions.contract import OpCase
from oxfuse.passes.fusions.moe_dispatch import reference as reference  # registers the ops
from oxfuse.passes.fusions.moe_dispatch.cases import ALPHA, CASES, LIMIT
from oxfuse.passes.fusions.moe_dispatch.triton import launch_dispatch, launch_experts

from . import triton_interpreter
from .triton_tolerances import assert_as_near

ARCHS = sorted(SHARED_MEMORY)
BELOW_RANGE = "mxfp4, smallest scales"  # of less than 2 ** -101, which the kernels need not represent
QUICK = {  # the interpreter takes about a tenth of a second for a program
    torch.bfloat16: (
        *("one token", "odd sizes", "leading dims", "empty experts", "mxfp4, one token", "mxfp4, two blocks"),
        *("columns, odd sizes", "logits given, columns"),
        *("logits given, one token", "logits given, odd sizes", "logits given, mxfp4, empty experts"),
    ),
    torch.float32: ("odd sizes", "mxfp4, one token", "logits given, odd sizes"),
    torch.float16: ("odd sizes",),
}
INTERPRETED = [
    pytest.param(case, dtype, id=f"{case.name}-{dtype}", marks=() if case.name in quick else pytest.mark.slow)
    for dtype, quick in QUICK.items()
    for case in CASES
    if "cuda" in case.kernels and case.name != BELOW_RANGE
]


def launched(op: str, args: tuple[Any, ...]) -> Tensor:
    kernels = triton_interpreter.interpreted("moe_dispatch.triton")
    launch = {"oxfuse::moe_dispatch": kernels.launch_dispatch, "oxfuse::moe_experts": kernels.launch_experts}[op]
    result: Tensor = launch(triton_interpreter.run, *args, arch=90)
    return result


def plain(op: str, args: tuple[Any, ...]) -> Tensor:
    result: Tensor = getattr(torch.ops.oxfuse, op.removeprefix("oxfuse::"))(*args)
    return result


def exact(op: str, args: tuple[Any, ...]) -> Tensor:
    return plain(op, tuple(x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in args))


def logits_of(x: Tensor, router: Tensor, bias: Tensor) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    return torch.nn.functional.linear(x.to(wide), router.to(wide), bias.to(wide))


def given_logits(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Turn arguments of moe_dispatch into those of moe_experts."""
    x, router, bias, *rest = args
    return x.flatten(0, -2), logits_of(x.flatten(0, -2), router, bias), *rest


def assert_near(op: str, args: tuple[Any, ...], what: str = "") -> None:
    assert_as_near(launched(op, args), plain(op, args), exact(op, args), what)


@pytest.mark.parametrize(("case", "dtype"), INTERPRETED)
def test_kernels_mean_the_plain_op(case: OpCase, dtype: torch.dtype) -> None:
    assert_near(case.op, case.args(dtype), case.name)


def made(tokens: int, hidden: int, inner: int, experts: int, top_k: int, dtype: torch.dtype, mxfp4: bool) -> list[Any]:
    """Random arguments of moe_dispatch."""
    generator = torch.Generator().manual_seed(tokens)

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=generator).mul(scale).to(dtype)

    def weight(rows: int, columns: int) -> tuple[Tensor, Tensor | None]:
        if not mxfp4:
            return random(experts, rows, columns, scale=columns**-0.5), None
        blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), dtype=torch.uint8, generator=generator)
        return blocks, torch.randint(119, 125, (experts, rows, columns // 32), dtype=torch.uint8, generator=generator)

    first, second = weight(2 * inner, hidden), weight(hidden, inner)
    biases = random(experts, 2 * inner), random(experts, hidden)
    return [
        *(random(tokens, hidden), random(experts, hidden), random(experts)),
        *(*first, biases[0], *second, biases[1], top_k, ALPHA, LIMIT),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [127, 128, 129])
def test_pairs_end_at_the_edge_of_a_tile(tokens: int) -> None:
    args = made(tokens, 32, 32, 2, 1, torch.bfloat16, True)
    args[2] = torch.tensor([9.0, -9.0], dtype=torch.bfloat16)  # all tokens on the first expert
    args[1].zero_()
    assert_near("oxfuse::moe_dispatch", tuple(args))


@pytest.mark.parametrize("tokens", [9, pytest.param(8, marks=pytest.mark.slow), pytest.param(64, marks=pytest.mark.slow)])
def test_groups_of_a_decode_step(tokens: int) -> None:
    args = made(tokens, 32, 32, 3, 2, torch.bfloat16, True)
    args[2] = torch.tensor([30.0, 0.0, 0.0], dtype=torch.bfloat16)  # the first expert for every token, the others for some
    assert_near("oxfuse::moe_experts", given_logits(tuple(args)))


def test_tokens_may_be_strided_and_have_leading_dims() -> None:
    for mxfp4 in (False, True):
        x, *rest = made(6, 64, 32, 3, 2, torch.bfloat16, mxfp4)
        want = launched("oxfuse::moe_dispatch", (x, *rest))
        wide = torch.randn(2, 3, 128, dtype=x.dtype)
        wide[..., :64] = x.view(2, 3, 64)
        got = launched("oxfuse::moe_dispatch", (wide[..., :64], *rest))
        assert got.shape == (2, 3, 64) and got.is_contiguous() and torch.equal(got.view(6, 64), want)
        transposed = x.t().contiguous().t()
        assert torch.equal(launched("oxfuse::moe_dispatch", (transposed, *rest)), want)
        assert torch.equal(
            launched("oxfuse::moe_experts", given_logits((transposed, *rest))),
            launched("oxfuse::moe_experts", given_logits((x, *rest))),
        )


def test_an_expert_that_nobody_chose_has_no_influence() -> None:
    for mxfp4 in (False, True):
        args = made(5, 32, 32, 4, 2, torch.bfloat16, mxfp4)
        args[2] = torch.tensor([0.0, -60.0, 0.0, -60.0], dtype=torch.bfloat16)
        clean = [launched("oxfuse::moe_dispatch", tuple(args)), launched("oxfuse::moe_experts", given_logits(tuple(args)))]
        for weight, scales, bias in (args[3:6], args[6:9]):
            bias[[1, 3]] = torch.nan
            (weight if scales is None else scales)[[1, 3]] = 255 if mxfp4 else torch.nan
        dirty = [launched("oxfuse::moe_dispatch", tuple(args)), launched("oxfuse::moe_experts", given_logits(tuple(args)))]
        assert all(torch.equal(a, b) for a, b in zip(dirty, clean, strict=True)) and clean[0].isfinite().all()


def test_a_token_that_is_not_a_number_spoils_itself_alone() -> None:
    args = made(5, 32, 32, 3, 2, torch.bfloat16, True)
    args[0][2] = torch.nan
    for op, given in (("oxfuse::moe_dispatch", tuple(args)), ("oxfuse::moe_experts", given_logits(tuple(args)))):
        got, want = launched(op, given), exact(op, given)
        assert torch.equal(got.isnan(), want.isnan()) and want.isnan().any(1).tolist() == [False, False, True, False, False]
        keep = [0, 1, 3, 4]
        assert_as_near(got[keep], plain(op, given)[keep], want[keep])


def test_scale_bytes() -> None:
    """Row h of the second product has the scale byte h, so that no other row hides its error."""
    x, router, bias, *rest = made(3, 256, 32, 1, 1, torch.bfloat16, True)
    rest[4][:] = torch.arange(256, dtype=torch.uint8)[:, None]
    rest[5].zero_()
    for op, args in (
        ("oxfuse::moe_dispatch", (x, router, bias, *rest)),
        ("oxfuse::moe_experts", given_logits((x, router, bias, *rest))),
    ):
        wide = tuple(a.float() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)
        got, want = launched(op, wide), exact(op, wide)
        error = (got.double() - want).abs().amax(0) / want.abs().amax(0)
        assert error[60:161].max() <= 1e-5
        beyond = got[:, 161:]
        assert not beyond.isfinite().any(), "an overflow must not look like a number"
        assert got[:, :60].isfinite().all() and (got.double() - want)[:, :60].abs().max() <= 2.0**-60


RELEASED = {"20b": (32, 4), "120b": (128, 4)}  # experts, top_k; hidden and inner are 2880


def meta(op: str, model: str, tokens: int, *, mxfp4: bool = True, dtype: torch.dtype = torch.bfloat16) -> tuple[Any, ...]:
    experts, top_k = RELEASED[model]

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def weight(rows: int, columns: int) -> tuple[Tensor, Tensor | None]:
        if not mxfp4:
            return empty(experts, rows, columns), None
        blocks = empty(experts, rows, columns // 32, 16, dtype=torch.uint8)
        return blocks, empty(experts, rows, columns // 32, dtype=torch.uint8)

    rest = *weight(5760, 2880), empty(experts, 5760), *weight(2880, 2880), empty(experts, 2880), top_k, ALPHA, LIMIT
    if op == "oxfuse::moe_experts":
        return empty(tokens, 2880), empty(tokens, experts, dtype=torch.float32), *rest
    return empty(tokens, 2880), empty(experts, 2880), empty(experts), *rest


LAUNCH: dict[str, Callable[..., Tensor]] = {"oxfuse::moe_dispatch": launch_dispatch, "oxfuse::moe_experts": launch_experts}
COMPILED = [("oxfuse::moe_experts", "20b", 90, True), ("oxfuse::moe_dispatch", "20b", 90, True)]
SLOWLY = [
    (op, model, arch, mxfp4)
    for op in LAUNCH
    for model in RELEASED
    for arch in ARCHS
    for mxfp4 in (True, False)
    if (op, model, arch, mxfp4) not in COMPILED
]


@pytest.mark.parametrize(
    ("op", "model", "arch", "mxfp4"), [*COMPILED, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOWLY)]
)
def test_kernels_fit_the_gpu(op: str, model: str, arch: int, mxfp4: bool) -> None:
    launches = Launches()
    LAUNCH[op](launches.wrap, *meta(op, model, 5, mxfp4=mxfp4), arch=arch)
    assert len(launches.made) == {"oxfuse::moe_dispatch": 5, "oxfuse::moe_experts": 2}[op]
    for launch in launches.made:
        binary = compile_launch(launch, arch)
        assert binary.spill_bytes == 0, launch.name
        assert binary.shared_bytes <= SHARED_MEMORY[arch], launch.name
        assert "fp64" not in launch.signature.values(), launch.name
        if arch == 90 and launch.name in ("gate_up_kernel", "down_kernel"):
            assert "HGMMA" in binary.sass(), launch.name
        if launch.name in ("few_gate_up_kernel", "few_down_kernel"):
            assert "HMMA" in binary.sass(), launch.name
