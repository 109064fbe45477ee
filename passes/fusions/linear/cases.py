"""Inputs for the contract tests of the dense layer's kernel, and its meaning once more, as plain loops."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from oxfuse.passes.fusions.contract import OpCase


def _case(name: str, *shape: int, rows: int, bias: bool = True, transposed: bool = False) -> OpCase:
    def args(dtype: torch.dtype) -> tuple[Any, ...]:
        generator = torch.Generator().manual_seed(0)
        x, weight, offset = (torch.randn(size, generator=generator).to(dtype) for size in (shape, (rows, shape[-1]), (rows,)))
        x = x.transpose(0, 1).contiguous().transpose(0, 1) if transposed else x
        return x, weight, offset if bias else None

    return OpCase(name=name, op="aten::linear", args=args)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    offsets = [0.0] * len(weight) if bias is None else bias.tolist()
    rows = [
        [
            math.fsum([offset, *(a * b for a, b in zip(row, column, strict=True))])
            for column, offset in zip(weight.tolist(), offsets, strict=True)
        ]
        for row in x.reshape(-1, x.shape[-1]).tolist()
    ]
    return torch.tensor(rows, dtype=torch.float64).view(*x.shape[:-1], len(weight))


CASES = (
    _case("one token", 1, 64, rows=12),
    _case("one token, odd sizes", 1, 37, rows=7, bias=False),
    _case("tokens that fit the registers", 3, 48, rows=13),
    _case("many tokens", 19, 70, rows=23),
    _case("more than share a decoded tile", 131, 40, rows=9),
    _case("rows longer than a chunk", 6, 1031, rows=8),
    _case("one feature", 5, 1, rows=1),
    _case("leading dims", 2, 3, 16, rows=6),
    _case("strided", 4, 6, 16, rows=6, transposed=True),
)
NAIVE = {"aten::linear": _linear}
