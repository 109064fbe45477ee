"""The experts for the few tokens of a decode step on GPUs, where the time goes into reading weights.

Nothing is sorted. A program takes some rows of one expert for up to TOKENS tokens that chose it: the program of a pair of token
and slot finds out from the logits which tokens before it chose the same expert, and leaves the work to another one where it is
not the first, the TOKENS-th and so on. So weights are read once for TOKENS tokens, and tensor cores, whose narrowest tile has 8
columns, do the work of one. The warps of a program share its rows and cut them along K; their sums are added at the end, in a
fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from oxfuse.passes.fusions.moe_dispatch.triton_grouped import store_terms, swiglu
from oxfuse.passes.fusions.moe_dispatch.triton_mxfp4 import UNLIFT, decode
from oxfuse.passes.fusions.moe_dispatch.triton_route import LOWEST, load_keys, logit_of, ordered


@triton.jit
def group_of(logits, pair, T, E: tl.constexpr, K: tl.constexpr, EXPERTS: tl.constexpr, TOKENS: tl.constexpr):
    """Return (expert, leads, tokens, slots) of pair token * K + slot; logits float32 [T, E].

    leads: whether this pair's program does the work of the group, which is tokens [TOKENS], T where there is none, with the slots
    [TOKENS] in which they chose the expert.
    """
    owner, slot, column = pair // K, pair % K, tl.arange(0, TOKENS)
    number = tl.arange(0, EXPERTS)
    row, there = logits + owner * E + number, number < E
    keys = tl.where(there, ordered(tl.load(row, there, 0.0), number), LOWEST)
    # The K-th largest by comparing all with all: rounds of maxima would wait for each other.
    rank = tl.sum((keys[:, None] > keys[None, :]).to(tl.int32), 0)
    expert = tl.sum(tl.where(there & (rank == slot), number, 0), 0)
    before = 0
    tokens, slots = tl.where(column == 0, owner, T), tl.where(column == 0, slot, 0)
    if T > 1:
        found = 0
        tokens, slots = tl.full([TOKENS], T, tl.int32), tl.zeros([TOKENS], tl.int32)
        for first in range(0, T, 8):
            token = first + tl.arange(0, 8)
            others = load_keys(logits, token, T, E, EXPERTS)
            own = ordered(tl.load(logits + token * E + expert, token < T, 0.0), expert)
            place = tl.sum((others > own[:, None]).to(tl.int32), 1)
            chose = (token < T) & (place < K)
            before += tl.sum((chose & (token < owner)).to(tl.int32), 0)
            later = (chose & (token >= owner)).to(tl.int32)
            at = found + tl.cumsum(later, 0) - later
            here = (later[:, None] > 0) & (at[:, None] == column[None, :])
            tokens += tl.sum(tl.where(here, (token - T)[:, None], 0), 0)
            slots += tl.sum(tl.where(here, place[:, None], 0), 0)
            found += tl.sum(later, 0)
    return expert, before % TOKENS == 0, tokens, slots


@triton.jit
def few_gate_up_kernel(
    x,
    logits,
    weight,
    scales,
    bias,
    hidden,
    members,
    expert_of_pair,
    shares,
    T,
    H: tl.constexpr,
    INNER: tl.constexpr,
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
    TOKENS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Program (i, p): hidden features from i * ROWS // 2 for the group of pair p. x [T, H], logits float32 [T, E].

    hidden [T * K, TERMS, INNER] is by pair, in the order of `turned` where MXFP4. For `few_down_kernel`
    the first program of a pair leaves: members int32 [T * K, TOKENS], the pairs of its group, -1 where there is none;
    expert_of_pair int32 [T * K]; and for each member its share of the token's result, float32 [T * K].
    """
    pair, column = tl.program_id(1), tl.arange(0, TOKENS)
    expert, leads, tokens, slots = group_of(logits, pair, T, E, K, EXPERTS, TOKENS)
    there = leads & (tokens < T)
    pairs = tokens * K + slots
    if tl.program_id(0) == 0:
        tl.store(members + pair * TOKENS + column, tl.where(there, pairs, -1))
        tl.store(expert_of_pair + pair, expert)
    if not leads:
        return
    if tl.program_id(0) == 0:
        tl.store(shares + pairs, share_of(logits, tokens, expert, T, E, K, EXPERTS), there)

    base = tl.program_id(0) * ROWS
    row = base + tl.arange(0, ROWS)
    own = tl.minimum(row, 2 * INNER - 1)
    sums = product(
        x + tokens * H,
        there,
        weight,
        scales,
        expert,
        base,
        H,
        2 * INNER,
        1,
        False,
        MXFP4,
        COLUMNS,
        WIDE,
        WARPS,
        ROWS,
        TOKENS,
        DEPTH,
    )
    sums += tl.load(bias + expert * (2 * INNER) + own).to(tl.float32)[:, None]
    gate, up = tl.split(tl.permute(tl.reshape(sums, [ROWS // 2, 2, TOKENS]), (0, 2, 1)))
    feature = base // 2 + tl.arange(0, ROWS // 2)
    place = feature
    if MXFP4:
        place = turned(feature)
    at = hidden + (pairs * (TERMS * INNER))[None, :] + place[:, None]
    store_terms(at, swiglu(gate, up, ALPHA, LIMIT), there[None, :] & (feature < INNER)[:, None], INNER, TERMS)


@triton.jit
def share_of(logits, tokens, expert, T, E: tl.constexpr, K: tl.constexpr, EXPERTS: tl.constexpr):
    """Return the softmax weight of `expert` among the K largest logits of tokens [TOKENS], float32 [TOKENS]."""
    keys = load_keys(logits, tokens, T, E, EXPERTS)
    top = logit_of(tl.max(keys, 1))
    total = tl.zeros_like(top)
    for _ in tl.static_range(K):
        best = tl.max(keys, 1)
        total += tl.exp(logit_of(best) - top)
        keys = tl.where(keys == best[:, None], LOWEST, keys)
    own = tl.load(logits + tokens * E + expert, tokens < T, 0.0)
    return tl.exp(own - top) / total


@triton.jit
def few_down_kernel(
    hidden,
    members,
    expert_of_pair,
    shares,
    weight,
    scales,
    bias,
    out,
    H: tl.constexpr,
    INNER: tl.constexpr,
    TERMS: tl.constexpr,
    MXFP4: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,
    WARPS: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Program (i, p): output features from i * ROWS for the group of pair p; all but `out` as `few_gate_up_kernel` leaves it.

    out float32 [T * K, H] is by pair: weighted outputs.
    """
    pair = tl.program_id(1)
    pairs = tl.load(members + pair * TOKENS + tl.arange(0, TOKENS))
    if tl.max(pairs, 0) < 0:
        return
    there = pairs >= 0
    expert = tl.load(expert_of_pair + pair)
    share = tl.load(shares + pairs, there, 0.0)
    base = tl.program_id(0) * ROWS
    row = base + tl.arange(0, ROWS)
    at = hidden + pairs * (TERMS * INNER)
    sums = product(
        at, there, weight, scales, expert, base, INNER, H, TERMS, True, MXFP4, COLUMNS, WIDE, WARPS, ROWS, TOKENS, DEPTH
    )
    sums += tl.load(bias + expert * H + tl.minimum(row, H - 1)).to(tl.float32)[:, None]
    tl.store(out + (pairs * H)[None, :] + row[:, None], sums * share[None, :], there[None, :] & (row < H)[:, None])


@triton.jit
def product(
    tokens,
    there,
    weight,
    scales,
    expert,
    base,
    K: tl.constexpr,
    OUTPUTS: tl.constexpr,
    TERMS: tl.constexpr,
    TURNED: tl.constexpr,
    MXFP4: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,
    WARPS: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Return the products of ROWS rows of an expert from row `base` on with the rows at `tokens` [TOKENS], float32 [ROWS,
    TOKENS].

    Rows of `tokens` that are not `there` count as 0; rows of the weight beyond OUTPUTS are of no use. A token's row is the
    sum of TERMS rows of K values; TURNED says that these are in the order of `turned`. Warp s has pieces s, s + WARPS .. along K,
    of 128 values where MXFP4, else of DEPTH.
    """
    if MXFP4:
        sums = mxfp4_sums(tokens, there, weight, scales, expert, base, K, OUTPUTS, TERMS, TURNED, WIDE, WARPS, ROWS, TOKENS)
    else:
        sums = dense_sums(tokens, there, weight, expert, base, K, OUTPUTS, TERMS, COLUMNS, WARPS, ROWS, TOKENS, DEPTH)
    return tl.sum(tl.reshape(tl.sum(sums, 0), [ROWS, TERMS, TOKENS]), 1)


@triton.jit
def mxfp4_sums(
    tokens,
    there,
    weight,
    scales,
    expert,
    base,
    K: tl.constexpr,
    OUTPUTS: tl.constexpr,
    TERMS: tl.constexpr,
    TURNED: tl.constexpr,
    WIDE: tl.constexpr,
    WARPS: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Return each warp's part of the products with every term, float32 [WARPS, ROWS, TERMS * TOKENS]."""
    BLOCKS: tl.constexpr = K // 32
    a, s, c, t = tl.arange(0, ROWS // 8), tl.arange(0, WARPS), tl.arange(0, 8), tl.arange(0, 4)
    row = tl.minimum(base + (a * 8)[:, None, None, None] + c[None, None, :, None], OUTPUTS - 1)
    piece = (s * 4)[None, :, None, None] + t[None, None, None, :]  # [1, WARPS, 1, 4]
    start = expert.to(tl.int64) * (OUTPUTS * BLOCKS)
    at = row * BLOCKS + piece
    words = (weight + start * 16).to(tl.pointer_type(tl.uint32)) + (at[:, :, :, :, None] * 4 + t)
    bytes = scales + start + at
    value = (t * 8)[:, None, None, None, None] + (piece * 32)[:, :, :, :, None] + tl.arange(0, 8)  # [4, WARPS, 1, 4, 8]
    term = (tl.arange(0, TERMS) * K)[:, None, None, None, None, None]
    right = tokens[None, None, None, :, None, None] + (term + value[None, :, :, :, :, :])
    mine = there[None, None, None, :, None, None]
    sums = tl.zeros([WARPS, ROWS, TERMS * TOKENS], tl.float32)
    for block in range(0, BLOCKS, 4 * WARPS):
        inside = piece < BLOCKS - block
        tile = tl.load(words + block * 4, inside[:, :, :, :, None], 0)
        scale = tl.load(tl.max_contiguous(bytes + block, [1, 1, 1, 1]), inside, 0)
        values = decode(tile, scale)  # [ROWS // 8, WARPS, 8, 4, 4, 2, 2, 2]
        left = tl.reshape(tl.permute(values, (1, 0, 2, 4, 3, 5, 6, 7)), [WARPS, ROWS, 128])
        part = tl.load(right + block * 32, mine & inside[None, :, :, :, :, None], 0.0)
        columns = right_operand(part, TURNED, TERMS, WARPS, TOKENS)
        if WIDE:
            sums = tl.dot(left.to(tl.float32), columns.to(tl.float32), sums, input_precision="ieee")
        else:
            sums = tl.dot(left, columns, sums)
    return sums * UNLIFT


@triton.jit
def right_operand(part, TURNED: tl.constexpr, TERMS: tl.constexpr, WARPS: tl.constexpr, TOKENS: tl.constexpr):
    """Return values [TERMS, 4, WARPS, TOKENS, 4, 8] as [WARPS, 128, TERMS * TOKENS], in the order that decoded values come in.

    Element (.., q, .., t, n) is number 32 t + 8 q + n of its row's 128, or, where TURNED, at this place in the order of `turned`.
    """
    if TURNED:
        parts = tl.permute(tl.reshape(part, [TERMS, 2, 2, WARPS, TOKENS, 4, 2, 2, 2]), (3, 1, 7, 5, 2, 6, 8, 0, 4))
    else:
        parts = tl.permute(tl.reshape(part, [TERMS, 4, WARPS, TOKENS, 4, 2, 2, 2]), (2, 1, 4, 6, 7, 5, 0, 3))
    return tl.reshape(parts, [WARPS, 128, TERMS * TOKENS])


@triton.jit
def dense_sums(
    tokens,
    there,
    weight,
    expert,
    base,
    K: tl.constexpr,
    OUTPUTS: tl.constexpr,
    TERMS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WARPS: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Return what `mxfp4_sums` does, of weights [E, OUTPUTS, K], or [E, K, OUTPUTS] where COLUMNS, in the dtype of the tokens."""
    s, k, n = tl.arange(0, WARPS), tl.arange(0, DEPTH), tl.arange(0, TERMS * TOKENS)
    piece = (s * DEPTH)[:, None, None] + k[None, None, :]
    if COLUMNS:
        row = base + tl.arange(0, ROWS)
        down = (s * DEPTH)[:, None, None] + k[None, :, None]
        left = weight + expert.to(tl.int64) * (OUTPUTS * K) + down * OUTPUTS + row[None, None, :]
    else:
        row = tl.minimum(base + tl.arange(0, ROWS), OUTPUTS - 1)
        left = weight + expert.to(tl.int64) * (OUTPUTS * K) + row[None, :, None] * K + piece
    both = tl.reshape(tl.broadcast_to(tokens[None, :], [TERMS, TOKENS]), [TERMS * TOKENS])
    mine = tl.reshape(tl.broadcast_to(there[None, :], [TERMS, TOKENS]), [TERMS * TOKENS])
    right = both[None, :, None] + ((n // TOKENS * K)[None, :, None] + piece)
    sums = tl.zeros([WARPS, ROWS, TERMS * TOKENS], tl.float32)
    for at in range(0, K, WARPS * DEPTH):
        inside = piece < K - at
        if COLUMNS:
            tile = tl.load(left + at * OUTPUTS, (down < K - at) & (row < OUTPUTS)[None, None, :], 0.0)
            tile = tl.permute(tile, (0, 2, 1))
        else:
            tile = tl.load(left + at, inside, 0.0)
        columns = tl.permute(tl.load(right + at, mine[None, :, None] & inside, 0.0), (0, 2, 1))
        sums = tl.dot(tile, columns, sums, input_precision="ieee")
    return sums


@triton.jit
def turned(number):
    """Return where value `number` of a row is stored so that threads load registers as the tensor cores want them, in 32s.

    Value 16 a + 8 b + 4 h + 2 i + j of 32 is at 16 a + 8 i + 4 j + 2 b + h: a register holds the two values of a pair (h), and
    the pairs of two words (b) lie side by side.
    """
    return number // 16 * 16 + number // 2 % 2 * 8 + number % 2 * 4 + number // 8 % 2 * 2 + number // 4 % 2
