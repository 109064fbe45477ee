"""Attention in ONNX: GroupQueryAttention where ONNX Runtime has it, products and a softmax elsewhere.

GroupQueryAttention packs the tokens of a row: their keys lie from the first slot on, and padding behind them. So what a mask's
zeros stand for must come last among the tokens of a prompt; a later token then takes the padding's place.
"""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import torch
from onnx import TensorProto
from torch import fx

from oxfuse.errors import UserError
from oxfuse.passes.fusions.rotary_embedding.onnx import angle_tables
from oxfuse.passes.graph import OXFUSE, args_of, dtype_of, is_op, shape_of
from oxfuse.passes.onnx_graph import CONTRIB as CONTRIB_DOMAIN
from oxfuse.passes.onnx_graph import TO_THE_END, OnnxGraph, Value

HIDDEN = -1e30
"""Added to scores that do not count: no infinity, or a row of padding would turn NaN, and all that is multiplied with it."""


def new_places(to: OnnxGraph, node: fx.Node) -> Value:
    """The running sum of the mask before each of the last S tokens."""
    mask, new = args_of(node)
    return _new_places(to, mask, new)


def last_tokens(to: OnnxGraph, node: fx.Node) -> Value:
    """The token where the running sum of the mask first reaches its largest value."""
    x, mask = (to.of(arg) for arg in args_of(node))
    sums = to.op("CumSum", mask, to.constant(1, np.int64))
    last = to.op("ArgMax", sums, axis=1, keepdims=1)  # [B, 1]
    return to.op("GatherND", x, to.op("Unsqueeze", last, to.ints(2)), batch_dims=1)


def tokens_from(to: OnnxGraph, node: fx.Node) -> Value:
    """A slice."""
    x, first = (to.of(arg) for arg in args_of(node))
    return to.op("Slice", x, first, to.ints(TO_THE_END), to.ints(1))


def attention(to: OnnxGraph, node: fx.Node) -> Value:
    """Standard operators: softmax over the masked products and the sink, which is dropped after it. All of it in float32."""
    q, k, v, sink, past_k, past_v, mask, window, scale = args_of(node)
    dtype = dtype_of(q)

    def wide(x: fx.Node) -> str:
        return to.cast(to.of(x), dtype, torch.float32)

    (heads, dim), kv_heads = shape_of(q)[2:], shape_of(k)[2]
    present = []
    for new, past in ((k, past_k), (v, past_v)):
        first = to.op("Transpose", wide(new), perm=[0, 2, 1, 3])
        present.append(first if past is None else to.op("Concat", wide(past), first, axis=2))
    keys, values = present
    query = to.reshaped(to.op("Transpose", wide(q), perm=[0, 2, 1, 3]), [0, kv_heads, -1, dim])  # [B, KV, G * S, D]
    query = to.op("Mul", query, to.constant(scale, np.float32))
    scores = to.op("MatMul", query, to.op("Transpose", keys, perm=[0, 1, 3, 2]))
    length, new_length = to.size(to.of(mask), 1), to.size(to.of(q), 1)
    scores = to.op("Add", to.reshaped(scores, [0, heads, new_length, length]), _bias(to, mask, q, window))
    if sink is not None:
        column = to.reshaped(wide(sink), [1, heads, 1, 1])
        column = to.op("Expand", column, to.shape([to.size(to.of(q), 0), 1, new_length, 1]))
        scores = to.op("Concat", scores, column, axis=3)
    weights = to.op("Softmax", scores, axis=3)
    if sink is not None:
        weights = to.op("Slice", weights, to.ints(0), to.ints(-1), to.ints(3))
    out = to.op("MatMul", to.op("Reshape", weights, to.shape([0, kv_heads, -1, length])), values)  # [B, KV, G * S, D]
    out = to.op("Transpose", to.reshaped(out, [0, heads, new_length, dim]), perm=[0, 2, 1, 3])
    out, keys, values = (to.cast(x, torch.float32, dtype) for x in (out, keys, values))
    return out, keys, values


def group_query_attention(to: OnnxGraph, node: fx.Node) -> Value:
    """The contrib operator, which rotates as well where it can. Without a past there is nothing that it would do better.

    Raises UserError for heads of a size that it does not take.
    """
    q, k, v, sink, past_k, past_v, mask, window, scale = args_of(node)
    if past_k is None:
        return attention(to, node)
    (heads, dim), kv_heads = shape_of(q)[2:], shape_of(k)[2]
    if dim % 8:
        raise UserError(
            f"ONNX Runtime's attention takes heads whose size is a multiple of 8, this model's have {dim}: "
            "use target onnx-portable."
        )
    tables, (q, k) = _rotation(to, q, k, mask)
    inputs = [to.reshaped(to.of(x), [0, 0, n * dim]) for x, n in ((q, heads), (k, kv_heads), (v, kv_heads))]
    counted = to.op("ReduceSum", to.of(mask), to.ints(1), keepdims=0)
    last = to.op("Cast", to.op("Sub", counted, to.constant(1, np.int64)), to=TensorProto.INT32)
    total = to.op("Cast", to.op("Squeeze", to.size(to.of(mask), 1)), to=TensorProto.INT32)
    out, keys, values = to.ops(
        "GroupQueryAttention",
        *inputs, to.of(past_k), to.of(past_v), last, total, *tables, "", "", to.of(sink),
        outputs="111",
        domain=CONTRIB_DOMAIN,
        num_heads=heads,
        kv_num_heads=kv_heads,
        scale=float(scale),
        local_window_size=window or -1,
        do_rotary=int(bool(tables[0])),
    )  # fmt: skip
    return to.reshaped(out, [0, 0, heads, dim]), keys, values


def _rotation(to: OnnxGraph, q: fx.Node, k: fx.Node, mask: fx.Node) -> tuple[tuple[str, str], tuple[fx.Node, fx.Node]]:
    """Return the tables and the unrotated q and k where the operator can rotate them, else no tables and q and k as they are."""
    rotation: Any = args_of(q)[0] if is_op(q, operator.getitem) else None
    if not is_op(rotation, OXFUSE.rotary_embedding.default) or args_of(q)[1:] != (0,) or args_of(k) != (rotation, 1):
        return ("", ""), (q, k)
    raw_q, raw_k, positions, inv_freq, factor = args_of(rotation)
    fits = shape_of(inv_freq)[0] % 8 == 0 and is_op(positions, OXFUSE.new_places.default) and args_of(positions)[0] is mask
    return (angle_tables(to, inv_freq, factor), (raw_q, raw_k)) if fits else (("", ""), (q, k))


def _places(to: OnnxGraph, mask: fx.Node) -> str:
    return to.op("Sub", to.op("CumSum", to.of(mask), to.constant(1, np.int64)), to.of(mask))


def _new_places(to: OnnxGraph, mask: fx.Node, new: fx.Node) -> str:
    return to.op("Slice", _places(to, mask), to.op("Neg", to.size(to.of(new), 1)), to.ints(TO_THE_END), to.ints(1))


def _bias(to: OnnxGraph, mask: fx.Node, q: fx.Node, window: int) -> str:
    """Return 0 where a query sees a key and HIDDEN elsewhere, [B, 1, S, T]."""
    new = to.op("Unsqueeze", _new_places(to, mask, q), to.ints(1, 3))  # [B, 1, S, 1]
    old = to.op("Unsqueeze", _places(to, mask), to.ints(1, 2))  # [B, 1, 1, T]
    there = to.op("Unsqueeze", to.op("Cast", to.of(mask), to=TensorProto.BOOL), to.ints(1, 2))
    visible = to.op("And", to.op("LessOrEqual", old, new), there)
    if window:
        visible = to.op("And", visible, to.op("Greater", old, to.op("Sub", new, to.constant(window, np.int64))))
    return to.op("Where", visible, to.constant(0, np.float32), to.constant(HIDDEN, np.float32))


PORTABLE = {
    "oxfuse::new_places": new_places,
    "oxfuse::last_tokens": last_tokens,
    "oxfuse::tokens_from": tokens_from,
    "oxfuse::sink_attention_past": attention,
}
CONTRIB = {"oxfuse::sink_attention_past": group_query_attention}
