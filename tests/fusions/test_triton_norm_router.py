"""The GPU kernel of `norm_router`: the numbers under Triton's interpreter, and the machine code at the true shapes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from oxfuse.compiler.lowering.kernels import SHARED_MEMORY, Launches, compile_launch
from oxfuse.passes.fusions.norm_router import triton as kernels
from oxfuse.passes.fusions.norm_router.reference import norm_router

from . import triton_interpreter
from .triton_tolerances import FLOAT32_RELATIVE, assert_as_near

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SIZES = {"odd": (33, 5), "one expert": (16, 1), "a power of two": (64, 8), "many experts": (48, 37)}  # hidden, experts


def inputs(tokens: int, hidden: int, experts: int, dtype: torch.dtype, scale: float = 1.0) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(tokens)
    shapes = (tokens, hidden), (tokens, hidden), (hidden,), (experts, hidden), (experts,)
    x, residual, gain, weight, bias = (torch.randn(shape, generator=generator) for shape in shapes)
    values = x * scale, residual * scale, gain, weight * hidden**-0.5, bias
    x, residual, gain, weight, bias = (value.to(dtype) for value in values)
    return x, residual, gain, 1e-5, weight, bias


def check(tokens: int, hidden: int, experts: int, dtype: torch.dtype, scale: float = 1.0) -> None:
    args = inputs(tokens, hidden, experts, dtype, scale)
    interpreted = triton_interpreter.interpreted("norm_router.triton")
    normed, total, logits = interpreted.launch_norm_router(triton_interpreter.run, *args, arch=90)
    wide = [arg.double() if isinstance(arg, torch.Tensor) else arg for arg in args]
    plain, exact = norm_router(*args), norm_router(*wide)
    assert torch.equal(total, plain[1])
    assert_as_near(normed, plain[0], exact[0], "normed")
    assert logits.dtype == torch.float32
    # The logits are those of the normed values as they were rounded: not less than float32's precision is lost on the way.
    expected = torch.nn.functional.linear(normed.double(), wide[4], wide[5])
    assert (logits - expected).abs().max() <= FLOAT32_RELATIVE * expected.abs().max()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 8, 16, 33])
def test_tokens(tokens: int, dtype: torch.dtype) -> None:
    check(tokens, 33, 3, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_sizes(size: str, dtype: torch.dtype) -> None:
    check(2, *SIZES[size], dtype)


def test_smaller_than_eps() -> None:
    check(3, 16, 4, torch.float32, scale=1e-4)


QUICK = [(32, torch.bfloat16, 90)]


@pytest.mark.parametrize(
    ("experts", "dtype", "arch"),
    [
        pytest.param(*call, marks=() if call in QUICK else pytest.mark.slow, id=f"{call[0]}-{call[1]}-sm_{call[2]}")
        for call in [(experts, dtype, arch) for experts in (32, 128) for dtype in DTYPES for arch in SHARED_MEMORY]
    ],
)
def test_machine_code(experts: int, dtype: torch.dtype, arch: int) -> None:
    launches = Launches()
    shapes = (3, 2880), (3, 2880), (2880,), (experts, 2880), (experts,)
    x, residual, gain, weight, bias = (torch.empty(shape, dtype=dtype, device="meta") for shape in shapes)
    results = kernels.launch_norm_router(launches.wrap, x, residual, gain, 1e-5, weight, bias, arch=arch)
    assert [tuple(result.shape) for result in results] == [(3, 2880), (3, 2880), (3, experts)]
    (launch,) = launches.made
    assert "fp64" not in launch.signature.values()
    binary = compile_launch(launch, arch)
    assert binary.spill_bytes == 0 and binary.shared_bytes <= SHARED_MEMORY[arch]
    assert "ld.global.v4.b32" in binary.ptx  # 16 bytes a thread
