"""The GPU kernel of `qkv_rotary`: the numbers under Triton's interpreter, and the machine code at the true shapes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from oxfuse.compiler.lowering.kernels import SHARED_MEMORY, Launches, compile_launch
from oxfuse.passes.fusions.qkv_rotary import triton as kernels
from oxfuse.passes.fusions.qkv_rotary.reference import qkv_rotary

from . import triton_interpreter
from .triton_tolerances import assert_as_near

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
BLOCK_SIZE = 16


def inputs(
    slots: Sequence[int],
    dtype: torch.dtype,
    *,
    hidden: int = 40,
    heads: int = 2,
    kv: int = 1,
    dim: int = 16,
    rotated: int = 16,
    bias: str = "qkv",
    one_matrix: bool = False,
    start: int = 0,
) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(len(slots))

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=generator).mul(scale).to(dtype)

    projections: list[Tensor | None] = []
    weights, biases = random(heads, 3, dim, hidden, scale=hidden**-0.5), random(heads, 3, dim)
    for i, (which, count) in enumerate((("q", heads), ("k", kv), ("v", kv))):
        projections.append(weights[:, i] if one_matrix else random(count, dim, hidden, scale=hidden**-0.5))
        projections.append(None if which not in bias else biases[:, i] if one_matrix else random(count, dim))
    blocks = max(slots) // BLOCK_SIZE + 2
    caches = random(blocks, kv, dim, BLOCK_SIZE), random(blocks, kv, BLOCK_SIZE, dim)
    positions = torch.randint(start, start + 1000, (len(slots),), generator=generator)
    inv_freq = 10000.0 ** (-torch.arange(rotated // 2) * 2 / rotated)
    return random(len(slots), hidden), *projections, positions, inv_freq, 1.3466, *caches, torch.tensor(slots)


def cloned(args: tuple[Any, ...], dtype: torch.dtype | None = None) -> list[Any]:
    """Copy the arguments, those of the activations' dtype as `dtype`; the frequencies are float32 by definition."""
    return [
        arg if not isinstance(arg, Tensor) or i == 8 or not arg.is_floating_point() else arg.to(dtype or arg.dtype, copy=True)
        for i, arg in enumerate(args)
    ]


def check(slots: Sequence[int], dtype: torch.dtype, **shape: Any) -> None:
    args = inputs(slots, dtype, **shape)
    mine, plain, exact = cloned(args), cloned(args), cloned(args, torch.float64)
    interpreted = triton_interpreter.interpreted("qkv_rotary.triton")
    got = interpreted.launch_qkv_rotary(triton_interpreter.run, *mine, arch=90)
    assert_as_near(got, qkv_rotary(*plain), qkv_rotary(*exact), "q")
    written = torch.zeros(args[10].shape[0], BLOCK_SIZE, dtype=torch.bool)
    for slot in (slot for slot in slots if slot >= 0):
        written[slot // BLOCK_SIZE, slot % BLOCK_SIZE] = True
    for i, name, order in ((10, "keys", (0, 3, 1, 2)), (11, "values", (0, 2, 1, 3))):
        before, *after = (cache.permute(order) for cache in (args[i], mine[i], plain[i], exact[i]))  # [blocks, size, KV, D]
        assert torch.equal(after[0][~written], before[~written]), f"{name}: a slot was written that is nobody's"
        if written.any():
            assert_as_near(*(cache[written] for cache in after), name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 8, 16, 33])
def test_tokens(tokens: int, dtype: torch.dtype) -> None:
    check([(5 * token + 3) % 64 for token in range(tokens)], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_padded_tokens(dtype: torch.dtype) -> None:
    check([20, -1, 3, -1, -1], dtype)
    check([-1], dtype)


@pytest.mark.parametrize(
    "shape",
    [
        dict(hidden=70, heads=4, kv=2, dim=20, rotated=6),
        dict(hidden=33, heads=1, kv=1, dim=7, rotated=2),
        dict(hidden=300, heads=2, kv=2, dim=8, rotated=8),
        dict(hidden=1030, heads=1, kv=1, dim=34, rotated=34),
    ],
    ids=str,
)
def test_heads(shape: dict[str, int]) -> None:
    check([17, 0], torch.bfloat16, **shape)
    check([17], torch.float32, **shape)


@pytest.mark.parametrize("bias", ["", "qv"])
def test_biases(bias: str) -> None:
    check([1, 2, 3], torch.bfloat16, bias=bias)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", ["", "qkv", "kv"])
def test_views_of_one_matrix(bias: str, dtype: torch.dtype) -> None:
    check([17, 0, 3], dtype, hidden=70, heads=3, kv=3, dim=20, rotated=6, bias=bias, one_matrix=True)


def test_last_positions_of_a_long_context() -> None:
    check([4, 9], torch.float32, start=130_000)


# Hidden size, heads, KV heads, head_dim, rotated dims, dtype: GPT-OSS 20b and 120b; GPT-NeoX 20b, whose heads are of one matrix.
TRUE_SHAPES = [(2880, 64, 8, 64, 64, torch.bfloat16), (6144, 64, 64, 96, 24, torch.float16), (2880, 64, 8, 64, 64, torch.float32)]
QUICK = [(TRUE_SHAPES[0], 90)]


@pytest.mark.parametrize(
    ("shape", "arch"),
    [
        pytest.param(shape, arch, marks=() if (shape, arch) in QUICK else pytest.mark.slow, id=f"{shape[0]}-{shape[5]}-sm_{arch}")
        for shape in TRUE_SHAPES
        for arch in SHARED_MEMORY
    ],
)
def test_machine_code(shape: tuple[Any, ...], arch: int) -> None:
    hidden, heads, kv, dim, rotated, dtype = shape

    def empty(*size: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    launches = Launches()
    if heads == kv:
        projections = [joint[:, i] for i in range(3) for joint in (empty(heads, 3, dim, hidden), empty(heads, 3, dim))]
    else:
        projections = [empty(*size) for count in (heads, kv, kv) for size in ((count, dim, hidden), (count, dim))]
    angles = empty(8, dtype=torch.int64), empty(rotated // 2, dtype=torch.float32), 1.3466
    caches = empty(99, kv, dim, 64), empty(99, kv, 64, dim)
    slots = empty(8, dtype=torch.int64)
    assert kernels.launch_qkv_rotary(launches.wrap, empty(8, hidden), *projections, *angles, *caches, slots, arch=arch).shape == (
        8,
        heads,
        dim,
    )
    (launch,) = launches.made
    assert "fp64" not in launch.signature.values()
    binary = compile_launch(launch, arch)
    assert binary.spill_bytes == 0 and binary.shared_bytes <= SHARED_MEMORY[arch]
    assert "cp.async.cg.shared.global [" in binary.ptx  # the instruction that takes 16 bytes a thread
    assert ("mma.sync" in binary.ptx) == (dtype != torch.float32)
