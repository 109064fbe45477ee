"""Attention on GPUs over paged caches: what the bodies of the ops launch, and the kernel for steps of any mix of tokens.

`triton_store.py` writes a step's keys and values, `triton_decode.py` serves steps of one token a sequence, and the softmax that
both kernels keep is in `triton_tile.py`.
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
from oxfuse.passes.fusions.sink_attention.triton_decode import launch_decode
from oxfuse.passes.fusions.sink_attention.triton_store import launch_store as launch_store
from oxfuse.passes.fusions.sink_attention.triton_tile import attend, load_rows, store_rows

LIFT = {torch.float16: 12}
"""Softmax weights are held 2 ** LIFT times too large: float16 keeps 11 bits from 2^-14 to 2^16, and the weights end at 1."""


def launch_attention(
    wrap: Callable[[Any], Any],
    q: Tensor,
    sink: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    query_start: Tensor,
    kv_lens: Tensor,
    block_table: Tensor,
    window: int,
    scale: float,
    decode: bool,
    arch: int,
) -> Tensor:
    """Return attention over what the caches hold, as `sink_attention_cached` says; `wrap` makes a kernel launchable.

    q may be strided but for its last dim. Raises ValueError where `scale` is not positive or the blocks are no power of two.
    """
    (kv_heads, dim, block_size), heads = k_cache.shape[1:], q.shape[1]
    if scale <= 0:
        raise ValueError(f"The kernels take the largest score before they scale it; the scale is {scale}, expected > 0.")
    if block_size < 16 or block_size & (block_size - 1):
        raise ValueError(f"The kernels take whole tiles out of a block; blocks have {block_size} slots, expected 16, 32, 64 ...")
    if q.stride(2) != 1:
        q = q.contiguous()
    part, rest = head_parts(dim)
    constants: dict[str, Any] = {
        "SINK": sink is not None,
        "WINDOW": window,
        "SCALE": scale,
        "LIFT": LIFT.get(q.dtype, 0),
        "KV": kv_heads,
        "G": heads // kv_heads,
        "D": dim,
        "PART": part,
        "REST": rest,
        "BLOCK": block_size,
    }
    tensors = q, q if sink is None else sink, k_cache, v_cache
    if decode:
        return launch_decode(wrap, *tensors, kv_lens, block_table, constants, arch)
    return _launch_prefill(wrap, *tensors, query_start, kv_lens, block_table, constants, arch)


def head_parts(dim: int) -> tuple[int, int]:
    """Return powers of two, as tiles need them, that together hold `dim`: the larger one, and 0 where that is enough."""
    part = max(16, 1 << (dim.bit_length() - 1))
    return part, max(16, triton.next_power_of_2(dim - part)) if dim > part else 0


def _launch_prefill(
    wrap: Callable[[Any], Any],
    q: Tensor,
    sink: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    query_start: Tensor,
    kv_lens: Tensor,
    block_table: Tensor,
    constants: dict[str, Any],
    arch: int,
) -> Tensor:
    group, dim = constants["G"], constants["D"]
    shape = {"dtype": str(q.dtype).removeprefix("torch."), "head_dim": triton.next_power_of_2(dim)}
    config = tuning.choose(Path(__file__).parent, "prefill", arch, **shape)
    rows = max(config.blocks["ROWS"], triton.next_power_of_2(group))
    blocks = {"ROWS": rows, "KEYS": min(config.blocks["KEYS"], constants["BLOCK"])}
    tokens, sequences, out = q.shape[0], kv_lens.shape[0], q.new_empty(q.shape)
    # A tile more for each sequence than its tokens fill, and for the tokens of none: surplus programs return at once.
    wrap(prefill_kernel)[(tokens // (rows // group) + sequences + 1, constants["KV"])](
        q,
        sink,
        k_cache,
        v_cache,
        out,
        query_start,
        kv_lens,
        block_table,
        tokens,
        sequences,
        q.stride(0),
        q.stride(1),
        block_table.stride(0),
        **constants,
        **{**config.keywords, **blocks},
    )
    return out


@triton.jit
def prefill_kernel(
    q,
    sink,
    k_cache,
    v_cache,
    out,
    query_start,
    kv_lens,
    block_table,
    tokens,
    sequences,
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
):
    """A program: ROWS // G tokens of one sequence, and the G query heads of one KV head, a row each.

    Program (x, y) serves KV head y. Tiles are counted from query_start[n] // TOKENS + n for sequence n, which leaves room for all
    of them; the tokens behind the last sequence are one more, of length 0.
    """
    TOKENS: tl.constexpr = ROWS // G
    x, head = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)  # tiles that see the most keys start first
    low, high = 0, sequences + 1
    while low + 1 < high:
        middle = (low + high) // 2
        right = tl.load(query_start + middle).to(tl.int32) // TOKENS + middle <= x
        low, high = tl.where(right, middle, low), tl.where(right, high, middle)
    n = low
    start = tl.load(query_start + n).to(tl.int32)
    count = tl.load(query_start + n + 1, n < sequences, tokens).to(tl.int32) - start
    first = (x - start // TOKENS - n) * TOKENS
    if first >= count:
        return
    length = tl.load(kv_lens + n, n < sequences, 0).to(tl.int32)
    past = length - count

    r = tl.arange(0, ROWS)
    token, query_head = first + r // G, head * G + r % G
    mine = (r < TOKENS * G) & (token < count)
    row = (start + token) * q_stride + query_head * q_head_stride
    queries = load_rows(q, row, mine, 0, PART, D)
    acc = tl.zeros([ROWS, PART], tl.float32)
    queries_rest, acc_rest = queries, acc
    if REST > 0:
        queries_rest, acc_rest = load_rows(q, row, mine, PART, REST, D), tl.zeros([ROWS, REST], tl.float32)
    top, total = tl.full([ROWS], float("-inf"), tl.float32), tl.zeros([ROWS], tl.float32)
    if SINK:
        top = tl.load(sink + query_head).to(tl.float32) * 1.4426950408889634  # log2(e)
        total = tl.full([ROWS], 2**LIFT, tl.float32)

    index = tl.where(mine, past + token, -1)
    end = tl.minimum(past + first + TOKENS, length)
    begin, oldest = 0, 0
    k_head, v_head = k_cache + head * (D * BLOCK), v_cache + head * (D * BLOCK)
    table = block_table + n.to(tl.int64) * table_stride  # type: ignore[attr-defined]
    if WINDOW > 0:
        oldest = tl.maximum(past + first - WINDOW + 1, 0)
        begin = oldest // KEYS * KEYS
    else:  # blocks that the first token sees whole, and with it all others
        begin = tl.maximum(past + first + 1, 0) // KEYS * KEYS
        top, total, acc, acc_rest = attend(
            queries, queries_rest, top, total, acc, acc_rest, index, k_head, v_head, table, 0, begin, 0,
            SCALE, LIFT, WINDOW, KV, D, PART, REST, BLOCK, KEYS, False,
        )  # fmt: skip
    top, total, acc, acc_rest = attend(
        queries, queries_rest, top, total, acc, acc_rest, index, k_head, v_head, table, begin, end, oldest,
        SCALE, LIFT, WINDOW, KV, D, PART, REST, BLOCK, KEYS, True,
    )  # fmt: skip

    share = 1.0 / tl.where(total > 0, total, 1.0)[:, None]
    row = (start + token) * (KV * G * D) + query_head * D
    store_rows(out, row, acc * share, mine, 0, PART, D)
    if REST > 0:
        store_rows(out, row, acc_rest * share, mine, PART, REST, D)
