"""Inputs for the contract tests of `norm_router`, and its meaning once more, as plain loops."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from oxfuse.passes.fusions.contract import OpCase

OP = "oxfuse::norm_router"


def _case(name: str, tokens: int, hidden: int, experts: int, *, scale: float = 1.0) -> OpCase:
    def args(dtype: torch.dtype) -> tuple[Any, ...]:
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int, scale: float = 1.0) -> Tensor:
            return torch.randn(shape, generator=generator).mul(scale).to(dtype)

        router = random(experts, hidden, scale=hidden**-0.5), random(experts)
        return random(tokens, hidden, scale=scale), random(tokens, hidden, scale=scale), random(hidden), 1e-5, *router

    return OpCase(name=name, op=OP, args=args)


def _naive(
    x: Tensor, residual: Tensor, norm_weight: Tensor, eps: float, router_weight: Tensor, router_bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    total = x + residual
    normed, logits = [], []
    for row in total.tolist():
        root = math.sqrt(math.fsum(value * value for value in row) / len(row) + eps)
        normed.append([value / root * gain for value, gain in zip(row, norm_weight.tolist(), strict=True)])
        products = [math.fsum(a * b for a, b in zip(normed[-1], expert, strict=True)) for expert in router_weight.tolist()]
        logits.append([product + bias for product, bias in zip(products, router_bias.tolist(), strict=True)])
    return torch.tensor(normed, dtype=torch.float64), total, torch.tensor(logits, dtype=torch.float64)


CASES = (
    _case("one token", 1, 48, 8),
    _case("odd sizes", 7, 33, 5),
    _case("one expert, one feature", 3, 1, 1),
    _case("more experts than features", 2, 16, 37),
    _case("smaller than eps", 3, 16, 4, scale=1e-4),
)
NAIVE = {OP: _naive}
