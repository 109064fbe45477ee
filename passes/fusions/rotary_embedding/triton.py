"""Rotation on GPUs: q and k in one launch, or q, the rotated k and v in one launch, the last two into the paged caches.

A program takes some tokens: a few heads of q, one head of k, or one of v. Angles are float32 by definition; cos and sin are our
own, from a reduction in float64: the device library's keep an array in memory for large angles, and its fast ones are good to
some 2^-21 only and not for angles of 10^5.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from oxfuse.passes.fusions import tuning
from oxfuse.passes.fusions.sink_attention.triton_store import copy_values, store_keys


def launch_rotary(
    wrap: Callable[[Any], Any], q: Tensor, k: Tensor, positions: Tensor, inv_freq: Tensor, scale: float, arch: int
) -> tuple[Tensor, Tensor]:
    """Return q and k rotated, as `rotary_embedding` says; `wrap` makes a kernel launchable."""
    flat_q, flat_k = _flat(q), _flat(k)
    (tokens, heads, dim), kv_heads = flat_q.shape, flat_k.shape[1]
    config = tuning.choose(Path(__file__).parent, "rotary", arch)
    turned = q.new_empty(q.shape), k.new_empty(k.shape)
    programs = -(-heads // config.blocks["HEADS"]) + -(-kv_heads // config.blocks["HEADS"])
    wrap(rotary_kernel)[(-(-tokens // config.blocks["TOKENS"]), programs)](
        flat_q,
        flat_k,
        *turned,
        positions.reshape(-1),
        inv_freq,
        tokens,
        flat_q.stride(0),
        flat_q.stride(1),
        flat_k.stride(0),
        flat_k.stride(1),
        NH=heads,
        KV=kv_heads,
        **_constants(dim, inv_freq, scale),
        **config.keywords,
    )
    return turned


def launch_rotary_store(
    wrap: Callable[[Any], Any],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    inv_freq: Tensor,
    scale: float,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    arch: int,
) -> Tensor:
    """Return q rotated, and write rotated k, and v, into the caches, as `rotary_embedding_store` says."""
    q, k, v = _flat(q), _flat(k), _flat(v)
    (tokens, heads, dim), kv_heads = q.shape, k.shape[1]
    config = tuning.choose(Path(__file__).parent, "rotary_store", arch)
    turned = q.new_empty(q.shape)
    grid = (-(-tokens // config.blocks["TOKENS"]), -(-heads // config.blocks["HEADS"]) + 2 * kv_heads)
    wrap(rotary_store_kernel)[grid](
        q,
        k,
        v,
        turned,
        k_cache,
        v_cache,
        slots,
        positions,
        inv_freq,
        tokens,
        q.stride(0),
        q.stride(1),
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        NH=heads,
        KV=kv_heads,
        BLOCK=k_cache.shape[3],
        DIMS=triton.next_power_of_2(dim),
        **_constants(dim, inv_freq, scale),
        **config.keywords,
    )
    return turned


def _flat(x: Tensor) -> Tensor:
    """Return x as [tokens, heads, D] with heads that lie in one piece; a view where it can be one."""
    x = x if x.dim() == 3 else x.flatten(0, -3)
    return x if x.stride(2) == 1 else x.contiguous()


def _constants(dim: int, inv_freq: Tensor, scale: float) -> dict[str, Any]:
    half = inv_freq.shape[0]
    return {
        "SCALE": scale,
        "D": dim,
        "HALF": half,
        "HALF_DIMS": triton.next_power_of_2(half),
        "REST_DIMS": triton.next_power_of_2(dim - 2 * half) if dim > 2 * half else 0,
    }


@triton.jit
def rotary_kernel(
    q,
    k,
    q_out,
    k_out,
    positions,
    inv_freq,
    tokens,
    q_stride,
    q_head_stride,
    k_stride,
    k_head_stride,
    SCALE: tl.constexpr,
    NH: tl.constexpr,
    KV: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    HALF_DIMS: tl.constexpr,
    REST_DIMS: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Program (x, y): tokens from x * TOKENS on, HEADS heads of q and then of k. q and k are [T, heads, D] of any two strides."""
    token, y = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tl.program_id(1)
    GROUPS: tl.constexpr = (NH + HEADS - 1) // HEADS
    if y < GROUPS:
        rotate_heads(
            q, q_out, positions, inv_freq, token, tokens, y * HEADS, q_stride, q_head_stride,
            SCALE, NH, D, HALF, HALF_DIMS, REST_DIMS, HEADS,
        )  # fmt: skip
    else:
        rotate_heads(
            k, k_out, positions, inv_freq, token, tokens, (y - GROUPS) * HEADS, k_stride, k_head_stride,
            SCALE, KV, D, HALF, HALF_DIMS, REST_DIMS, HEADS,
        )  # fmt: skip


@triton.jit
def rotary_store_kernel(
    q,
    k,
    v,
    q_out,
    k_cache,
    v_cache,
    slots,
    positions,
    inv_freq,
    tokens,
    q_stride,
    q_head_stride,
    k_stride,
    k_head_stride,
    v_stride,
    v_head_stride,
    SCALE: tl.constexpr,
    NH: tl.constexpr,
    KV: tl.constexpr,
    D: tl.constexpr,
    DIMS: tl.constexpr,
    HALF: tl.constexpr,
    HALF_DIMS: tl.constexpr,
    REST_DIMS: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Program (x, y): tokens from x * TOKENS on; HEADS heads of q, then one of k, then one of v."""
    token, y = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tl.program_id(1)
    GROUPS: tl.constexpr = (NH + HEADS - 1) // HEADS
    if y < GROUPS:
        rotate_heads(
            q, q_out, positions, inv_freq, token, tokens, y * HEADS, q_stride, q_head_stride,
            SCALE, NH, D, HALF, HALF_DIMS, REST_DIMS, HEADS,
        )  # fmt: skip
    else:
        slot = tl.load(slots + token, token < tokens, -1)
        if y < GROUPS + KV:
            rotate_keys(
                k, k_cache, positions, inv_freq, token, tokens, slot, y - GROUPS, k_stride, k_head_stride,
                SCALE, KV, D, HALF, HALF_DIMS, REST_DIMS, BLOCK,
            )  # fmt: skip
        else:
            copy_values(v, v_cache, token, slot, y - GROUPS - KV, v_stride, v_head_stride, KV, D, DIMS, BLOCK)


@triton.jit
def rotate_heads(
    x,
    out,
    positions,
    inv_freq,
    token,
    tokens,
    first,
    stride,
    head_stride,
    SCALE: tl.constexpr,
    COUNT: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    HALF_DIMS: tl.constexpr,
    REST_DIMS: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Rotate the heads first .. first + HEADS of COUNT of tokens [TOKENS] from x into `out` [T, COUNT, D], contiguous."""
    i, head = tl.arange(0, HALF_DIMS), first + tl.arange(0, HEADS)
    position = tl.load(positions + token, token < tokens, 0)
    cos, sin = cos_and_sin(position[:, None], tl.load(inv_freq + i, i < HALF, 0.0)[None, :])
    cos, sin = (cos * SCALE)[:, None, :], (sin * SCALE)[:, None, :]
    there = (token < tokens)[:, None, None] & (head < COUNT)[None, :, None]  # [TOKENS, HEADS, 1]
    from_ = x + ((token * stride)[:, None, None] + (head * head_stride)[None, :, None])
    to = out + ((token * (COUNT * D))[:, None, None] + (head * D)[None, :, None])
    turning = there & (i < HALF)[None, None, :]
    i = i[None, None, :]
    a = tl.load(from_ + i, turning, 0.0).to(tl.float32)
    b = tl.load(from_ + (HALF + i), turning, 0.0).to(tl.float32)
    tl.store(to + i, (a * cos - b * sin).to(out.dtype.element_ty), turning)
    tl.store(to + (HALF + i), (b * cos + a * sin).to(out.dtype.element_ty), turning)
    if REST_DIMS > 0:
        d = 2 * HALF + tl.arange(0, REST_DIMS)[None, None, :]
        rest = there & (d < D)
        tl.store(to + d, tl.load(from_ + d, rest, 0.0), rest)


@triton.jit
def rotate_keys(
    k,
    k_cache,
    positions,
    inv_freq,
    token,
    tokens,
    slot,
    head,
    stride,
    head_stride,
    SCALE: tl.constexpr,
    KV: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    HALF_DIMS: tl.constexpr,
    REST_DIMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rotate one head of the keys of tokens [TOKENS] into slots [TOKENS] of the cache; slot -1 takes nothing."""
    i = tl.arange(0, HALF_DIMS)
    position = tl.load(positions + token, token < tokens, 0)
    cos, sin = cos_and_sin(position[None, :], tl.load(inv_freq + i, i < HALF, 0.0)[:, None])  # [HALF_DIMS, TOKENS]
    cos, sin = cos * SCALE, sin * SCALE
    from_ = k + (token * stride + head * head_stride)[None, :]
    turning = (i < HALF)[:, None] & (slot >= 0)[None, :]
    i = i[:, None]
    a = tl.load(from_ + i, turning, 0.0).to(tl.float32)
    b = tl.load(from_ + (HALF + i), turning, 0.0).to(tl.float32)
    store_keys(k_cache, slot, head, a * cos - b * sin, turning, 0, KV, D, HALF_DIMS, BLOCK)
    store_keys(k_cache, slot, head, b * cos + a * sin, turning, HALF, KV, D, HALF_DIMS, BLOCK)
    if REST_DIMS > 0:
        d = 2 * HALF + tl.arange(0, REST_DIMS)[:, None]
        rest = (slot >= 0)[None, :] & (d < D)
        store_keys(k_cache, slot, head, tl.load(from_ + d, rest, 0.0), rest, 2 * HALF, KV, D, REST_DIMS, BLOCK)


@triton.jit
def cos_and_sin(positions, inv_freq):
    """Return cos and sin of positions * inv_freq, float32 and good to about one unit in the last place; shapes broadcast.

    The angle is the float32 product. It is reduced in float64 to within pi / 4 of a multiple of pi / 2: exact enough for any
    position up to 2^31, and a few instructions where three float32 terms of pi would do up to 10^5. Then come the first terms of
    the Taylor series, whose errors are below 3e-9.
    """
    angle = positions.to(tl.float32) * inv_freq
    quarters = tl.floor(angle.to(tl.float64) * 0.6366197723675814 + 0.5)  # 2 / pi
    x = (angle.to(tl.float64) - quarters * 1.5707963267948966).to(tl.float32)  # pi / 2
    y = x * x
    even = 1.0 + y * (-1 / 2 + y * (1 / 24 + y * (-1 / 720 + y * (1 / 40320 + y * (-1 / 3628800)))))
    odd = x + x * (y * (-1 / 6 + y * (1 / 120 + y * (-1 / 5040 + y * (1 / 362880)))))
    quarter = quarters.to(tl.int32)
    crossed = (quarter & 1) == 1
    cos, sin = tl.where(crossed, odd, even), tl.where(crossed, even, odd)
    return tl.where(((quarter + 1) & 2) == 2, -cos, cos), tl.where((quarter & 2) == 2, -sin, sin)
