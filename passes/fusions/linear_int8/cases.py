"""Inputs for the contract tests of `linear_int8`, and its meaning once more, as plain loops."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from oxfuse.passes.fusions.contract import OpCase
from oxfuse.passes.fusions.linear_int8.packed import PackedInt8, PackedInt8Scales

OP = "oxfuse::linear_int8"


def _case(name: str, *shape: int, rows: int, bias: bool = True, int8: bool = False, spread: float = 1.0) -> OpCase:
    def args(dtype: torch.dtype) -> tuple[Any, ...]:
        generator = torch.Generator().manual_seed(0)
        x, weight, offset = (torch.randn(size, generator=generator) for size in (shape, (rows, shape[-1]), (rows,)))
        x = x * torch.randn(shape[-1], generator=generator).mul(spread).exp()  # some features are larger than others
        stored = PackedInt8().apply(weight).contiguous(), PackedInt8Scales().apply(weight).contiguous()
        return x.to(dtype), *stored, offset.to(dtype) if bias else None, rows, *(True,) * int8

    return OpCase(name=name, op=OP, args=args, kernels=("cpu",))


def _no_number(name: str, value: float) -> OpCase:
    case = _case(name, 5, 70, rows=20, int8=True)

    def args(dtype: torch.dtype) -> tuple[Any, ...]:
        x, *rest = case.args(dtype)
        x[1, 3] = 0.0
        x[2] = value
        return x, *rest

    return OpCase(name=name, op=OP, args=args, kernels=("cpu",))


def _eight_bits(row: list[float]) -> list[float]:
    """Blocks of 32 in steps of 1/127 of their largest value, taken in float32."""
    single: Callable[[float], float] = lambda value: float(torch.tensor(value, dtype=torch.float32))  # noqa: E731
    out: list[float] = []
    for begin in range(0, len(row), 32):
        block = [single(value) for value in row[begin : begin + 32]]
        largest = max(map(abs, block))
        inverse, step = (single(127 / largest), single(largest / 127)) if largest >= 2.0**-100 else (0.0, 0.0)
        out += [round(single(value * inverse)) * step for value in block]
    return out


def _linear(x: Tensor, values: Tensor, scales: Tensor, bias: Tensor | None, rows: int, int8: bool = False) -> Tensor:
    length, bytes_, steps = x.shape[-1], values.tolist(), scales.double().tolist()
    weight = [[0.0] * length for _ in range(rows)]
    for row in range(rows):
        panel, lane = divmod(row, 16)
        for k in range(length):
            block, within = divmod(k, 32)
            eight, k8 = divmod(within, 8)
            place = (0, 2, 4, 6, 1, 3, 5, 7)[k8]  # of the eight bytes
            byte = bytes_[panel][block][eight * 128 + place // 4 * 64 + lane * 4 + place % 4]
            weight[row][k] = (byte - 128) * steps[panel][block][lane]
    offsets = [0.0] * rows if bias is None else bias.tolist()
    out = []
    for token in x.reshape(-1, length).tolist():
        entering = _eight_bits(token) if int8 else token
        out.append(
            [math.fsum([b, *(u * v for u, v in zip(entering, row, strict=True))]) for row, b in zip(weight, offsets, strict=True)]
        )
    return torch.tensor(out, dtype=torch.float64).view(*x.shape[:-1], rows)


CASES = (
    _case("one token", 1, 64, rows=32),
    _case("odd sizes", 1, 37, rows=7, bias=False),
    _case("three tokens", 3, 96, rows=50),
    _case("more than are streamed", 9, 70, rows=23),
    _case("longer than a chunk", 6, 1031, rows=8),
    _case("more than share decoded panels", 250, 40, rows=33),
    _case("one feature", 5, 1, rows=1),
    _case("leading dims", 2, 3, 32, rows=16),
    _case("int8, one token", 1, 64, rows=32, int8=True),
    _case("int8, two tokens, odd sizes", 2, 37, rows=7, bias=False, int8=True),
    _case("int8, three tokens", 3, 96, rows=50, int8=True),
    _case("int8, outliers", 4, 320, rows=17, int8=True, spread=3.0),
    _case("int8, more than are streamed", 9, 70, rows=23, int8=True),
    _case("int8, longer than a chunk", 6, 1031, rows=8, int8=True),
    _case("int8, more than share decoded panels", 250, 40, rows=33, int8=True),
    _no_number("int8, a row of zeros", 0.0),
    _no_number("int8, a row too small to round", 1e-38),
)
NAIVE = {OP: _linear}
