"""Attention of whole tensors on GPUs: keys as they lie in one tensor, under a mask that is given, or causal.

A row of a tile is one query head of one token; a tile's rows share a KV head. Before a tile reads keys it reads its mask: of a
cache that has room for more than is written, what no token of the tile sees is not touched. Where each sequence has one token,
its keys are cut into splits, and a second launch joins what they found, as for the paged cache (`triton_decode.py` beside
sink_attention); what both do with a tile of values is in `triton_tile.py` there.
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
from oxfuse.passes.fusions.sink_attention.triton import LIFT, head_parts
from oxfuse.passes.fusions.sink_attention.triton_decode import cut_keys
from oxfuse.passes.fusions.sink_attention.triton_tile import add_product, load_rows, store_rows

HIDDEN = tl.constexpr(-1e30)
"""What is added to hide a key is the least value of some dtype; no score comes near it."""
LOG2E = tl.constexpr(1.4426950408889634)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SCANNED = 2048
"""Values of a mask that a tile of many tokens looks at in one go; one token looks at a fourth of them."""


def launch_masked(
    wrap: Callable[[Any], Any], q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, mask: Tensor, scale: float, arch: int
) -> Tensor:
    """Do what `masked_attention` of reference.py says; `wrap` makes a kernel launchable, `arch` 90 is sm_90.

    Tensors may be strided but for the last dim of q, k and v. Raises ValueError where q is of another dtype than DTYPES.
    """
    # Of a dim of size 1 any stride will do, so that 0 stands for all rows and all sequences.
    strides = [0 if mask.shape[dim] == 1 else mask.stride(dim) for dim in (0, 2)]
    kind = {"CAUSAL": False, "ADDED": mask.dtype != torch.bool, "WINDOW": 0}
    return _launch(wrap, q, k, v, sink, mask, (*strides, mask.stride(3)), scale, kind, arch)


def launch_causal(
    wrap: Callable[[Any], Any], q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, window: int, scale: float, arch: int
) -> Tensor:
    """Do what `sink_attention_dense` of sink_attention's reference.py says; the rest is as for `launch_masked`."""
    return _launch(wrap, q, k, v, sink, q, (0, 0, 0), scale, {"CAUSAL": True, "ADDED": False, "WINDOW": window}, arch)


def _launch(
    wrap: Callable[[Any], Any],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink: Tensor | None,
    mask: Tensor,
    mask_strides: tuple[int, ...],
    scale: float,
    kind: dict[str, Any],
    arch: int,
) -> Tensor:
    if q.dtype not in DTYPES:
        raise ValueError(f"The kernels of attention take {', '.join(map(str, DTYPES))}; the queries are {q.dtype}.")
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    (batch, tokens, heads, dim), (keys, kv_heads) = q.shape, k.shape[1:3]
    group, decode = heads // kv_heads, not kind["CAUSAL"] and tokens == 1
    shape: dict[str, Any] = {"dtype": str(q.dtype).removeprefix("torch."), "head_dim": triton.next_power_of_2(dim)}
    name, shape = ("decode", shape) if decode else ("prefill", {**shape, "causal": kind["CAUSAL"]})
    config = tuning.choose(Path(__file__).parent, name, arch, **shape)
    rows = max(config.blocks["ROWS"], triton.next_power_of_2(group))
    part, rest = head_parts(dim)
    same: dict[str, Any] = {"SINK": sink is not None, "LIFT": LIFT.get(q.dtype, 0), "D": dim}
    cut = {"KEYS": config.blocks["KEYS"], "SPLITS": 1, "CHUNK": config.blocks["KEYS"]}
    out = q.new_empty(q.shape)
    partial, sums, tiles = out, q, -(-tokens // (rows // group))  # of one split, there are no sums to write
    if decode:
        cut |= {"SPLITS": config.blocks["SPLITS"], "CHUNK": config.blocks["CHUNK"]}
        partial = q.new_empty((batch, heads, cut["SPLITS"], dim), dtype=torch.float32)
        sums = q.new_empty((batch, heads, cut["SPLITS"], 2), dtype=torch.float32)
    lines = 1 if decode else triton.next_power_of_2(rows // group)
    wrap(attention_kernel)[(cut["SPLITS"] if decode else tiles, kv_heads, batch)](
        q,
        k,
        v,
        q if sink is None else sink,
        mask,
        partial,
        sums,
        tokens,
        keys,
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        *mask_strides,
        **same,
        **kind,
        SCALE=scale,
        KV=kv_heads,
        G=group,
        PART=part,
        REST=rest,
        **{**config.keywords, "ROWS": rows, **cut},
        LINES=lines,
        COLUMNS=max(64, SCANNED // max(4, lines)),
    )
    if decode:
        config = tuning.choose(Path(__file__).parent, "join", arch)
        wrap(join_kernel)[(heads, batch)](
            partial,
            sums,
            q if sink is None else sink,
            out,
            keys,
            **same,
            NH=heads,
            DIMS=triton.next_power_of_2(dim),
            **cut,
            **config.keywords,
        )
    return out


@triton.jit
def attention_kernel(
    q,
    k,
    v,
    sink,
    mask,
    out,
    sums,
    tokens,
    length,
    q_batch,
    q_token,
    q_head,
    k_batch,
    k_token,
    k_head,
    v_batch,
    v_token,
    v_head,
    mask_batch,
    mask_token,
    mask_key,
    SINK: tl.constexpr,
    CAUSAL: tl.constexpr,
    ADDED: tl.constexpr,
    WINDOW: tl.constexpr,
    SCALE: tl.constexpr,
    LIFT: tl.constexpr,
    KV: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    PART: tl.constexpr,
    REST: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    SPLITS: tl.constexpr,
    CHUNK: tl.constexpr,
    LINES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Program (x, y, n): ROWS // G tokens of sequence n, and the G query heads of KV head y, a row each.

    Of one split x counts tiles of tokens, and `out` is the result [B, S, NH, D]. Of more, S is 1 and x is the split: `out`
    float32 [B, NH, SPLITS, D] and `sums` float32 [B, NH, SPLITS, 2] take what it finds. Strides are in elements. A mask is read
    LINES tokens by COLUMNS keys at a time.
    """
    TOKENS: tl.constexpr = ROWS // G
    head, n = tl.program_id(1), tl.program_id(2).to(tl.int64)
    first, begin, end = 0, 0, length
    if SPLITS > 1:
        _, _, chunk = cut_keys(length, 0, KEYS, SPLITS, CHUNK)
        begin = tl.program_id(0) * chunk
        if begin >= length:
            return
        end = tl.minimum(begin + chunk, length)
    else:
        first = (tl.num_programs(0) - 1 - tl.program_id(0)) * TOKENS  # tiles that see the most keys start first

    r = tl.arange(0, ROWS)
    line, query_head = r // G, head * G + r % G
    token = first + line
    mine = (r < TOKENS * G) & (token < tokens)
    rows = q + n * q_batch + tl.cast(first, tl.int64) * q_token
    row = line * q_token + query_head * q_head
    queries = load_rows(rows, row, mine, 0, PART, D)
    acc = tl.zeros([ROWS, PART], tl.float32)
    queries_rest, acc_rest = queries, acc
    if REST > 0:
        queries_rest, acc_rest = load_rows(rows, row, mine, PART, REST, D), tl.zeros([ROWS, REST], tl.float32)
    top, total = tl.full([ROWS], float("-inf"), tl.float32), tl.zeros([ROWS], tl.float32)
    if SINK and SPLITS == 1:
        top = tl.load(sink + query_head, mine, 0.0).to(tl.float32)
        if CAUSAL:
            top *= LOG2E
        total = tl.full([ROWS], 2**LIFT, tl.float32)

    keys, values = k + n * k_batch + head * k_head, v + n * v_batch + head * v_head
    masks = mask + n * mask_batch + tl.cast(first, tl.int64) * mask_token
    if CAUSAL:
        end = tl.minimum(first + TOKENS, length)
        if WINDOW > 0:
            begin = tl.maximum(first - WINDOW + 1, 0) // KEYS * KEYS
        else:  # tiles that the first token sees whole, and with it all others
            begin = (first + 1) // KEYS * KEYS
            top, total, acc, acc_rest = attend(
                queries, queries_rest, top, total, acc, acc_rest, token, mine, keys, values, masks, line, 0, begin,
                k_token, v_token, mask_token, mask_key,
                SCALE, LIFT, WINDOW, D, PART, REST, KEYS, False, True, False,
            )  # fmt: skip
    else:
        begin, end = seen_keys(masks, tokens - first, begin, end, length, mask_token, mask_key, ADDED, TOKENS, LINES, COLUMNS)
        begin = begin // KEYS * KEYS
    top, total, acc, acc_rest = attend(
        queries, queries_rest, top, total, acc, acc_rest, token, mine, keys, values, masks, line, begin, end,
        k_token, v_token, mask_token, mask_key,
        SCALE, LIFT, WINDOW, D, PART, REST, KEYS, True, CAUSAL, ADDED,
    )  # fmt: skip

    if SPLITS > 1:
        row = (n * (KV * G) + query_head) * SPLITS + tl.program_id(0)
        tl.store(sums + 2 * row, top, mine)
        tl.store(sums + 2 * row + 1, total, mine)
        row *= D
        to = out
    else:
        share = 1.0 / tl.where(total > 0, total, 1.0)[:, None]
        acc, acc_rest = acc * share, acc_rest * share
        row = line * (KV * G * D) + query_head * D
        to = out + (n * tokens + first) * (KV * G * D)
    store_rows(to, row, acc, mine, 0, PART, D)
    if REST > 0:
        store_rows(to, row, acc_rest, mine, PART, REST, D)


@triton.jit
def seen_keys(
    masks,
    tokens,
    begin,
    end,
    length,
    mask_token,
    mask_key,
    ADDED: tl.constexpr,
    TOKENS: tl.constexpr,
    LINES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Return between which of the keys begin .. end a tile's tokens see any; (end, 0) or so where they see none.

    A token that sees none of all keys but has finite values to add sees all alike, as in models that write masks like that.
    `masks` points to the row of the tile's first token; at most TOKENS and `tokens` tokens are looked at.
    """
    line, column = tl.arange(0, LINES), tl.arange(0, COLUMNS)
    there = (line < TOKENS) & (line < tokens)
    place = masks + (line[:, None] * mask_token + column[None, :] * mask_key)
    low, high = tl.full([LINES, COLUMNS], 2147483647, tl.int32), tl.zeros([LINES, COLUMNS], tl.int32)
    finite = tl.zeros([LINES, COLUMNS], tl.int32)
    step = tl.cast(mask_key, tl.int64)
    for at in range(begin, end, COLUMNS):
        key = (at + column)[None, :]
        inside = there[:, None] & (key < end)
        if ADDED:
            value = tl.load(place + at * step, inside, float("-inf")).to(tl.float32)
            shown = (value > HIDDEN) | (value != value)
            finite = tl.where(value > float("-inf"), 1, finite)
        else:
            shown = tl.load(place + at * step, inside, False)
        low = tl.where(shown, tl.minimum(low, key), low)
        high = tl.where(shown, key + 1, high)
    low_of_all, high_of_all = tl.minimum(tl.min(low), end), tl.max(high)
    if ADDED:
        alike = tl.max(((tl.max(high, 1) == 0) & (tl.max(finite, 1) > 0)).to(tl.int32), 0)
        if LINES == 1:  # the keys may be but one split of all
            at = 0
            while (alike > 0) & (at < length):
                value = tl.load(place + at * step, there[:, None] & ((at + column)[None, :] < length), float("-inf"))
                alike -= tl.max(((value > HIDDEN) | (value != value)).to(tl.int32))
                at += COLUMNS
        if alike > 0:
            low_of_all, high_of_all = begin, end
    return low_of_all, high_of_all


@triton.jit
def attend(
    queries,
    queries_rest,
    top,
    total,
    acc,
    acc_rest,
    token,
    mine,
    keys,
    values,
    masks,
    line,
    begin,
    end,
    k_token,
    v_token,
    mask_token,
    mask_key,
    SCALE: tl.constexpr,
    LIFT: tl.constexpr,
    WINDOW: tl.constexpr,
    D: tl.constexpr,
    PART: tl.constexpr,
    REST: tl.constexpr,
    KEYS: tl.constexpr,
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    ADDED: tl.constexpr,
):
    """Take the keys begin <= j < end of one head into the softmax of a tile; return (top, total, acc, acc_rest).

    queries [ROWS, PART] and queries_rest [ROWS, REST]; the running maximum `top` and sum `total` are float32 [ROWS], acc and
    acc_rest float32 [ROWS, PART] and [ROWS, REST]. `begin` is a multiple of KEYS, and `end` too where not MASKED: then every row
    sees all. Weights, and so `total` and the accumulators, are 2 ** LIFT times what they mean. Scores are in units of log2 where
    CAUSAL; a mask's are not, for its least values would overflow.
    """
    FACTOR: tl.constexpr = SCALE * LOG2E if CAUSAL else SCALE
    UNIT: tl.constexpr = 1.0 if CAUSAL else LOG2E
    j = tl.arange(0, KEYS)
    k_step, v_step, mask_step = tl.cast(k_token, tl.int64), tl.cast(v_token, tl.int64), tl.cast(mask_key, tl.int64)
    rows = masks + (line[:, None] * mask_token + j[None, :] * mask_key)
    # Counted from 0: where the bounds of a loop come from a loop, Triton 3.7 loses what it knows of the pointers in it, and loads
    # keys one by one.
    for number in range(tl.cdiv(end - begin, KEYS)):
        at = tl.multiple_of(begin + number * KEYS, KEYS)
        key = at + j
        there = key < end
        k_row, v_row = j * k_token, j * v_token
        tile = load_tile(keys + at * k_step, k_row, there, 0, PART, D, MASKED)
        scores = tl.dot(queries, tl.trans(tile), input_precision="ieee")
        if REST > 0:
            tile = load_tile(keys + at * k_step, k_row, there, PART, REST, D, MASKED)
            scores = tl.dot(queries_rest, tl.trans(tile), scores, input_precision="ieee")
        scores *= FACTOR
        if CAUSAL:
            if MASKED:
                seen = key[None, :] <= token[:, None]
                if WINDOW > 0:
                    seen = seen & (key[None, :] > token[:, None] - WINDOW)
                scores = tl.where(seen, scores, float("-inf"))
        else:
            inside = mine[:, None] & there[None, :]
            if ADDED:
                scores += tl.load(rows + at * mask_step, inside, float("-inf")).to(tl.float32)
            else:
                scores = tl.where(tl.load(rows + at * mask_step, inside, False), scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        base = higher
        if MASKED:  # a row that sees no key yet
            base = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2((scores - base[:, None]) * UNIT + LIFT)
        shrink = tl.exp2((top - base) * UNIT)
        total = total * shrink + tl.sum(weights, 1)
        tile = load_tile(values + at * v_step, v_row, there, 0, PART, D, MASKED)
        acc = add_product(acc * shrink[:, None], weights, tile)
        if REST > 0:
            tile = load_tile(values + at * v_step, v_row, there, PART, REST, D, MASKED)
            acc_rest = add_product(acc_rest * shrink[:, None], weights, tile)
        top = higher
    return top, total, acc, acc_rest


@triton.jit
def load_tile(base, row, there, FIRST: tl.constexpr, DIMS: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr):
    """Return dims FIRST.. of the rows that begin at base + row, [rows, DIMS]; 0 beyond D and, where MASKED, unless `there`."""
    d = FIRST + tl.arange(0, DIMS)[None, :]
    place = base + (row[:, None] + d)
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
def join_kernel(
    partial,
    sums,
    sink,
    out,
    length,
    SINK: tl.constexpr,
    LIFT: tl.constexpr,
    NH: tl.constexpr,
    D: tl.constexpr,
    DIMS: tl.constexpr,
    KEYS: tl.constexpr,
    SPLITS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Program (h, n): join what the splits of `attention_kernel` found for one query head of one sequence, and add the sink."""
    head, n = tl.program_id(0), tl.program_id(1).to(tl.int64)
    _, _, chunk = cut_keys(length, 0, KEYS, SPLITS, CHUNK)
    split, d = tl.arange(0, SPLITS), tl.arange(0, DIMS)[None, :]
    used = split * chunk < length  # the others left nothing
    row = (n * NH + head) * SPLITS + split
    top = tl.load(sums + 2 * row, used, float("-inf"))
    total = tl.load(sums + 2 * row + 1, used, 0.0)
    acc = tl.load(partial + (row[:, None] * D + d), used[:, None] & (d < D), 0.0)
    highest = tl.max(top, 0)
    if SINK:
        logit = tl.load(sink + head).to(tl.float32)
        highest = tl.maximum(highest, logit)
    highest = tl.where(highest == float("-inf"), 0.0, highest)
    weights = tl.exp2((top - highest) * LOG2E)
    whole = tl.sum(total * weights, 0)
    if SINK:
        whole += tl.exp2((logit - highest) * LOG2E) * 2**LIFT
    whole = tl.where(whole > 0, whole, 1.0)
    result = tl.sum(acc * weights[:, None], 0, keep_dims=True) / whole
    tl.store(out + ((n * NH + head) * D + d), result.to(out.dtype.element_ty), d < D)
