"""Writes keys and values of a step into the paged caches: where a token's entries lie, and a kernel that copies."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from oxfuse.passes.fusions import tuning


def launch_store(
    wrap: Callable[[Any], Any], k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor, arch: int
) -> None:
    """Write k and v [T, KV, D] to `slots` [T] of the caches, whose shapes `sink_attention` states; slot -1 writes nothing."""
    k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (k, v))
    (tokens, kv_heads, dim), block_size = k.shape, k_cache.shape[3]
    config = tuning.choose(Path(__file__).parent, "store", arch)
    wrap(store_kernel)[(-(-tokens // config.blocks["TOKENS"]), 2 * kv_heads)](
        k,
        v,
        k_cache,
        v_cache,
        slots,
        tokens,
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        KV=kv_heads,
        D=dim,
        DIMS=triton.next_power_of_2(dim),
        BLOCK=block_size,
        **config.keywords,
    )


@triton.jit
def store_kernel(
    k,
    v,
    k_cache,
    v_cache,
    slots,
    tokens,
    k_stride,
    k_head_stride,
    v_stride,
    v_head_stride,
    KV: tl.constexpr,
    D: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Program (x, y): tokens from x * TOKENS on; keys of head y, or values of head y - KV. Strides are in elements."""
    token, y = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tl.program_id(1)
    slot = tl.load(slots + token, token < tokens, -1)
    if y < KV:
        d = tl.arange(0, DIMS)[:, None]
        there = (slot >= 0)[None, :] & (d < D)
        keys = tl.load(k + ((token * k_stride + y * k_head_stride)[None, :] + d), there, 0.0)
        store_keys(k_cache, slot, y, keys, there, 0, KV, D, DIMS, BLOCK)
    else:
        copy_values(v, v_cache, token, slot, y - KV, v_stride, v_head_stride, KV, D, DIMS, BLOCK)


@triton.jit
def store_keys(
    k_cache,
    slot,
    head,
    keys,
    there,
    FIRST: tl.constexpr,
    KV: tl.constexpr,
    D: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Store dims FIRST.. of keys [DIMS, TOKENS] of one head at slots [TOKENS] where `there`.

    Tokens are the last dim because neighbours mostly go to neighbouring slots: so a warp's stores share sectors of memory.
    """
    place = (slot // BLOCK * KV + head) * (D * BLOCK) + slot % BLOCK
    d = FIRST + tl.arange(0, DIMS)[:, None]
    tl.store(k_cache + (place[None, :] + d * BLOCK), keys.to(k_cache.dtype.element_ty), there)


@triton.jit
def copy_values(
    v,
    v_cache,
    token,
    slot,
    head,
    stride,
    head_stride,
    KV: tl.constexpr,
    D: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Copy the values of one head of tokens [TOKENS] to slots [TOKENS]; slot -1 takes nothing."""
    d = tl.arange(0, DIMS)[None, :]
    there = (slot >= 0)[:, None] & (d < D)
    values = tl.load(v + ((token * stride + head * head_stride)[:, None] + d), there, 0.0)
    place = (slot // BLOCK * KV + head) * (D * BLOCK) + slot % BLOCK * D
    tl.store(v_cache + (place[:, None] + d), values.to(v_cache.dtype.element_ty), there)
