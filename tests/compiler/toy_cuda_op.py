"""An op made like oxfuse's own, as small as can be: plain torch on the CPU, a Triton kernel on a GPU, a cache changed in place.

The process that lowers for CUDA imports this file by its path.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton


@triton.jit
def toy_append_kernel(x, cache, slots, out, SCALE: tl.constexpr, WIDTH: tl.constexpr):
    token, at = tl.program_id(0), tl.arange(0, WIDTH)
    slot = tl.load(slots + token)
    row = tl.load(x + token * WIDTH + at)
    if slot >= 0:
        tl.store(cache + slot * WIDTH + at, row)
    tl.store(out + token * WIDTH + at, row * SCALE)


@triton.jit
def toy_scale_kernel(x, out, scale, WIDTH: tl.constexpr):
    at = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    tl.store(out + at, tl.load(x + at) * scale)


@triton_op("oxfuse_toy::append", mutates_args=("cache",))
def append(x: Tensor, cache: Tensor, slots: Tensor, scale: float) -> Tensor:
    """x [T, H], cache [B, S, H], slots [T]: store x's rows, return x * scale."""
    if x.device.type == "cpu":
        cache.view(-1, cache.shape[2]).index_put_((slots,), x)
        return x * scale
    out = torch.empty_like(x)
    wrap_triton(toy_append_kernel)[(x.shape[0],)](x, cache, slots, out, SCALE=scale, WIDTH=x.shape[1])
    return out


@triton_op("oxfuse_toy::scale", mutates_args=())
def scale(x: Tensor, by: float) -> Tensor:
    """x [T, H] * by, with `by` passed as Python's float, which no kernel of ours may do."""
    if x.device.type == "cpu":
        return x * by
    out = torch.empty_like(x)
    wrap_triton(toy_scale_kernel)[(x.shape[0],)](x, out, by, WIDTH=x.shape[1])
    return out
