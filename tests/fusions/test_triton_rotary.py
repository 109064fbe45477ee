"""The GPU kernels of the rotations: the numbers under Triton's interpreter, and the machine code at the true shapes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from oxfuse.compiler.lowering.kernels import SHARED_MEMORY, Launches, compile_launch
from oxfuse.passes.fusions.contract import OpCase
from oxfuse.passes.fusions.rotary_embedding import reference
from oxfuse.passes.fusions.rotary_embedding import triton as kernels
from oxfuse.passes.fusions.rotary_embedding.cases import CASES, OP, STORE

from . import triton_interpreter
from .triton_tolerances import assert_as_near

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def in_float64(args: tuple[Any, ...], frequencies: int) -> tuple[Any, ...]:
    widen = lambda i, x: isinstance(x, Tensor) and x.is_floating_point() and i != frequencies  # noqa: E731
    return tuple(x.double() if widen(i, x) else x for i, x in enumerate(args))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [case for case in CASES if case.op == OP], ids=lambda case: case.name)
def test_rotary(case: OpCase, dtype: torch.dtype) -> None:
    interpreted = triton_interpreter.interpreted("rotary_embedding.triton")
    got = interpreted.launch_rotary(triton_interpreter.run, *case.args(dtype), 90)
    plain, exact = (reference.rotary_embedding(*args) for args in (case.args(dtype), in_float64(case.args(dtype), 3)))
    for mine, others, true in zip(got, plain, exact, strict=True):
        assert mine.is_contiguous()
        assert_as_near(mine, others, true, case.name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [case for case in CASES if case.op == STORE], ids=lambda case: case.name)
def test_rotary_store(case: OpCase, dtype: torch.dtype) -> None:
    interpreted = triton_interpreter.interpreted("rotary_embedding.triton")
    args, plain, exact = case.args(dtype), case.args(dtype), in_float64(case.args(dtype), 4)
    got = interpreted.launch_rotary_store(triton_interpreter.run, *args, 90)
    assert_as_near(got, reference.rotary_embedding_store(*plain), reference.rotary_embedding_store(*exact), "queries")
    for mine, others, true, name in zip(args[6:8], plain[6:8], exact[6:8], ("keys", "values"), strict=True):
        written = ~true.isnan()
        assert torch.equal(mine.isnan(), ~written), f"{name}: other slots were written than those asked for"
        if written.any():
            assert_as_near(mine[written], others[written], true[written], name)
    assert torch.equal(args[7].nan_to_num(7.5), plain[7].nan_to_num(7.5))


def test_cos_and_sin_of_large_angles() -> None:
    """To 2^-23, as close as float32 functions get, for any position; the worst are near multiples of pi / 2."""
    interpreted = triton_interpreter.interpreted("rotary_embedding.triton")
    quarters = torch.arange(0, 83443, 3, dtype=torch.float64) * (math.pi / 2)
    angles = torch.cat([quarters.float(), torch.arange(0, 131072, 11).float(), torch.rand(9999) * 6.3, torch.tensor([2.0**24])])
    one = torch.ones(1, dtype=torch.int64)
    for piece in angles.split(4096):  # one head whose every pair has a frequency of its own, at position 1
        x = torch.cat([torch.ones_like(piece), torch.zeros_like(piece)]).view(1, 1, -1)
        turned, _ = interpreted.launch_rotary(triton_interpreter.run, x, x, one, piece, 1.0, 90)
        for got, true in zip(turned[0, 0].double().chunk(2), (piece.double().cos(), piece.double().sin()), strict=True):
            assert (got - true).abs().max() < 2.0**-23


def test_bodies_launch_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    launches = Launches()
    monkeypatch.setattr(torch.library, "wrap_triton", launches.wrap)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    for case, op in ((CASES[0], reference.rotary_embedding), (CASES[-1], reference.rotary_embedding_store)):
        real = case.args(torch.bfloat16)
        with FakeTensorMode():
            move = lambda x: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")  # noqa: E731
            op(*(move(x) if isinstance(x, Tensor) else x for x in real))
    assert [launch.name for launch in launches.made] == ["rotary_kernel", "rotary_store_kernel"]


# heads, KV heads, head_dim, rotated dims, dtype: GPT-OSS 20b and 120b; GPT-NeoX 20b; pythia 1b and 2.8b.
GPT_OSS = (64, 8, 64, 64, torch.bfloat16)
SHAPES = [
    GPT_OSS,
    (64, 8, 64, 64, torch.float32),
    (64, 64, 96, 24, torch.float16),
    (64, 64, 96, 24, torch.bfloat16),
    (8, 8, 256, 64, torch.float16),
    (32, 32, 80, 20, torch.float16),
]


@pytest.mark.parametrize(
    ("shape", "arch"),
    [
        pytest.param(shape, arch, marks=() if (shape, arch) == (GPT_OSS, 90) else pytest.mark.slow, id=f"{shape}-sm_{arch}")
        for shape in SHAPES
        for arch in SHARED_MEMORY
    ],
)
def test_machine_code(shape: tuple[Any, ...], arch: int) -> None:
    heads, kv, dim, rotated, dtype = shape

    def empty(*size: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    launches, tokens = Launches(), 512
    q, k, v = empty(tokens, heads + 2 * kv, dim).split([heads, kv, kv], 1)
    angles = empty(tokens, dtype=torch.int64), empty(rotated // 2, dtype=torch.float32), 1.3466
    kernels.launch_rotary(launches.wrap, q, k, *angles, arch)
    caches = empty(99, kv, dim, 64), empty(99, kv, 64, dim)
    kernels.launch_rotary_store(launches.wrap, q, k, v, *angles, *caches, empty(tokens, dtype=torch.int64), arch)
    for launch in launches.made:
        assert "fp64" not in launch.signature.values()
        binary = compile_launch(launch, arch)
        print(f"{launch.name} {shape} sm_{arch}: {binary.registers} registers, {binary.shared_bytes} B shared")
        assert binary.spill_bytes == 0 and binary.shared_bytes <= SHARED_MEMORY[arch]
        assert "cos.approx" not in binary.ptx and "sin.approx" not in binary.ptx and ".local" not in binary.ptx
