"""Inputs for the contract tests of `qkv_rotary`, and its meaning once more, as plain loops.

Caches are NaN where nothing is written.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from oxfuse.passes.fusions.contract import OpCase

OP = "oxfuse::qkv_rotary"


def _case(
    name: str,
    slots: Sequence[int],
    hidden: int,
    heads: int,
    kv: int,
    dim: int,
    rotated: int,
    *,
    bias: str = "qkv",
    one_matrix: bool = False,
    block_size: int = 4,
    start: int = 0,
) -> OpCase:
    """A token for each of `slots`; `bias` names the projections that have one; `start` is the lowest position.

    `one_matrix`: q, k and v of a head lie side by side, as GPT-NeoX has them.
    """

    def args(dtype: torch.dtype) -> tuple[Any, ...]:
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> Tensor:  # of few bits, so that sums are exact: what is stored is compared by its bits
            return torch.randint(-8, 9, shape, generator=generator).div(8).to(dtype)

        projections: list[Tensor | None] = []
        weights, biases = random(heads, 3, dim, hidden), random(heads, 3, dim)
        for i, (which, count) in enumerate((("q", heads), ("k", kv), ("v", kv))):
            projections.append(weights[:, i] if one_matrix else random(count, dim, hidden))
            projections.append(None if which not in bias else biases[:, i] if one_matrix else random(count, dim))
        blocks = max(slots) // block_size + 2
        caches = [torch.full((blocks, kv, *tail), torch.nan, dtype=dtype) for tail in ((dim, block_size), (block_size, dim))]
        positions = torch.arange(start, start + 3 * len(slots), 3).flip(0)
        inv_freq = 10000.0 ** (-torch.arange(rotated // 2) * 2 / rotated)
        return random(len(slots), hidden), *projections, positions, inv_freq, 1.3466, *caches, torch.tensor(slots)

    return OpCase(name=name, op=OP, args=args, mutated=(10, 11))


def _project(x: Tensor, weight: Tensor, bias: Tensor | None) -> list[list[list[float]]]:
    """Return [T][heads][D]."""
    offsets = torch.zeros(weight.shape[:2]) if bias is None else bias
    heads = list(zip(weight.tolist(), offsets.tolist(), strict=True))
    return [[[_sum(row, *column) for column in zip(*head, strict=True)] for head in heads] for row in x.tolist()]


def _sum(row: list[float], column: list[float], offset: float) -> float:
    return math.fsum([offset, *(a * b for a, b in zip(row, column, strict=True))])


def _turn(heads: list[list[float]], position: Tensor, inv_freq: Tensor, scale: float) -> list[list[float]]:
    """Rotate every head of one token, with torch's float32 cos and sin, for the sake of equal bits."""
    turned = [[*head] for head in heads]
    for i, freq in enumerate(inv_freq):
        angle = position.to(torch.float32) * freq
        turn = complex(float(angle.cos() * scale), float(angle.sin() * scale))
        for head, out in zip(heads, turned, strict=True):
            pair = complex(head[i], head[i + len(inv_freq)]) * turn
            out[i], out[i + len(inv_freq)] = pair.real, pair.imag
    return turned


def _naive(
    x: Tensor,
    q_weight: Tensor,
    q_bias: Tensor | None,
    k_weight: Tensor,
    k_bias: Tensor | None,
    v_weight: Tensor,
    v_bias: Tensor | None,
    positions: Tensor,
    inv_freq: Tensor,
    scale: float,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
) -> Tensor:
    q, k, v = (_project(x, w, b) for w, b in ((q_weight, q_bias), (k_weight, k_bias), (v_weight, v_bias)))
    q, k = ([_turn(token, p, inv_freq, scale) for token, p in zip(all_tokens, positions, strict=True)] for all_tokens in (q, k))
    size = k_cache.shape[3]
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            k_cache[slot // size, :, :, slot % size] = torch.tensor(k[token], dtype=torch.float64)
            v_cache[slot // size, :, slot % size] = torch.tensor(v[token], dtype=torch.float64)
    return torch.tensor(q, dtype=torch.float64)


CASES = (
    _case("one token", [6], 48, 4, 2, 16, 16),
    _case("padded tokens", [3, -1, 9, -1], 20, 2, 1, 8, 8),
    _case("nothing is stored", [-1, -1], 16, 2, 2, 8, 8),
    _case("partial rotation", [5, 0, 2], 24, 3, 3, 20, 6),
    _case("odd sizes, no bias", [1, 7, 4, 11, 2], 37, 3, 1, 7, 4, bias="", block_size=3),
    _case("some biases", [1, 2], 19, 2, 2, 6, 6, bias="qv"),
    _case("last positions of a long context", [8, 4], 16, 2, 1, 16, 16, start=131_060),
    _case("one matrix", [2, 0, 7], 24, 3, 3, 12, 4, one_matrix=True),
    _case("one matrix, no bias", [2, 0], 16, 2, 2, 8, 8, bias="", one_matrix=True),
    _case("more tokens than a tile", [*range(9), *range(40, 48)], 33, 6, 3, 12, 8, block_size=16),
)
NAIVE = {OP: _naive}
