"""Attention of steps with one token a sequence: bound by the reading of keys, which many programs share.

The keys of a sequence are cut into splits, whose number is fixed and whose length the device finds: launches stay the same while
sequences grow, as captured graphs need. Splits leave a maximum, a sum and a weighted sum of values; a second launch joins them
and adds the sink, once. Where a window is so short that one program reads it quickly, that program writes the result.
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
from oxfuse.passes.fusions.sink_attention.triton_tile import attend, load_rows, store_rows

SHORT = 512
"""Windows up to this many keys count as short in the tuning table."""


def launch_decode(
    wrap: Callable[[Any], Any],
    q: Tensor,
    sink: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    kv_lens: Tensor,
    block_table: Tensor,
    constants: dict[str, Any],
    arch: int,
) -> Tensor:
    """Return attention of q [N, NH, D], a token a sequence; `constants` are those that all attention kernels take."""
    (sequences, heads, dim), kv_heads, window = q.shape, constants["KV"], constants["WINDOW"]
    shape: dict[str, Any] = {
        "dtype": str(q.dtype).removeprefix("torch."),
        "head_dim": triton.next_power_of_2(dim),
        "short": 0 < window <= SHORT,
    }
    config = tuning.choose(Path(__file__).parent, "decode", arch, **shape)
    keys, splits = min(config.blocks["KEYS"], constants["BLOCK"]), config.blocks["SPLITS"]
    cut = {"KEYS": keys, "SPLITS": splits, "CHUNK": -(-config.blocks["CHUNK"] // keys) * keys}
    rows = max(16, triton.next_power_of_2(heads // kv_heads))
    out = q.new_empty(q.shape)
    partial, sums = out, q  # of one split, there are no sums to write
    if splits > 1:
        partial = q.new_empty((sequences, heads, splits, dim), dtype=torch.float32)
        sums = q.new_empty((sequences, heads, splits, 2), dtype=torch.float32)
    wrap(decode_kernel)[(sequences, kv_heads, splits)](
        q,
        sink,
        k_cache,
        v_cache,
        partial,
        sums,
        kv_lens,
        block_table,
        q.stride(0),
        q.stride(1),
        block_table.stride(0),
        **constants,
        ROWS=rows,
        **{**config.keywords, **cut},
    )
    if splits > 1:
        config = tuning.choose(Path(__file__).parent, "reduce", arch)
        wrap(reduce_kernel)[(sequences, heads)](
            partial,
            sums,
            sink,
            out,
            kv_lens,
            SINK=constants["SINK"],
            WINDOW=window,
            LIFT=constants["LIFT"],
            NH=heads,
            D=dim,
            DIMS=triton.next_power_of_2(dim),
            **cut,
            **config.keywords,
        )
    return out


@triton.jit
def decode_kernel(
    q,
    sink,
    k_cache,
    v_cache,
    partial,
    sums,
    kv_lens,
    block_table,
    q_stride,
    q_head_stride,
    table_stride,
    SINK: tl.constexpr,
    WINDOW: tl.constexpr,
    SCALE: tl.constexpr,
    LIFT: tl.constexpr,
    KV: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    PART: tl.constexpr,
    REST: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    SPLITS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Program (n, y, s): split s of the keys of sequence n, and the G query heads of KV head y, a row each.

    `partial` [N, NH, SPLITS, D] and `sums` [N, NH, SPLITS, 2] take what the splits find; of one split, `partial` is the result
    [N, NH, D] and `sums` is not used.
    """
    n, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(kv_lens + n).to(tl.int32)
    oldest, begin, chunk = cut_keys(length, WINDOW, KEYS, SPLITS, CHUNK)
    end = length
    if SPLITS > 1:
        begin += split * chunk
        end = tl.minimum(begin + chunk, length)
        if begin >= end:
            return

    r = tl.arange(0, ROWS)
    mine, query_head = r < G, head * G + r
    row = n * q_stride + query_head * q_head_stride
    queries = load_rows(q, row, mine, 0, PART, D)
    acc = tl.zeros([ROWS, PART], tl.float32)
    queries_rest, acc_rest = queries, acc
    if REST > 0:
        queries_rest, acc_rest = load_rows(q, row, mine, PART, REST, D), tl.zeros([ROWS, REST], tl.float32)
    top, total = tl.full([ROWS], float("-inf"), tl.float32), tl.zeros([ROWS], tl.float32)
    if SINK and SPLITS == 1:
        top = tl.load(sink + query_head, mine, 0.0).to(tl.float32) * 1.4426950408889634  # log2(e)
        total = tl.full([ROWS], 2**LIFT, tl.float32)
    index = tl.where(mine, length - 1, -1)
    top, total, acc, acc_rest = attend(
        queries, queries_rest, top, total, acc, acc_rest, index, k_cache + head * (D * BLOCK), v_cache + head * (D * BLOCK),
        block_table + n.to(tl.int64) * table_stride, begin, end, oldest,
        SCALE, LIFT, WINDOW, KV, D, PART, REST, BLOCK, KEYS, True,
    )  # fmt: skip

    row = (n * (KV * G) + query_head) * SPLITS + split
    if SPLITS == 1:
        share = 1.0 / tl.where(total > 0, total, 1.0)[:, None]
        acc, acc_rest = acc * share, acc_rest * share
    else:
        tl.store(sums + 2 * row, top, mine)
        tl.store(sums + 2 * row + 1, total, mine)
    store_rows(partial, row * D, acc, mine, 0, PART, D)
    if REST > 0:
        store_rows(partial, row * D, acc_rest, mine, PART, REST, D)


@triton.jit
def cut_keys(length, WINDOW: tl.constexpr, KEYS: tl.constexpr, SPLITS: tl.constexpr, CHUNK: tl.constexpr):
    """Return (the oldest key that is seen, where the first split begins, keys a split), the last two multiples of KEYS."""
    oldest, begin = 0, 0
    if WINDOW > 0:
        oldest = tl.maximum(length - WINDOW, 0)
        begin = oldest // KEYS * KEYS
    return oldest, begin, tl.maximum(tl.cdiv(tl.cdiv(length - begin, SPLITS), KEYS) * KEYS, CHUNK)


@triton.jit
def reduce_kernel(
    partial,
    sums,
    sink,
    out,
    kv_lens,
    SINK: tl.constexpr,
    WINDOW: tl.constexpr,
    LIFT: tl.constexpr,
    NH: tl.constexpr,
    D: tl.constexpr,
    DIMS: tl.constexpr,
    KEYS: tl.constexpr,
    SPLITS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Program (n, h): join what the splits found for one query head of one sequence; splits without keys left nothing."""
    n, head = tl.program_id(0), tl.program_id(1)
    length = tl.load(kv_lens + n).to(tl.int32)
    _, begin, chunk = cut_keys(length, WINDOW, KEYS, SPLITS, CHUNK)
    split, d = tl.arange(0, SPLITS), tl.arange(0, DIMS)[None, :]
    used = begin + split * chunk < length
    row = (n * NH + head) * SPLITS + split
    top = tl.load(sums + 2 * row, used, float("-inf"))
    total = tl.load(sums + 2 * row + 1, used, 0.0)
    acc = tl.load(partial + (row[:, None] * D + d), used[:, None] & (d < D), 0.0)
    highest = tl.max(top, 0)
    if SINK:
        logit = tl.load(sink + head).to(tl.float32) * 1.4426950408889634  # log2(e)
        highest = tl.maximum(highest, logit)
    highest = tl.where(highest == float("-inf"), 0.0, highest)
    weights = tl.exp2(top - highest)
    whole = tl.sum(total * weights, 0)
    if SINK:
        whole += tl.exp2(logit - highest) * 2**LIFT
    whole = tl.where(whole > 0, whole, 1.0)
    result = tl.sum(acc * weights[:, None], 0, keep_dims=True) / whole
    tl.store(out + ((n * NH + head) * D + d), result.to(out.dtype.element_ty), d < D)
