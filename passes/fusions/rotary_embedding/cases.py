"""Inputs for the contract tests of `rotary_embedding`, and its meaning once more, as a plain loop."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from oxfuse.passes.fusions.contract import OpCase

OP = "oxfuse::rotary_embedding"


def _case(
    name: str, shape: tuple[int, ...], heads: int, kv: int, dim: int, rotated: int, *, start: int = 0, strided: bool = False
) -> OpCase:
    def args(dtype: torch.dtype) -> tuple[Any, ...]:
        generator = torch.Generator().manual_seed(0)
        q, k = (torch.randn(*shape, n, dim, generator=generator).to(dtype) for n in (heads, kv))
        if strided:  # as a projection of [..., heads * dim] looks after view and transpose, and as a slice of a fused one does
            q = q.transpose(-3, -2).contiguous().transpose(-3, -2)
            k = torch.cat([k, k], -1)[..., :dim]
        positions = torch.arange(start, start + math.prod(shape)).view(shape).flip(-1)
        return q, k, positions, 10000.0 ** (-torch.arange(rotated // 2) * 2 / rotated), 1.3466

    return OpCase(name=name, op=OP, args=args)


def _naive(q: Tensor, k: Tensor, positions: Tensor, inv_freq: Tensor, scale: float) -> tuple[Tensor, ...]:
    results = []
    for x in (q, k):
        out = x.to(torch.float64, copy=True)
        for place in (
            torch.cartesian_prod(*(torch.arange(size) for size in (*positions.shape, x.shape[-2]))).view(-1, x.dim() - 1).tolist()
        ):
            *token, head = place
            for i, freq in enumerate(inv_freq):
                angle = float(positions[tuple(token)].to(torch.float32) * freq)  # rounded to float32 by definition
                a, b = float(x[(*token, head, i)]), float(x[(*token, head, i + len(inv_freq))])
                turned = complex(a, b) * complex(math.cos(angle), math.sin(angle)) * scale
                out[(*token, head, i)], out[(*token, head, i + len(inv_freq))] = turned.real, turned.imag
        results.append(out)
    return tuple(results)


CASES = (
    _case("one token", (1,), 4, 2, 16, 16),
    _case("whole head", (5,), 6, 3, 8, 8),
    _case("partial", (4,), 2, 2, 20, 6),
    _case("batch and sequence", (2, 3), 4, 1, 8, 8),
    _case("last positions of a long context", (3,), 2, 1, 16, 16, start=131_069),
    _case("strided", (2, 3), 4, 2, 8, 8, strided=True),
    _case("many tokens", (40,), 9, 3, 64, 64),
)
NAIVE = {OP: _naive}
