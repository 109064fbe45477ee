"""The GPU kernel of `linear_rows`: the numbers under Triton's interpreter, and the machine code at the true shapes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from oxfuse.compiler.lowering.kernels import SHARED_MEMORY, Launches, compile_launch
from oxfuse.passes.fusions.linear import triton as kernels
from oxfuse.passes.fusions.linear.reference import ACTIVATIONS, linear_rows

from . import triton_interpreter
from .triton_tolerances import assert_as_near

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SIZES = {"odd": (70, 23), "one piece": (64, 32), "whole rounds": (512, 16), "a part of a round": (1100, 40)}  # K, N


def inputs(rows: int, depth: int, outputs: int, dtype: torch.dtype, bias: bool = True) -> tuple[Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(rows)
    x, weight, offset = (torch.randn(size, generator=generator) for size in ((rows, depth), (outputs, depth), (outputs,)))
    return x.to(dtype), weight.mul(depth**-0.5).to(dtype), offset.to(dtype) if bias else None


def check(rows: int, depth: int, outputs: int, dtype: torch.dtype, bias: bool = True, activation: str = "none") -> None:
    x, weight, offset = inputs(rows, depth, outputs, dtype, bias)
    interpreted = triton_interpreter.interpreted("linear.triton")
    got = interpreted.launch_linear_rows(triton_interpreter.run, x, weight, offset, activation, arch=90)
    exact = linear_rows(x.double(), weight.double(), None if offset is None else offset.double(), activation)
    assert_as_near(got, linear_rows(x, weight, offset, activation), exact, f"{rows} rows of {depth}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 3, 8, 16, 33])
def test_rows(rows: int, dtype: torch.dtype) -> None:
    check(rows, 70, 23, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_sizes(size: str, dtype: torch.dtype) -> None:
    check(2, *SIZES[size], dtype, bias=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", [name for name in ACTIVATIONS if name != "none"])
def test_activations(activation: str, dtype: torch.dtype) -> None:
    check(3, 64, 40, dtype, activation=activation)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_of_large_values(activation: str) -> None:
    """Nothing overflows on the way to a finite result, and a NaN stays one."""
    x, weight = torch.tensor([[1.0], [-1.0], [100.0], [-100.0], [3e4], [-3e4], [torch.nan]]), torch.ones(20, 1)
    interpreted = triton_interpreter.interpreted("linear.triton")
    got = interpreted.launch_linear_rows(triton_interpreter.run, x, weight, None, activation, arch=90)
    torch.testing.assert_close(got, linear_rows(x, weight, None, activation), equal_nan=True)


def test_many_outputs_have_larger_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_interpreter.interpreted("linear.triton"), "WIDE", 40)
    check(1, 33, 45, torch.bfloat16)


def test_a_strided_input() -> None:
    x, weight, bias = inputs(16, 48, 20, torch.float32)
    strided = x.t().contiguous().t()
    interpreted = triton_interpreter.interpreted("linear.triton")
    got = interpreted.launch_linear_rows(triton_interpreter.run, strided, weight, bias, arch=90)
    assert torch.equal(got, interpreted.launch_linear_rows(triton_interpreter.run, x, weight, bias, arch=90))


@pytest.mark.parametrize("folder", ["linear", "qkv_rotary"])
def test_tiles_have_no_bank_conflicts(folder: str) -> None:
    """See the docstring of linear/triton.py."""
    fusions = Path(kernels.__file__).parents[1]
    for rules in json.loads((fusions / folder / "tuning.json").read_text("utf-8")).values():
        for rule in rules:
            config, itemsize = rule["config"], 4 if rule.get("where", {}).get("dtype") == ["float32"] else 2
            assert config["SPLIT"] == config["num_warps"]
            assert config["ROWS"] * config["DEPTH"] * itemsize > 16 * 32 * config["num_warps"] or itemsize == 4


# What GPT-OSS 20b and 120b (hidden 2880), and GPT-NeoX 20b (hidden 6144) have: K, N, dtype.
TRUE_SHAPES = [
    (4096, 2880, torch.bfloat16),
    (2880, 201088, torch.bfloat16),
    (2880, 4096, torch.bfloat16),
    (2880, 512, torch.bfloat16),
    (6144, 18432, torch.float16),
    (6144, 6144, torch.float16),
    (6144, 24576, torch.float16),
    (24576, 6144, torch.float16),
    (6144, 50432, torch.bfloat16),
    (2880, 2880, torch.float32),
]
QUICK = [(TRUE_SHAPES[0], 90), (TRUE_SHAPES[1], 80)]


@pytest.mark.parametrize(
    ("shape", "arch"),
    [
        pytest.param(shape, arch, marks=() if (shape, arch) in QUICK else pytest.mark.slow, id=f"{shape[0]}-{shape[1]}-sm_{arch}")
        for shape in TRUE_SHAPES
        for arch in SHARED_MEMORY
    ],
)
def test_machine_code(shape: tuple[int, int, torch.dtype], arch: int) -> None:
    depth, outputs, dtype = shape
    launches = Launches()
    x, weight, bias = (torch.empty(size, dtype=dtype, device="meta") for size in ((8, depth), (outputs, depth), (outputs,)))
    assert kernels.launch_linear_rows(launches.wrap, x, weight, bias, arch=arch).shape == (8, outputs)
    (launch,) = launches.made
    assert "fp64" not in launch.signature.values()
    binary = compile_launch(launch, arch)
    assert binary.spill_bytes == 0 and binary.shared_bytes <= SHARED_MEMORY[arch]
    assert "cp.async.cg.shared.global [" in binary.ptx  # the instruction that takes 16 bytes a thread
    assert ("mma.sync" in binary.ptx) == (dtype != torch.float32)
