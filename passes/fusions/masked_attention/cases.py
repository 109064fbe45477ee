"""Inputs for the contract tests of attention under a given mask, and its meaning once more, as plain loops."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from oxfuse.passes.fusions.contract import OpCase
from oxfuse.passes.fusions.sink_attention.cases import CASES as SINK_CASES
from oxfuse.passes.fusions.sink_attention.cases import DENSE, attend_naively
from oxfuse.passes.fusions.sink_attention.cases import NAIVE as SINK_NAIVE

MASKED = "oxfuse::masked_attention"


def _case(
    name: str,
    batch: int,
    tokens: int,
    keys: int,
    heads: int,
    kv: int,
    dim: int,
    *,
    mask: Literal["bool", "added", "float32"] = "bool",
    shape: tuple[int, int] | None = None,
    sink: bool = True,
    past: int | None = None,
    strided: bool = False,
) -> OpCase:
    """`past` keys are written before the tokens, which see those up to themselves; None hides keys at random.

    The mask is [B, S] = `shape` of [batch, tokens], by default those. In a row of "added" all keys may be hidden.
    """

    def args(dtype: torch.dtype) -> tuple[Any, ...]:
        generator = torch.Generator().manual_seed(0)
        q = torch.randn(batch, tokens, heads, dim, generator=generator).to(dtype)
        k, v = (torch.randn(batch, keys, kv, dim, generator=generator).to(dtype) for _ in "kv")
        if strided:  # heads first, as caches lie
            k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))
        rows, columns = shape or (batch, tokens)
        if past is None:
            visible = torch.rand(rows, 1, columns, keys, generator=generator) > 0.4
            visible[0, 0, -1] = False
        else:
            visible = (torch.arange(keys) <= torch.arange(columns)[:, None] + past).expand(rows, 1, columns, keys).contiguous()
        if mask != "bool":
            kind = dtype if mask == "added" else torch.float32
            added = torch.randn(visible.shape, generator=generator).to(kind)
            visible = torch.where(visible, added, torch.finfo(torch.bfloat16).min)
        return q, k, v, torch.randn(heads, generator=generator).to(dtype) if sink else None, visible, dim**-0.5

    return OpCase(name=name, op=MASKED, args=args)


def _naive(q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, mask: Tensor, scale: float) -> Tensor:
    out, group = torch.zeros(q.shape, dtype=torch.float64), q.shape[2] // k.shape[2]
    wide = mask.expand(q.shape[0], 1, q.shape[1], k.shape[1])[:, 0]
    for b in range(q.shape[0]):
        for i in range(q.shape[1]):
            row = [(0.0 if x else -math.inf) if isinstance(x, bool) else x for x in wide[b, i].tolist()]
            seen = [j for j in range(k.shape[1]) if row[j] > -math.inf]
            for h in range(q.shape[2]):
                keys, values = ([x[b, j, h // group].tolist() for j in seen] for x in (k, v))
                one = None if sink is None else float(sink[h])
                out[b, i, h] = attend_naively(q[b, i, h].tolist(), keys, values, one, scale, [row[j] for j in seen])
    return out


CASES = (
    _case("one token, one key", 1, 1, 1, 4, 2, 16, past=0),
    _case("decode", 1, 1, 40, 8, 2, 16, past=17, strided=True),
    _case("decode, added", 2, 1, 150, 8, 1, 64, past=70, mask="added", strided=True),
    _case("any mask", 2, 9, 21, 6, 2, 8),
    _case("any mask, added", 2, 9, 21, 6, 2, 8, mask="added"),
    _case("any mask, added in float32", 2, 5, 9, 4, 4, 6, mask="float32", sink=False),
    _case("one row for all", 2, 5, 9, 4, 2, 8, shape=(2, 1)),
    _case("one sequence for all", 3, 5, 70, 4, 2, 12, shape=(1, 5), sink=False),
    _case("more tokens than a block", 1, 50, 130, 10, 2, 20, past=80, strided=True),
    _case("more tokens than a block, any mask", 2, 45, 130, 5, 1, 16),
    *(case for case in SINK_CASES if case.op == DENSE),
)
NAIVE = {MASKED: _naive, DENSE: SINK_NAIVE[DENSE]}
