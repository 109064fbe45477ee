"""The GPU kernel of `qkv_rotary`: the product of `linear_rows`, whose epilogue rotates and writes into the cache.

A program owns ROWS / 2 pairs of dims of one head of q, k or v: the dims that a rotation mixes, so that no two programs exchange
anything. Dims that do not turn are paired as well, to go through the same code with an angle of 0 and a scale of 1.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from oxfuse.passes.fusions import tuning
from oxfuse.passes.fusions.linear.triton import dtype_name, rows_times_tokens
from oxfuse.passes.fusions.rotary_embedding.triton import cos_and_sin


def launch_qkv_rotary(
    wrap: Callable[[Any], Any],
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
    *,
    arch: int,
) -> Tensor:
    """Launch the kernel; arguments and result as in reference.py. `wrap` makes a kernel launchable, `arch` 90 is sm_90."""
    x, (heads, head_dim, depth) = x.contiguous(), q_weight.shape
    weights = [_dense_heads(weight) for weight in (q_weight, k_weight, v_weight)]
    biases, given = weights, (q_bias, k_bias, v_bias)
    biased = any(bias is not None for bias in given)
    if biased:
        biases = [w.new_zeros(w.shape[:2]) if b is None else _dense_heads(b) for w, b in zip(weights, given, strict=True)]
    tokens, kv_heads, rotated = x.shape[0], k_cache.shape[1], inv_freq.shape[0]
    config = tuning.choose(Path(__file__).parent, "qkv_rotary", arch, dtype=dtype_name(x))
    pairs = rotated + -(-(head_dim - 2 * rotated) // 2)
    slices = -(-pairs // (config.blocks["ROWS"] // 2))
    q = x.new_empty(tokens, heads, head_dim)
    wrap(qkv_rotary_kernel)[(-(-tokens // config.blocks["TOKENS"]), (heads + 2 * kv_heads) * slices)](
        x,
        *weights,
        *biases,
        positions,
        inv_freq,
        slots,
        q,
        k_cache,
        v_cache,
        tokens,
        **{f"{which}_WEIGHT_STRIDE": weight.stride(0) for which, weight in zip("QKV", weights, strict=True)},
        **{f"{which}_BIAS_STRIDE": bias.stride(0) for which, bias in zip("QKV", biases, strict=True)},
        SCALE=scale,
        BIAS=biased,
        H=depth,
        NH=heads,
        KV=kv_heads,
        D=head_dim,
        HALF=rotated,
        PAIRS=pairs,
        SLICES=slices,
        BLOCK_SIZE=k_cache.shape[3],
        **config.keywords,
    )
    return q


def _dense_heads(x: Tensor) -> Tensor:
    """Return x [heads, ...] with each head contiguous; what lies between heads may stay."""
    dense = x.stride(-1) == 1 and (x.dim() == 2 or x.stride(1) == x.shape[2])
    return x if dense else x.contiguous()


@triton.jit
def qkv_rotary_kernel(
    x,
    q_weight,
    k_weight,
    v_weight,
    q_bias,
    k_bias,
    v_bias,
    positions,
    inv_freq,
    slots,
    q,
    k_cache,
    v_cache,
    T,
    Q_WEIGHT_STRIDE: tl.constexpr,
    K_WEIGHT_STRIDE: tl.constexpr,
    V_WEIGHT_STRIDE: tl.constexpr,
    Q_BIAS_STRIDE: tl.constexpr,
    K_BIAS_STRIDE: tl.constexpr,
    V_BIAS_STRIDE: tl.constexpr,
    SCALE: tl.constexpr,
    BIAS: tl.constexpr,
    H: tl.constexpr,
    NH: tl.constexpr,
    KV: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    PAIRS: tl.constexpr,
    SLICES: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    SPLIT: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """x [T, H], weights [heads, D, H] and biases by kind, strides from head to head; q [T, NH, D]; caches as in reference.py.

    Program (i, j): tokens from i * TOKENS, slice j % SLICES of the pairs of head j // SLICES: those of q, then of k, then of v.
    """
    head, part = tl.program_id(1) // SLICES, tl.program_id(1) % SLICES
    weight, bias, local = q_weight + head * Q_WEIGHT_STRIDE, q_bias + head * Q_BIAS_STRIDE, head
    if head >= NH:
        local = head - NH
        weight, bias = k_weight + local * K_WEIGHT_STRIDE, k_bias + local * K_BIAS_STRIDE
    if head >= NH + KV:
        local = head - NH - KV
        weight, bias = v_weight + local * V_WEIGHT_STRIDE, v_bias + local * V_BIAS_STRIDE

    # Pair p is dims p and p + HALF where they turn; of the rest, the first half is paired with the second.
    REST: tl.constexpr = PAIRS - HALF
    HALF_ROWS: tl.constexpr = ROWS // 2
    row = tl.arange(0, ROWS)
    pair, second = part * HALF_ROWS + row % HALF_ROWS, row // HALF_ROWS
    dim = tl.where(pair < HALF, pair + second * HALF, HALF + pair + second * REST)
    sums = rows_times_tokens(x, tl.program_id(0) * TOKENS, T, weight, tl.minimum(dim, D - 1), H, ROWS, TOKENS, SPLIT, DEPTH)
    if BIAS:
        sums += tl.load(bias + tl.minimum(dim, D - 1)).to(tl.float32)[:, None]
    a, b = tl.split(tl.permute(tl.reshape(sums, (2, HALF_ROWS, TOKENS)), (1, 2, 0)))  # [HALF_ROWS, TOKENS] each

    token, pair = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), part * HALF_ROWS + tl.arange(0, HALF_ROWS)
    there, turns = token < T, pair < tl.where(head < NH + KV, HALF, 0)
    cos, sin = cos_and_sin(
        tl.load(positions + token, there, 0)[None, :], tl.load(inv_freq + pair, pair < HALF, 0.0)[:, None]
    )  # [HALF_ROWS, TOKENS]
    cos, sin = tl.where(turns[:, None], cos * SCALE, 1.0), tl.where(turns[:, None], sin * SCALE, 0.0)
    a, b = a * cos - b * sin, b * cos + a * sin

    dim, gap = tl.where(pair < HALF, pair, HALF + pair), tl.where(pair < HALF, HALF, REST)
    first, last = (pair < PAIRS)[:, None], (pair < PAIRS)[:, None] & (dim + gap < D)[:, None]
    if head < NH:
        to = q + (token * NH + local)[None, :] * D + dim[:, None]
        tl.store(to, a.to(q.dtype.element_ty), first & there[None, :])
        tl.store(to + gap[:, None], b.to(q.dtype.element_ty), last & there[None, :])
    else:
        slot = tl.load(slots + token, there, -1)
        used, block = (slot >= 0)[None, :], (slot // BLOCK_SIZE * KV + local) * (D * BLOCK_SIZE)
        offset = slot % BLOCK_SIZE
        if head < NH + KV:
            to = k_cache + (block + offset)[None, :] + dim[:, None] * BLOCK_SIZE
            tl.store(to, a.to(k_cache.dtype.element_ty), first & used)
            tl.store(to + gap[:, None] * BLOCK_SIZE, b.to(k_cache.dtype.element_ty), last & used)
        else:
            to = v_cache + (block + offset * D)[None, :] + dim[:, None]
            tl.store(to, a.to(v_cache.dtype.element_ty), first & used)
            tl.store(to + gap[:, None], b.to(v_cache.dtype.element_ty), last & used)
