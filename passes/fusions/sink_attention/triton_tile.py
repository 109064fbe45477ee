"""What the attention kernels do with a tile of rows: read paged keys and values block by block, and keep an online softmax.

A row is one query head of one token; rows of one tile share a KV head. Scores are kept in units of log2, so that exp2 serves.
A head of D dims is two parts, PART + REST >= D, each a power of two: 96 is 64 + 32, where 128 would be a third more work.
The weights of the softmax are split into two terms of 16 bits before they meet the values: rounded once, they alone would add as
much error as the rounding of the result.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def attend(
    queries,
    queries_rest,
    top,
    total,
    acc,
    acc_rest,
    index,
    k_head,
    v_head,
    table,
    begin,
    end,
    oldest,
    SCALE: tl.constexpr,
    LIFT: tl.constexpr,
    WINDOW: tl.constexpr,
    KV: tl.constexpr,
    D: tl.constexpr,
    PART: tl.constexpr,
    REST: tl.constexpr,
    BLOCK: tl.constexpr,
    KEYS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Take the keys begin <= j < end of one sequence into the softmax of a tile; return (top, total, acc, acc_rest).

    queries [ROWS, PART] and queries_rest [ROWS, REST]; the running maximum `top` and sum `total` are float32 [ROWS], acc and
    acc_rest float32 [ROWS, PART] and [ROWS, REST]. Row r is at position index[r] of the sequence. k_head and v_head point to this
    KV head in block 0 of the caches, `table` to the sequence's blocks. `begin` is a multiple of KEYS, which divides BLOCK. Where
    MASKED, rows see what is causal and inside the window, and only keys from `oldest` on have values; else every row sees all.
    Weights, and so `total` and the accumulators, are 2 ** LIFT times what they mean.
    """
    FACTOR: tl.constexpr = SCALE * 1.4426950408889634  # log2(e)
    j = tl.arange(0, KEYS)
    upcoming = tl.load(table + begin // BLOCK, begin < end, 0)
    for at in range(begin, end, KEYS):
        # The number of the next block is read while this one is worked on: the loads of keys wait for it.
        block, following = upcoming.to(tl.int64) * (KV * D * BLOCK), at + KEYS
        upcoming = tl.load(table + following // BLOCK, following < end, 0)
        inside = tl.multiple_of(at % BLOCK, KEYS)  # which the compiler cannot always tell; without it, it loads key by key
        keys, values, key = k_head + (block + inside), v_head + (block + inside * D), at + j
        scores = tl.dot(queries, load_keys(keys, 0, PART, D, BLOCK, KEYS), input_precision="ieee")
        if REST > 0:
            scores = tl.dot(queries_rest, load_keys(keys, PART, REST, D, BLOCK, KEYS), scores, input_precision="ieee")
        if MASKED:
            seen = key[None, :] <= index[:, None]
            if WINDOW > 0:
                seen = seen & (key[None, :] > index[:, None] - WINDOW)
            scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1) * FACTOR)
        base = higher
        if MASKED:  # a row that sees no key yet
            base = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(scores * FACTOR - (base - LIFT)[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(weights, 1)
        # Values of slots that nobody sees may be NaN, and 0 * NaN is NaN.
        there = (key >= oldest) & (key < end)
        acc = add_product(acc * shrink[:, None], weights, load_values(values, there, 0, PART, D, KEYS, MASKED))
        if REST > 0:
            rest = load_values(values, there, PART, REST, D, KEYS, MASKED)
            acc_rest = add_product(acc_rest * shrink[:, None], weights, rest)
        top = higher
    return top, total, acc, acc_rest


@triton.jit
def add_product(acc, weights, values):
    """Return acc + weights @ values, with float32 weights [ROWS, KEYS] and values [KEYS, dims] of any dtype."""
    if values.dtype == tl.float32:
        acc = tl.dot(weights, values, acc, input_precision="ieee")
    else:
        high = weights.to(values.dtype)
        low = (weights - high.to(tl.float32)).to(values.dtype)
        acc = tl.dot(low, values, tl.dot(high, values, acc))
    return acc


@triton.jit
def load_keys(keys, FIRST: tl.constexpr, DIMS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr):
    """Return dims FIRST.. of KEYS keys that lie side by side in a block, [DIMS, KEYS]; dims beyond D are 0."""
    d = FIRST + tl.arange(0, DIMS)[:, None]
    place = keys + (d * BLOCK + tl.arange(0, KEYS)[None, :])
    if FIRST + DIMS > D:
        tile = tl.load(place, d < D, 0.0)
    else:
        tile = tl.load(place)
    return tile


@triton.jit
def load_values(
    values,
    there,
    FIRST: tl.constexpr,
    DIMS: tl.constexpr,
    D: tl.constexpr,
    KEYS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Return dims FIRST.. of the values of KEYS keys of a block, [KEYS, DIMS]; 0 beyond D and, where MASKED, unless `there`."""
    d = FIRST + tl.arange(0, DIMS)[None, :]
    place = values + (tl.arange(0, KEYS)[:, None] * D + d)
    if FIRST + DIMS > D:
        if MASKED:
            tile = tl.load(place, there[:, None] & (d < D), 0.0)
        else:
            tile = tl.load(place, d < D, 0.0)
    elif MASKED:
        tile = tl.load(place, there[:, None], 0.0)
    else:
        tile = tl.load(place)
    return tile


@triton.jit
def load_rows(q, row, mine, FIRST: tl.constexpr, DIMS: tl.constexpr, D: tl.constexpr):
    """Return dims FIRST.. of the rows that begin at q + row, [ROWS, DIMS]; 0 where not `mine` and beyond D."""
    d = FIRST + tl.arange(0, DIMS)[None, :]
    return tl.load(q + (row[:, None] + d), mine[:, None] & (d < D), 0.0)


@triton.jit
def store_rows(out, row, tile, mine, FIRST: tl.constexpr, DIMS: tl.constexpr, D: tl.constexpr):
    """Store dims FIRST.. of the rows that begin at out + row where `mine`; tile [ROWS, DIMS] is cast to the dtype of `out`."""
    d = FIRST + tl.arange(0, DIMS)[None, :]
    tl.store(out + (row[:, None] + d), tile.to(out.dtype.element_ty), mine[:, None] & (d < D))
