"""Routing on GPUs: logits, the experts that a token chooses, and pairs of token and expert sorted by expert.

Experts are compared by keys, 64-bit integers that order as the logits do and, among equal logits, by the expert's number: so all
kernels agree on every choice. No atomics: each block of tokens counts what it sends to every expert, and the sort adds up the
counts of the blocks before it. A pair is named token * K + slot, slot 0 being the token's first choice.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOWEST = tl.constexpr(-(2**63))


@triton.jit
def ordered(logits, expert):
    """Return keys of float32 logits of the experts `expert`, int64."""
    bits = logits.to(tl.float32).to(tl.int32, bitcast=True)
    rising = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (rising.to(tl.int64) << 32) | (0x7FFFFFFF - expert).to(tl.int64)


@triton.jit
def expert_of(key):
    """Return the expert of a key, int32."""
    return 0x7FFFFFFF - (key & 0x7FFFFFFF).to(tl.int32)


@triton.jit
def logit_of(key):
    """Return the float32 logit of a key."""
    rising = (key >> 32).to(tl.int32)
    return (rising ^ ((rising >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def load_keys(logits, token, T, E: tl.constexpr, EXPERTS: tl.constexpr):
    """Return the keys of tokens [TOKENS], int64 [TOKENS, EXPERTS]; LOWEST for tokens beyond T and experts beyond E."""
    expert = tl.arange(0, EXPERTS)[None, :]
    there = (token < T)[:, None] & (expert < E)
    return tl.where(there, ordered(tl.load(logits + (token[:, None] * E + expert), there, 0.0), expert), LOWEST)


@triton.jit
def router_kernel(
    x,
    weight,
    logits,
    shuffled,
    T,
    x_stride,
    H: tl.constexpr,
    E: tl.constexpr,
    SHUFFLE: tl.constexpr,
    TOKENS: tl.constexpr,
    EXPERTS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Program (i, s): TOKENS tokens, the s-th part of H. x [T, H], weight [E, H]; logits float32 [SPLITS, T, E] are to be added.

    Where SHUFFLE, shuffled [T, H rounded up to 128] gets x in the order `natural` of triton_mxfp4, and 0 beyond H.
    """
    CHUNKS: tl.constexpr = (H + 127) // 128
    PART: tl.constexpr = (CHUNKS + SPLITS - 1) // SPLITS
    token, expert, k = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tl.arange(0, EXPERTS), tl.arange(0, 128)
    part = tl.program_id(1)
    first = part * PART
    left, right = x + token[:, None] * x_stride + k[None, :], weight + tl.minimum(expert, E - 1)[:, None] * H + k[None, :]
    acc = tl.zeros([TOKENS, EXPERTS], tl.float32)
    for chunk in range(first, tl.minimum(first + PART, CHUNKS)):
        inside = k[None, :] < H - chunk * 128
        a = tl.load(left + chunk * 128, (token < T)[:, None] & inside, 0.0)
        b = tl.load(right + chunk * 128, inside, 0.0)
        acc = tl.dot(a, tl.trans(b), acc, input_precision="ieee")
        if SHUFFLE:
            moved = tl.permute(tl.reshape(a, [TOKENS, 4, 4, 2, 4]), (0, 2, 4, 1, 3))
            at = token[:, None] * (CHUNKS * 128) + chunk * 128 + k[None, :]
            tl.store(shuffled + at, tl.reshape(moved, [TOKENS, 128]), (token < T)[:, None])
    at = (part * T + token)[:, None] * E + expert[None, :]
    tl.store(logits + at, acc, (token < T)[:, None] & (expert < E)[None, :])


@triton.jit
def choose_kernel(
    parts,
    bias,
    experts,
    weights,
    counts,
    T,
    E: tl.constexpr,
    K: tl.constexpr,
    SPLITS: tl.constexpr,
    TOKENS: tl.constexpr,
    EXPERTS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Program i: the choices of TOKENS tokens. parts float32 [SPLITS, T, E] and bias [E] add up to the logits.

    experts int32 [T, K] and weights float32 [T, K] (a softmax over the chosen logits) are by pair; counts int32 [programs, E].
    """
    token, expert, slot = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tl.arange(0, EXPERTS), tl.arange(0, SLOTS)
    there = (token < T)[:, None] & (expert < E)[None, :]
    total = tl.zeros([TOKENS, EXPERTS], tl.float32)
    for part in tl.static_range(SPLITS):
        total += tl.load(parts + ((part * T + token)[:, None] * E + expert[None, :]), there, 0.0)
    total += tl.load(bias + expert, expert < E, 0.0).to(tl.float32)[None, :]
    keys = tl.where((expert < E)[None, :], ordered(total, expert[None, :]), LOWEST)
    taken = tl.zeros([TOKENS, SLOTS], tl.int64)
    for r in tl.static_range(K):
        best = tl.max(keys, 1)
        taken = tl.where(slot[None, :] == r, best[:, None], taken)
        keys = tl.where(keys == best[:, None], LOWEST, keys)
    used = slot[None, :] < K
    value = logit_of(taken)
    top = tl.max(tl.where(used, value, float("-inf")), 1)
    power = tl.where(used, tl.exp(value - top[:, None]), 0.0)
    at, mine = token[:, None] * K + slot[None, :], (token < T)[:, None] & used
    tl.store(experts + at, expert_of(taken), mine)
    tl.store(weights + at, power / tl.sum(power, 1)[:, None], mine)
    chosen = (keys == LOWEST) & there
    tl.store(counts + tl.program_id(0) * E + expert, tl.sum(chosen.to(tl.int32), 0), expert < E)


@triton.jit
def sort_kernel(
    experts,
    counts,
    order,
    starts,
    T,
    blocks,
    E: tl.constexpr,
    K: tl.constexpr,
    TOKENS: tl.constexpr,
    EXPERTS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Program i: sort the pairs of TOKENS tokens by expert, pairs of one expert by token.

    experts [T, K] and counts [blocks, E] as `choose_kernel` leaves them for the same TOKENS. order int32 [T * K] gets pairs;
    those of expert e are order[starts[e] : starts[e + 1]], starts int32 [E + 1].
    """
    PAIRS: tl.constexpr = TOKENS * SLOTS
    block, expert = tl.program_id(0), tl.arange(0, EXPERTS)
    total, before = tl.zeros([EXPERTS], tl.int32), tl.zeros([EXPERTS], tl.int32)
    for first in range(0, blocks, 16):
        other = first + tl.arange(0, 16)
        there = (other < blocks)[:, None] & (expert < E)[None, :]
        tile = tl.load(counts + (other[:, None] * E + expert[None, :]), there, 0)
        total += tl.sum(tile, 0)
        before += tl.sum(tl.where((other < block)[:, None], tile, 0), 0)
    start = tl.cumsum(total, 0) - total
    if block == 0:
        tl.store(starts + expert, start, expert < E)
        tl.store(starts + E, T * K)

    i = tl.arange(0, PAIRS)
    token, slot = block * TOKENS + i // SLOTS, i % SLOTS
    mine, pair = (token < T) & (slot < K), token * K + slot
    own = tl.load(experts + pair, mine, EXPERTS)
    same = own[:, None] == own[None, :]
    earlier = tl.sum((same & (i[None, :] < i[:, None])).to(tl.int32), 1)
    base = tl.sum(tl.where(own[:, None] == expert[None, :], (start + before)[None, :], 0), 1)
    tl.store(order + base + earlier, pair, mine)


@triton.jit
def tile_of(starts, tile, E: tl.constexpr, EXPERTS: tl.constexpr, ROWS: tl.constexpr):
    """Return (expert, first, end): the sorted pairs first .. min(first + ROWS, end) are tile number `tile`; none if first >= end.

    Tiles of expert e are counted from starts[e] // ROWS + e, which leaves room for all of them: pairs // ROWS + E are enough.
    """
    expert = tl.arange(0, EXPERTS)
    behind = tl.load(starts + expert + 1, expert < E, 0) // ROWS + expert + 1
    found = tl.minimum(tl.sum(((expert < E) & (behind <= tile)).to(tl.int32), 0), E - 1)
    begin, end = tl.load(starts + found), tl.load(starts + found + 1)
    return found, begin + (tile - begin // ROWS - found) * ROWS, end
