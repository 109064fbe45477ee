"""Inputs for the contract tests of the dense layer's kernels, and their meaning once more, as plain loops."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from oxfuse.passes.fusions.contract import OpCase


def _case(
    name: str,
    *shape: int,
    rows: int,
    bias: bool = True,
    transposed: bool = False,
    op: str = "aten::linear",
    more: tuple[str, ...] = (),
) -> OpCase:
    def args(dtype: torch.dtype) -> tuple[Any, ...]:
        generator = torch.Generator().manual_seed(0)
        x, weight, offset = (torch.randn(size, generator=generator).to(dtype) for size in (shape, (rows, shape[-1]), (rows,)))
        x = x.transpose(0, 1).contiguous().transpose(0, 1) if transposed else x
        return x, weight, offset if bias else None, *more

    return OpCase(name=name, op=op, args=args)


def _few(name: str, *shape: int, rows: int, bias: bool = True, transposed: bool = False, activation: str = "none") -> OpCase:
    more = (activation,)
    return _case(name, *shape, rows=rows, bias=bias, transposed=transposed, op="oxfuse::linear_rows", more=more)


_ACTIVATIONS: dict[str, Callable[[float], float]] = {
    "none": lambda x: x,
    "gelu": lambda x: 0.5 * x * (1 + math.erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: max(x, 0.0),
    "silu": lambda x: x / (1 + math.exp(-x)),
}


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "none") -> Tensor:
    offsets = [0.0] * len(weight) if bias is None else bias.tolist()
    rows = [
        [
            _ACTIVATIONS[activation](math.fsum([offset, *(a * b for a, b in zip(row, column, strict=True))]))
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
    _few("one token", 1, 64, rows=12),
    _few("odd sizes", 3, 37, rows=7, bias=False),
    _few("more than a tile", 19, 70, rows=23),
    _few("longer than a round", 2, 1031, rows=5),
    _few("one feature", 5, 1, rows=1),
    _few("strided", 4, 16, rows=6, transposed=True),
    *(_few(f"through {name}", 3, 8, rows=37, activation=name) for name in _ACTIVATIONS if name != "none"),
)
NAIVE = {"aten::linear": _linear, "oxfuse::linear_rows": _linear}
