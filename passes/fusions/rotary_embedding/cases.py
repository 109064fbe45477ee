"""Inputs for the contract tests of the rotations, and their meaning once more, as plain loops."""

from __future__ import annotations

import cmath
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from oxfuse.passes.fusions.contract import OpCase

OP, STORE = "oxfuse::rotary_embedding", "oxfuse::rotary_embedding_store"


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


def _store_case(
    name: str,
    slots: Sequence[int],
    heads: int,
    kv: int,
    dim: int,
    rotated: int,
    *,
    block_size: int = 4,
    start: int = 0,
    fused: bool = False,
) -> OpCase:
    """A token for each of `slots`; caches are NaN where nothing is written; `fused`: q, k and v are slices of one projection."""

    def args(dtype: torch.dtype) -> tuple[Any, ...]:
        generator = torch.Generator().manual_seed(0)
        projection = torch.randn(len(slots), heads + 2 * kv, dim, generator=generator).to(dtype)
        q, k, v = (x if fused else x.contiguous() for x in projection.split([heads, kv, kv], 1))
        blocks = max(slots) // block_size + 2
        caches = [torch.full((blocks, kv, *tail), torch.nan, dtype=dtype) for tail in ((dim, block_size), (block_size, dim))]
        positions = torch.arange(start, start + 3 * len(slots), 3).flip(0)
        inv_freq = 10000.0 ** (-torch.arange(rotated // 2) * 2 / rotated)
        return q, k, v, positions, inv_freq, 1.3466, *caches, torch.tensor(slots)

    return OpCase(name=name, op=STORE, args=args, mutated=(6, 7))


def _rotated(x: Tensor, positions: Tensor, inv_freq: Tensor, turn: Callable[[Tensor], complex]) -> Tensor:
    out = x.to(torch.float64, copy=True)
    for place in torch.cartesian_prod(*(torch.arange(size) for size in x.shape[:-1])).view(-1, x.dim() - 1).tolist():
        *token, head = place
        for i, freq in enumerate(inv_freq):
            angle = positions[tuple(token)].to(torch.float32) * freq  # rounded to float32 by definition
            a, b = float(x[(*token, head, i)]), float(x[(*token, head, i + len(inv_freq))])
            turned = complex(a, b) * turn(angle)
            out[(*token, head, i)], out[(*token, head, i + len(inv_freq))] = turned.real, turned.imag
    return out


def _naive(q: Tensor, k: Tensor, positions: Tensor, inv_freq: Tensor, scale: float) -> tuple[Tensor, ...]:
    return tuple(_rotated(x, positions, inv_freq, lambda angle: cmath.rect(scale, float(angle))) for x in (q, k))


def _naive_store(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    inv_freq: Tensor,
    scale: float,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
) -> Tensor:
    def turn(angle: Tensor) -> complex:  # with torch's float32 cos and sin: what is stored is compared by its bits
        return complex(float(angle.cos() * scale), float(angle.sin() * scale))

    turned, block_size = _rotated(k, positions, inv_freq, turn), k_cache.shape[3]
    for t, slot in enumerate(slots.tolist()):
        if slot >= 0:
            k_cache[slot // block_size, :, :, slot % block_size] = turned[t]
            v_cache[slot // block_size, :, slot % block_size] = v[t]
    return _rotated(q, positions, inv_freq, turn)


CASES = (
    _case("one token", (1,), 4, 2, 16, 16),
    _case("whole head", (5,), 6, 3, 8, 8),
    _case("partial", (4,), 2, 2, 20, 6),
    _case("batch and sequence", (2, 3), 4, 1, 8, 8),
    _case("last positions of a long context", (3,), 2, 1, 16, 16, start=131_069),
    _case("strided", (2, 3), 4, 2, 8, 8, strided=True),
    _case("many tokens", (40,), 9, 3, 64, 64),
    _store_case("one token", [6], 4, 2, 16, 16),
    _store_case("padded tokens", [3, -1, 9, 8], 2, 1, 8, 8),
    _store_case("nothing is stored", [-1, -1], 2, 2, 8, 8),
    _store_case("partial, of one projection", [5, 0, 2], 3, 3, 20, 6, block_size=3, fused=True),
    _store_case("last positions of a long context", [8, 4], 2, 1, 16, 16, start=131_060),
    _store_case("more tokens than a tile", [*range(9), *range(40, 50)], 5, 2, 8, 8, block_size=16, fused=True),
)
NAIVE = {OP: _naive, STORE: _naive_store}
