"""The GPU kernels for attention of whole tensors: the numbers under Triton's interpreter, and the machine code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from oxfuse.passes.fusions import tuning
from oxfuse.passes.fusions.contract import OpCase
from oxfuse.passes.fusions.masked_attention.cases import CASES, MASKED

from . import triton_interpreter
from .triton_tolerances import assert_as_near

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
LEAST = torch.finfo(torch.float32).min
SMALL = {"ROWS": 32, "KEYS": 16, "CHUNK": 32, "SPLITS": 4}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Make the table's tiles small, so that few keys and tokens make many of them."""
    if "table" in request.keywords:
        return
    choose = tuning.choose

    def smaller(*args: Any, **shape: Any) -> tuning.Config:
        config = choose(*args, **shape)
        changed = {name: SMALL.get(name, value) for name, value in config.blocks.items()}
        return tuning.Config(num_warps=config.num_warps, num_stages=config.num_stages, blocks=changed)

    monkeypatch.setattr(tuning, "choose", smaller)


def launched(op: str, args: tuple[Any, ...]) -> Tensor:
    interpreted = triton_interpreter.interpreted("masked_attention.triton")
    launch = interpreted.launch_masked if op == MASKED else interpreted.launch_causal
    result: Tensor = launch(triton_interpreter.run, *args, 90)
    return result


def plain(op: str, args: tuple[Any, ...]) -> Tensor:
    result: Tensor = getattr(torch.ops.oxfuse, op.removeprefix("oxfuse::"))(*args)
    return result


def check(op: str, args: tuple[Any, ...], what: str = "") -> None:
    exact = tuple(x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in args)
    got = launched(op, args)
    assert got.is_contiguous()
    assert_as_near(got, plain(op, args), plain(op, exact), what)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op}-{case.name}")
def test_kernels_mean_the_plain_op(case: OpCase, dtype: torch.dtype) -> None:
    check(case.op, case.args(dtype), case.name)
