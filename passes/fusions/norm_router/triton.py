"""The GPU kernel of `norm_router`: a program takes one token and a few experts.

Every program of a token computes its norm anew, which costs reads from the cache and spares a launch; the first one stores it.
All loads stand before the first sum, so that their latencies overlap.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from oxfuse.passes.fusions import tuning


def launch_norm_router(
    wrap: Callable[[Any], Any],
    x: Tensor,
    residual: Tensor,
    norm_weight: Tensor,
    eps: float,
    router_weight: Tensor,
    router_bias: Tensor,
    *,
    arch: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the kernel; arguments and results as in reference.py. `wrap` makes a kernel launchable, `arch` 90 is sm_90."""
    x, residual, (experts, hidden) = x.contiguous(), residual.contiguous(), router_weight.shape
    config = tuning.choose(Path(__file__).parent, "norm_router", arch, many=experts > 32, long=hidden > 4096)
    normed, total = x.new_empty(x.shape), x.new_empty(x.shape)
    logits = x.new_empty(x.shape[0], experts, dtype=torch.float32)
    wrap(norm_router_kernel)[(-(-experts // config.blocks["EXPERTS"]), x.shape[0])](
        x,
        residual,
        norm_weight.contiguous(),
        router_weight.contiguous(),
        router_bias.contiguous(),
        normed,
        total,
        logits,
        EPS=eps,
        H=hidden,
        E=experts,
        HIDDEN=triton.next_power_of_2(hidden),
        **config.keywords,
    )
    return normed, total, logits


@triton.jit
def norm_router_kernel(
    x,
    residual,
    norm_weight,
    router_weight,
    router_bias,
    normed,
    total,
    logits,
    EPS: tl.constexpr,
    H: tl.constexpr,
    E: tl.constexpr,
    HIDDEN: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """x, residual, normed, total [T, H], norm_weight [H], router_weight [E, H], router_bias [E], logits float32 [T, E].

    Program (i, t): token t, experts from i * EXPERTS.
    """
    token, column = tl.program_id(1), tl.arange(0, HIDDEN)
    expert = tl.program_id(0) * EXPERTS + tl.arange(0, EXPERTS)
    at, inside = token * H + column, column < H
    rows = tl.load(router_weight + tl.minimum(expert, E - 1)[:, None] * H + column[None, :], inside[None, :], 0.0)
    offset = tl.load(router_bias + tl.minimum(expert, E - 1)).to(tl.float32)
    gain = tl.load(norm_weight + column, inside, 0.0).to(tl.float32)
    branch, stream = tl.load(x + at, inside, 0.0).to(tl.float32), tl.load(residual + at, inside, 0.0).to(tl.float32)

    summed = (branch + stream).to(x.dtype.element_ty)
    wide = summed.to(tl.float32)
    scaled = wide * tl.rsqrt(tl.sum(wide * wide, 0) / H + EPS) * gain
    rounded = scaled.to(x.dtype.element_ty)
    result = tl.sum(rows.to(tl.float32) * rounded.to(tl.float32)[None, :], 1) + offset
    tl.store(logits + token * E + expert, result, expert < E)
    if tl.program_id(0) == 0:
        tl.store(total + at, summed, inside)
        tl.store(normed + at, rounded, inside)
