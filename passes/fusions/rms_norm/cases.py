"""Inputs for the contract tests of the RMSNorm ops, and their meaning once more, as plain loops."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from oxfuse.passes.fusions.contract import OpCase


def _inputs(shape: tuple[int, ...], residual: bool, dtype: torch.dtype, scale: float, transposed: bool) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(0)
    xs = [torch.randn(shape, generator=generator).mul(scale).to(dtype) for _ in range(1 + residual)]
    if transposed:
        xs = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in xs]
    return *xs, torch.randn(shape[-1], generator=generator).to(dtype), 1e-5


def _case(name: str, *shape: int, scale: float = 1.0, transposed: bool = False) -> list[OpCase]:
    return [
        OpCase(name=name, op=f"oxfuse::{op}", args=lambda dtype, extra=extra: _inputs(shape, extra, dtype, scale, transposed))  # type: ignore[misc]
        for op, extra in (("rms_norm", False), ("add_rms_norm", True))
    ]


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    out = torch.empty(x.shape, dtype=torch.float64)
    for row, result in zip(x.reshape(-1, x.shape[-1]).tolist(), out.view(-1, x.shape[-1]), strict=True):
        root = math.sqrt(math.fsum(value * value for value in row) / len(row) + eps)
        result.copy_(torch.tensor([value / root * w for value, w in zip(row, weight.tolist(), strict=True)], dtype=torch.float64))
    return out


def _add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _rms_norm(x + residual, weight, eps), x + residual


CASES = (
    *_case("one token", 1, 48),
    *_case("odd width", 7, 33),
    *_case("one feature", 3, 1),
    *_case("leading dims", 2, 5, 16),
    *_case("strided", 4, 6, 16, transposed=True),
    *_case("smaller than eps", 3, 16, scale=1e-4),
)
NAIVE = {"oxfuse::rms_norm": _rms_norm, "oxfuse::add_rms_norm": _add_rms_norm}
