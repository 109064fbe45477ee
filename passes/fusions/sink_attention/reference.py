"""Causal attention with grouped queries, optional sinks and an optional window: what the ops mean, and their registration.

`sink_attention_dense` sees whole sequences and stands in graphs between fusion and the insertion of the cache;
`sink_attention` runs flat tokens of many sequences over a paged cache, which it extends first; `sink_attention_cached` is the
same for a cache that holds the step's keys and values already. A sink is one logit per query head that takes part in the softmax
and has no value. Nothing here depends on data, so all can be traced.
"""

from __future__ import annotations

import torch
from torch import Tensor

from oxfuse.passes.fusions.linear.reference import arch_of


def sink_attention_dense(q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, window: int, scale: float) -> Tensor:
    """Return causal attention of whole sequences, [B, S, NH, D], contiguous.

    q [B, S, NH, D], k and v [B, S, KV, D] with NH a multiple of KV, sink [NH]. Token i sees the keys j with
    i - window < j <= i, all j <= i where window is 0. Softmax and sums in promote(dtype, float32), one rounding at the end.
    Raises NotImplementedError on devices other than cpu and cuda.
    """
    if q.device.type == "cuda":
        from oxfuse.passes.fusions.masked_attention.triton import launch_causal  # only here: triton is slow to import

        return launch_causal(torch.library.wrap_triton, q, k, v, sink, window, scale, arch_of(q.device))
    if q.device.type != "cpu":
        raise NotImplementedError(f"oxfuse::sink_attention_dense has no kernel for device {q.device}; it runs on cpu and cuda.")
    wide = torch.promote_types(q.dtype, torch.float32)
    grouped = q.to(wide).unflatten(2, (k.shape[2], -1))  # [B, S, KV, G, D]
    index = torch.arange(q.shape[1], device=q.device)
    visible = _visible(index[:, None], index, window)  # [S, S]
    scores = torch.einsum("bikgd,bjkd->bkgij", grouped, k.to(wide)) * scale
    column = None if sink is None else sink.to(wide).unflatten(0, (k.shape[2], -1))[..., None, None]  # [KV, G, 1, 1]
    weights = _softmax(scores.masked_fill(~visible, -torch.inf), column)
    return torch.einsum("bkgij,bjkd->bikgd", weights, v.to(wide)).to(q.dtype).flatten(2, 3).contiguous()


def sink_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    query_start: Tensor,
    kv_lens: Tensor,
    slots: Tensor,
    block_table: Tensor,
    window: int,
    scale: float,
) -> Tensor:
    """Write k and v into the paged cache, then return attention of the flat tokens over it, [T, NH, D], contiguous.

    q [T, NH, D], k and v [T, KV, D], sink [NH]; k_cache [blocks, KV, D, block_size] and v_cache [blocks, KV, block_size, D],
    in which a head's block lies in one piece, and keys so that products run along them, are changed in place. All index
    tensors are int64: tokens query_start[n]..query_start[n + 1] are the last ones of sequence n, which counts kv_lens[n] keys
    after this step (query_start [N + 1] begins with 0, kv_lens [N]); token t goes to slot slots[t] (block * block_size + offset;
    -1 writes nothing; slots are unique otherwise); block_table [N, M] lists the blocks of each sequence. Token i of a sequence
    sees its keys j with i - window < j <= i, all j <= i where window is 0. Sequences of kv_len 0, and tokens that belong to no
    sequence, yield 0. What lies in slots that no token of this step sees has no influence, NaN included.
    Raises NotImplementedError on devices other than cpu and cuda.
    """
    if q.device.type == "cuda":
        from oxfuse.passes.fusions.sink_attention import triton as kernels  # only here: triton is slow to import

        wrap, arch = torch.library.wrap_triton, arch_of(q.device)
        kernels.launch_store(wrap, k, v, k_cache, v_cache, slots, arch)
        over = sink, k_cache, v_cache, query_start, kv_lens, block_table
        return kernels.launch_attention(wrap, q, *over, window, scale, False, arch)
    if q.device.type != "cpu":
        raise NotImplementedError(f"oxfuse::sink_attention has no kernel for device {q.device}; it runs on cpu and cuda.")
    store(k, v, k_cache, v_cache, slots)
    return _attend(q, sink, k_cache, v_cache, query_start, kv_lens, block_table, window, scale)


def sink_attention_cached(
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
) -> Tensor:
    """Return attention of the flat tokens over what the paged cache holds, [T, NH, D], contiguous.

    Arguments and meaning as of `sink_attention`, which is this after `store`. `decode` promises one token a sequence in the order
    of the sequences: T = N, query_start = 0 .. N; another kernel serves that. Raises NotImplementedError on devices other than
    cpu and cuda.
    """
    if q.device.type == "cuda":
        from oxfuse.passes.fusions.sink_attention.triton import launch_attention

        over = sink, k_cache, v_cache, query_start, kv_lens, block_table
        return launch_attention(torch.library.wrap_triton, q, *over, window, scale, decode, arch_of(q.device))
    if q.device.type != "cpu":
        raise NotImplementedError(f"oxfuse::sink_attention_cached has no kernel for device {q.device}; it runs on cpu and cuda.")
    return _attend(q, sink, k_cache, v_cache, query_start, kv_lens, block_table, window, scale)


def store(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """Write k and v [T, KV, D] into the caches at `slots` [T], as `sink_attention` says; plain torch, on any device."""
    for new, cache in zip((k, v), _by_slot(k_cache, v_cache), strict=True):
        _store(new, cache, slots)


def _by_slot(k_cache: Tensor, v_cache: Tensor) -> tuple[Tensor, Tensor]:
    """Return both caches seen as [blocks, block_size, KV, D]."""
    return k_cache.permute(0, 3, 1, 2), v_cache.transpose(1, 2)


def _attend(
    q: Tensor,
    sink: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    query_start: Tensor,
    kv_lens: Tensor,
    block_table: Tensor,
    window: int,
    scale: float,
) -> Tensor:
    k_slots, v_slots = _by_slot(k_cache, v_cache)
    wide, (block_size, kv_heads) = torch.promote_types(q.dtype, torch.float32), k_slots.shape[1:3]
    token = torch.arange(q.shape[0], device=q.device)[:, None]  # [T, 1]
    # Gathered, not sliced: a slice would tie N + 1 to N, and the exporter cannot state that.
    start, end = (query_start[torch.arange(kv_lens.shape[0], device=q.device) + offset] for offset in (0, 1))
    index = torch.where((token >= start) & (token < end), token - end + kv_lens, -1)  # [T, N]: in sequence n, else -1
    key = torch.arange(block_table.shape[1] * block_size, device=q.device)
    visible = _visible(index[:, :, None], key, window)  # [T, N, L]
    seen = visible.any(0)[:, :, None, None]
    # Unseen slots are cleared, not only masked: 0 * NaN is NaN.
    keys, values = (torch.where(seen, cache[block_table].flatten(1, 2).to(wide), 0) for cache in (k_slots, v_slots))
    grouped = q.to(wide).unflatten(1, (kv_heads, -1))  # [T, KV, G, D]
    scores = torch.einsum("tkgd,nlkd->tkgnl", grouped, keys) * scale
    scores = scores.masked_fill(~visible[:, None, None], -torch.inf)
    column = None if sink is None else sink.to(wide).unflatten(0, (kv_heads, -1))[..., None]  # [KV, G, 1]
    weights = _softmax(scores.flatten(3), column).view_as(scores)
    return torch.einsum("tkgnl,nlkd->tkgd", weights, values).to(q.dtype).flatten(1, 2).contiguous()


def _visible(query: Tensor, key: Tensor, window: int) -> Tensor:
    causal = key <= query
    return causal & (key > query - window) if window else causal


def _softmax(scores: Tensor, sink: Tensor | None) -> Tensor:
    """Softmax over the last dim with `sink` [..., 1] as one more score, whose probability is dropped; rows of -inf yield 0."""
    top = scores.amax(-1, keepdim=True)
    if sink is not None:
        top = torch.maximum(top, sink)
    top = torch.where(top == -torch.inf, 0, top)
    weights = (scores - top).exp()
    total = weights.sum(-1, keepdim=True)
    if sink is not None:
        total = total + (sink - top).exp()
    return weights / torch.where(total == 0, 1, total)


def _store(new: Tensor, cache: Tensor, slots: Tensor) -> None:
    # index_put_ has no "skip": a slot of -1 repeats the write of the first token that has a slot, and where none has one, all
    # write what already lies in slot 0. Either way the duplicates write equal values, so their order does not matter.
    first = (slots >= 0).to(torch.int64).argmax()[None]
    spare = torch.where(slots[first, None, None] >= 0, new[first].to(cache.dtype), cache[:1, 0])  # [1, KV, D]
    values = torch.where(slots[:, None, None] >= 0, new.to(cache.dtype), spare)
    targets = torch.where(slots >= 0, slots, slots[first].clamp(min=0))
    block_size = cache.shape[1]
    cache.index_put_((targets // block_size, targets % block_size), values)


def _fake(q: Tensor, *rest: object) -> Tensor:
    return q.new_empty(q.shape)


torch.library.triton_op("oxfuse::sink_attention_dense", sink_attention_dense, mutates_args=())
torch.library.triton_op("oxfuse::sink_attention", sink_attention, mutates_args=("k_cache", "v_cache"))
torch.library.triton_op("oxfuse::sink_attention_cached", sink_attention_cached, mutates_args=())
# By default the fake of a triton_op is its body: running that on fake tensors would make most of an export's time.
torch.library.register_fake("oxfuse::sink_attention_dense", _fake, allow_override=True)
torch.library.register_fake("oxfuse::sink_attention", _fake, allow_override=True)
torch.library.register_fake("oxfuse::sink_attention_cached", _fake, allow_override=True)
