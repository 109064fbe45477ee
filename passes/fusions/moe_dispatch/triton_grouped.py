"""The two products of the experts for many tokens on GPUs: pairs of token and expert are sorted by expert and cut into tiles.

Weights are the left operand, so that the tensor cores take decoded rows out of registers, and few tokens an expert make a narrow
tile. Sixteen rows of a gate and up tile are 8 gates and their 8 up projections, which end in the same thread; where the experts
are views of columns, rows lie side by side in memory and keep their order, and sums change places at the end. The hidden values
between the products are two 16-bit terms: rounded once, they alone would add as much error as the rounding of the result.
"""

from __future__ import annotations

import triton
import triton.language as tl

from oxfuse.passes.fusions.moe_dispatch.triton_mxfp4 import UNLIFT, left_operand, natural, word_rows
from oxfuse.passes.fusions.moe_dispatch.triton_route import tile_of


@triton.jit
def gate_up_kernel(
    x,
    x_stride,
    order,
    starts,
    weight,
    scales,
    bias,
    hidden,
    H: tl.constexpr,
    INNER: tl.constexpr,
    STRIDE: tl.constexpr,
    TERMS: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    MXFP4: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,
    EXPERTS: tl.constexpr,
    WARPS: tl.constexpr,
    ROWS: tl.constexpr,
    PAIRS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Program (i, j): hidden features from i * ROWS // 2, tile j of the sorted pairs.

    x [T, H], or [T, H rounded up to 128] in the order `natural` where MXFP4; weight, scales and bias as in reference.py, the
    weight [E, H, 2 INNER] where COLUMNS. hidden [pairs, TERMS, STRIDE] is by place in `order`, in the order `natural` and 0
    beyond INNER where MXFP4.
    """
    expert, first, end = tile_of(starts, tl.program_id(1), E, EXPERTS, PAIRS)
    if first >= end:
        return
    n = tl.arange(0, PAIRS)
    pair = tl.load(order + first + n, first + n < end, 0)
    tokens = x + (pair // K)[:, None] * x_stride
    base = tl.program_id(0) * (ROWS // 2)
    r = tl.arange(0, ROWS)
    if COLUMNS:
        own = tl.minimum(2 * base + r, 2 * INNER - 1)
    else:
        own = gate_up_row(base, r, INNER, MXFP4)
    offset = tl.load(bias + expert * (2 * INNER) + own).to(tl.float32)
    acc = tl.zeros([ROWS, PAIRS], tl.float32)
    if MXFP4:
        rows = gate_up_row(base, word_rows(ROWS, WARPS), INNER, True)
        acc = add_mxfp4(acc, weight, scales, expert, rows, tokens, 0, H, 2 * INNER, 1, WIDE, ROWS, WARPS)
    elif COLUMNS:
        acc = add_columns(acc, weight, expert, 2 * base, tokens, 0, H, 2 * INNER, 1, ROWS, DEPTH)
    else:
        acc = add_dense(acc, weight, expert, own, tokens, 0, H, 2 * INNER, 1, DEPTH)
    if COLUMNS:
        gate, up = tl.split(tl.permute(tl.reshape(acc + offset[:, None], [ROWS // 2, 2, PAIRS]), (0, 2, 1)))
    else:
        sums = tl.reshape(acc + offset[:, None], [ROWS // 16, 2, 8, PAIRS])
        gate, up = tl.split(tl.permute(sums, (0, 2, 3, 1)))
    values = tl.reshape(swiglu(gate, up, ALPHA, LIMIT), [ROWS // 2, PAIRS])
    place = base + tl.arange(0, ROWS // 2)
    values = tl.where((gate_up_feature(place, MXFP4) < INNER)[:, None], values, 0.0)
    at = hidden + (first + n)[None, :] * (TERMS * STRIDE) + place[:, None]
    store_terms(at, values, (first + n < end)[None, :] & (place < STRIDE)[:, None], STRIDE, TERMS)


@triton.jit
def down_kernel(
    hidden,
    order,
    starts,
    weight,
    scales,
    bias,
    weights,
    out,
    H: tl.constexpr,
    INNER: tl.constexpr,
    STRIDE: tl.constexpr,
    TERMS: tl.constexpr,
    E: tl.constexpr,
    MXFP4: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,
    EXPERTS: tl.constexpr,
    WARPS: tl.constexpr,
    ROWS: tl.constexpr,
    PAIRS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Program (i, j): output features from i * ROWS, tile j of the sorted pairs.

    hidden as `gate_up_kernel` leaves it; weights float32 [T * K] is by pair, and so is out float32 [T * K, H]: weighted outputs.
    """
    expert, first, end = tile_of(starts, tl.program_id(1), E, EXPERTS, PAIRS)
    if first >= end:
        return
    n = tl.arange(0, PAIRS)
    pair = tl.load(order + first + n, first + n < end, 0)
    share = tl.load(weights + pair)
    tokens = hidden + tl.minimum(first + n, end - 1)[:, None] * (TERMS * STRIDE)
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    own = tl.minimum(r, H - 1)
    offset = tl.load(bias + expert * H + own).to(tl.float32)
    acc = tl.zeros([ROWS, PAIRS], tl.float32)
    if MXFP4:
        rows = tl.minimum(tl.program_id(0) * ROWS + word_rows(ROWS, WARPS), H - 1)
        acc = add_mxfp4(acc, weight, scales, expert, rows, tokens, STRIDE, INNER, H, TERMS, WIDE, ROWS, WARPS)
    elif COLUMNS:
        acc = add_columns(acc, weight, expert, tl.program_id(0) * ROWS, tokens, STRIDE, INNER, H, TERMS, ROWS, DEPTH)
    else:
        acc = add_dense(acc, weight, expert, own, tokens, STRIDE, INNER, H, TERMS, DEPTH)
    at = out + pair[None, :] * H + r[:, None]
    tl.store(at, (acc + offset[:, None]) * share[None, :], (first + n < end)[None, :] & (r < H)[:, None])


@triton.jit
def add_mxfp4(
    acc,
    weight,
    scales,
    expert,
    rows,
    tokens,
    term_stride,
    DEPTH: tl.constexpr,
    OUTPUTS: tl.constexpr,
    TERMS: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    WARPS: tl.constexpr,
):
    """Return acc [ROWS, pairs] plus the product of an expert's rows with the sum of TERMS terms of `tokens`.

    weight [E, OUTPUTS, DEPTH / 32, 16] and scales [E, OUTPUTS, DEPTH / 32], uint8. rows int32 [.., WARPS, 8] are valid rows,
    placed as by `word_rows`. tokens [pairs, 1] point to rows in the order `natural`, finite up to a multiple of 128; acc is 0.
    """
    BLOCKS: tl.constexpr = DEPTH // 32
    t, w, k = tl.arange(0, 4), tl.arange(0, 4), tl.arange(0, 128)
    start = expert.to(tl.int64) * (OUTPUTS * BLOCKS)
    at = rows[:, :, :, None] * BLOCKS + t[None, None, None, :]
    words = (weight + start * 16).to(tl.pointer_type(tl.uint32)) + (at[:, :, :, :, None] * 4 + w)
    bytes = scales + start + at
    # Triton prefetches words and tokens through shared memory, but loads of single bytes only as far as the program says so.
    upcoming = tl.load(tl.max_contiguous(bytes, [1, 1, 1, 1]), t < BLOCKS, 0)
    for block in range(0, BLOCKS, 4):
        current = upcoming
        upcoming = tl.load(tl.max_contiguous(bytes + block + 4, [1, 1, 1, 1]), t < BLOCKS - block - 4, 0)
        if BLOCKS % 4 == 0:
            tile = tl.load(words + block * 4)
        else:
            tile = tl.load(words + block * 4, (t < BLOCKS - block)[:, None], 0)
        left = left_operand(tile, current, ROWS, WARPS, WIDE)
        for term in tl.static_range(TERMS):
            right = tl.trans(tl.load(tokens + (term * term_stride + block * 32 + k[None, :])))
            if WIDE:
                acc = tl.dot(left, right.to(tl.float32), acc, input_precision="ieee")
            else:
                acc = tl.dot(left, right, acc)
    return acc * UNLIFT


@triton.jit
def add_dense(
    acc,
    weight,
    expert,
    rows,
    tokens,
    term_stride,
    DEPTH: tl.constexpr,
    OUTPUTS: tl.constexpr,
    TERMS: tl.constexpr,
    STEP: tl.constexpr,
):
    """Return acc as `add_mxfp4` does, with weight [E, OUTPUTS, DEPTH] in the dtype of tokens, rows [ROWS] and natural order."""
    k = tl.arange(0, STEP)[None, :]
    left = weight + expert.to(tl.int64) * (OUTPUTS * DEPTH) + rows[:, None] * DEPTH + k
    for at in range(0, DEPTH, STEP):
        inside = k < DEPTH - at
        if DEPTH % STEP == 0:
            tile = tl.load(left + at)
        else:
            tile = tl.load(left + at, inside, 0.0)
        for term in tl.static_range(TERMS):
            if DEPTH % STEP == 0:
                right = tl.load(tokens + (term * term_stride + at + k))
            else:
                right = tl.load(tokens + (term * term_stride + at + k), inside, 0.0)
            acc = tl.dot(tile, tl.trans(right), acc, input_precision="ieee")
    return acc


@triton.jit
def add_columns(
    acc,
    weight,
    expert,
    base,
    tokens,
    term_stride,
    DEPTH: tl.constexpr,
    OUTPUTS: tl.constexpr,
    TERMS: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
):
    """Return acc as `add_dense` does, of ROWS rows from `base` on that lie side by side: weight [E, DEPTH, OUTPUTS].

    Rows beyond OUTPUTS count as 0.
    """
    k, row = tl.arange(0, STEP), base + tl.arange(0, ROWS)
    left = weight + expert.to(tl.int64) * (OUTPUTS * DEPTH) + k[:, None] * OUTPUTS + row[None, :]
    for at in range(0, DEPTH, STEP):
        inside = k < DEPTH - at
        # A mask that changes from value to value would let every value be loaded alone.
        if OUTPUTS % ROWS == 0 and DEPTH % STEP == 0:
            tile = tl.load(left + at * OUTPUTS)
        elif OUTPUTS % ROWS == 0:
            tile = tl.load(left + at * OUTPUTS, inside[:, None], 0.0)
        else:
            tile = tl.load(left + at * OUTPUTS, inside[:, None] & (row < OUTPUTS)[None, :], 0.0)
        for term in tl.static_range(TERMS):
            if DEPTH % STEP == 0:
                right = tl.load(tokens + (term * term_stride + at + k[None, :]))
            else:
                right = tl.load(tokens + (term * term_stride + at + k[None, :]), inside[None, :], 0.0)
            acc = tl.dot(tl.trans(tile), tl.trans(right), acc, input_precision="ieee")
    return acc


@triton.jit
def gate_up_row(base, r, INNER: tl.constexpr, MXFP4: tl.constexpr):
    """Return the row of gate_up that is row r of the tile from hidden feature `base` on: of 16 rows, 8 gates, then 8 ups."""
    feature = gate_up_feature(base + r // 16 * 8 + r % 8, MXFP4)
    return tl.minimum(feature, INNER - 1) * 2 + r // 8 % 2


@triton.jit
def gate_up_feature(place, MXFP4: tl.constexpr):
    """Return the hidden feature that is stored at `place`."""
    feature = place
    if MXFP4:
        feature = natural(place)
    return feature


@triton.jit
def swiglu(gate, up, ALPHA: tl.constexpr, LIMIT: tl.constexpr):
    """Return (up + 1) * gate * sigmoid(ALPHA * gate) of float32 values, the gate clamped from above, up on both sides."""
    # Comparisons keep NaN, which minimum and maximum drop.
    gate = tl.where(gate > LIMIT, LIMIT, gate)
    up = tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up))
    return (up + 1) * gate / (1 + tl.exp(-ALPHA * gate))


@triton.jit
def store_terms(at, values, mask, stride, TERMS: tl.constexpr):
    """Store float32 values as the sum of TERMS terms in the dtype of `at`, a term `stride` behind the one before."""
    for term in tl.static_range(TERMS):
        rounded = values.to(at.dtype.element_ty)
        tl.store(at + term * stride, rounded, mask)
        values -= rounded.to(tl.float32)
