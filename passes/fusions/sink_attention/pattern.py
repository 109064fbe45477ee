"""Find self-attention: causal or windowed, grouped queries, with or without a sink per head.

Anchors: softmax of rank 4, or scaled_dot_product_attention. Form, on [B, heads, S, D]: softmax over the scaled and masked scores
and one more column, the sink; that column dropped; times V. The window is read off the mask by running it (`window.py`).
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from oxfuse.passes.fusion import Emitter, Fusion, Match
from oxfuse.passes.fusions.sink_attention import reference as reference  # registers the op
from oxfuse.passes.fusions.sink_attention.window import window_of
from oxfuse.passes.graph import (
    OXFUSE,
    A,
    Refusal,
    args_of,
    as_node,
    constant,
    dtype_of,
    is_op,
    only,
    require,
    same_size,
    shape_of,
    the_op,
    through,
    uncast,
    unwidened,
    users_through,
)
from oxfuse.passes.weights import WeightTable

_CASTS_AND_DROPOUT = (A.to.dtype, A.to.dtype_layout, A._to_copy.default, A.dropout.default)


def ungroup(node: fx.Node) -> fx.Node:
    """Return the KV heads behind their repetition for grouped queries, or the node itself."""
    if is_op(node, A.repeat_interleave.self_int) and args_of(node)[2] == 1:
        return as_node(args_of(node)[0])
    grown = through(node, A.clone.default, A.contiguous.default)
    if is_op(grown, A.reshape.default, A.view.default, A.flatten.using_ints) and is_op(args_of(grown)[0], A.expand.default):
        inner = through(args_of(grown)[0].args[0], A.slice.Tensor)
        if is_op(inner, A.unsqueeze.default) and args_of(inner)[1] == 2:
            return as_node(args_of(inner)[0])
    return node


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What attention consists of: q, k, v [B, heads, S, D], k and v ungrouped; the sink and the mask where there are any.

    `causal` is SDPA's flag, which stands for a mask.
    """

    q: fx.Node
    k: fx.Node
    v: fx.Node
    sink: fx.Node | None
    mask: Any
    scale: float
    out: fx.Node
    causal: bool = False


def parts_of(anchor: fx.Node) -> Parts:
    """Return the parts of the attention around a softmax or SDPA node, or refuse."""
    parts = _sdpa(anchor) if is_op(anchor, A.scaled_dot_product_attention.default) else _softmax(anchor)
    parts = replace(parts, k=ungroup(parts.k), v=ungroup(parts.v))
    q, k, v, sink = parts.q, parts.k, parts.v, parts.sink
    heads, kv_heads = shape_of(q)[1], shape_of(k)[1]
    require(dtype_of(q) == dtype_of(k) == dtype_of(v), "queries, keys and values differ in dtype", anchor)
    alike = shape_of(k)[:2] == shape_of(v)[:2] and all(map(same_size, shape_of(k), shape_of(v)))
    require(alike, "keys and values differ in shape", anchor)
    require(heads % kv_heads == 0, f"{heads} query heads do not group over {kv_heads} KV heads", anchor)
    require(parts.mask is not None or parts.causal, "attention has no mask, so it is not causal", anchor)
    if sink is not None:
        require(dtype_of(sink).is_floating_point and shape_of(sink) == (heads,), "the sink is not one logit a head", sink)
    return parts


def match(anchor: fx.Node, weights: WeightTable) -> Match:
    """Return the match around a softmax or SDPA node, or refuse."""
    parts = parts_of(anchor)
    q, k, v = parts.q, parts.k, parts.v
    require(same_size(shape_of(q)[2], shape_of(k)[2]), "queries and keys are not of one sequence", anchor)
    window = 0 if parts.causal else window_of(anchor.graph, as_node(parts.mask))
    require_kernel(q)

    def emit(to: Emitter) -> tuple[fx.Node, ...]:
        tokens_first = [to.call(A.transpose.int, x, 1, 2) for x in (q, k, v)]
        new = to.call(OXFUSE.sink_attention_dense.default, *tokens_first, parts.sink, window, parts.scale)
        return (to.call(A.transpose.int, new, 1, 2),)

    return Match(inputs=(q, k, v), outputs=(parts.out,), emit=emit)


def require_kernel(q: fx.Node) -> None:
    """Refuse queries on devices, or of dtypes, that no kernel of attention takes."""
    device, dtype = q.meta["val"].device.type, dtype_of(q)
    require(device in ("cpu", "cuda"), f"there is no kernel for {device}", q)
    require(device == "cpu" or dtype.itemsize <= 4, f"there is no kernel for {device} in {str(dtype).removeprefix('torch.')}", q)


def _sdpa(node: fx.Node) -> Parts:
    q, k, v = (as_node(a) for a in args_of(node)[:3])
    given = dict(zip(("attn_mask", "dropout_p", "is_causal"), args_of(node)[3:], strict=False)) | node.kwargs
    mask, causal, scale = given.get("attn_mask"), bool(given.get("is_causal")), given.get("scale")
    require(not given.get("dropout_p"), "dropout inside the op", node)
    require(not (causal and mask is not None), "is_causal beside a mask", node)
    width = scale if isinstance(scale, float) else shape_of(q)[-1] ** -0.5
    return Parts(q=q, k=k, v=v, sink=None, mask=mask, scale=width, out=node, causal=causal)


def _softmax(softmax: fx.Node) -> Parts:
    require(args_of(softmax)[1] in (-1, 3), "the softmax is not over the keys", softmax)
    scores, probs = uncast(args_of(softmax)[0]), softmax
    if is_op(scores, A.sub.Tensor):  # minus its own row maximum: changes nothing
        scores, top = uncast(args_of(scores)[0]), args_of(scores)[1]
        top = args_of(top)[0] if is_op(top, operator.getitem) else top
        the_op(top, "the row maximum", A.max.dim, A.amax.default)
        require(
            uncast(args_of(top)[0]) is scores and args_of(top)[1] in (-1, 3, [-1], [3]), "the shift is not the row maximum", top
        )
    sink = None
    if is_op(scores, A.cat.default):
        parts, dim = args_of(scores)[0], args_of(scores)[1] if len(args_of(scores)) > 1 else 0
        require(dim in (-1, 3) and len(parts) == 2, "not one column beside the scores", scores)
        scores, sink = uncast(parts[0]), _sink_behind(parts[1])
        probs = only(users_through(probs, *_CASTS_AND_DROPOUT), "use of the probabilities", probs)
        dropped = (
            is_op(probs, A.slice.Tensor) and args_of(probs)[1] in (3, -1) and tuple(args_of(probs)[2:4]) in ((0, -1), (None, -1))
        )
        require(dropped, "the sink's probability is not dropped", probs)
    scores, mask = _unmask(scores)
    product, scale = _unscale(scores)
    the_op(product, "queries times keys", A.matmul.default)
    q, keys = as_node(unwidened(args_of(product)[0])), the_op(unwidened(args_of(product)[1]), "transposed keys", A.transpose.int)
    require(set(args_of(keys)[1:]) in ({2, 3}, {-1, -2}), "the keys are not transposed", keys)
    if is_op(q, A.mul.Tensor) and isinstance(args_of(q)[1], float):
        q, scale = as_node(args_of(q)[0]), scale * args_of(q)[1]
    out = only(users_through(probs, *_CASTS_AND_DROPOUT), "use of the probabilities", probs)
    the_op(out, "probabilities times values", A.matmul.default)
    k, v = (as_node(unwidened(x)) for x in (args_of(keys)[0], args_of(out)[1]))
    return Parts(q=q, k=k, v=v, sink=sink, mask=mask, scale=scale, out=_cast_back(out, q))


def _cast_back(out: fx.Node, q: fx.Node) -> fx.Node:
    """Return the node from which on the result has the queries' dtype."""
    while dtype_of(out) != dtype_of(q):
        out = the_op(only(list(out.users), "cast of the result", out), "a cast to the queries' dtype", A.to.dtype)
    return out


def _sink_behind(column: Any) -> fx.Node:
    node = through(column, A.expand.default, A.reshape.default, A.view.default, A.unsqueeze.default, A.to.dtype)
    require(isinstance(node, fx.Node) and node.op == "get_attr", "the column beside the scores is not a weight")
    return as_node(node)


def _unmask(scores: fx.Node) -> tuple[fx.Node, Any]:
    if is_op(scores, A.add.Tensor):
        return as_node(uncast(args_of(scores)[0])), args_of(scores)[1]
    if is_op(scores, A.where.ScalarOther, A.where.self):
        value = args_of(scores)[2]
        require(isinstance(value, float | int) and value <= -1e4, "where() does not hide with -inf", scores)
        return as_node(uncast(args_of(scores)[1])), args_of(scores)[0]
    if is_op(scores, A.masked_fill.Scalar) and is_op(args_of(scores)[1], A.logical_not.default, A.bitwise_not.default):
        require(constant(args_of(scores)[2], "the fill", scores) <= -1e4, "masked_fill does not hide with -inf", scores)
        return as_node(uncast(args_of(scores)[0])), args_of(scores)[1].args[0]
    raise Refusal("the scores are not masked in a known way", scores)


def _unscale(scores: fx.Node) -> tuple[fx.Node, float]:
    if is_op(scores, A.mul.Tensor, A.mul.Scalar):
        return as_node(uncast(args_of(scores)[0])), constant(args_of(scores)[1], "the scale", scores)
    if is_op(scores, A.div.Tensor, A.div.Scalar):
        return as_node(uncast(args_of(scores)[0])), 1 / constant(args_of(scores)[1], "the scale", scores)
    return scores, 1.0


def anchors(graph: fx.Graph) -> list[fx.Node]:
    """Return softmax nodes of rank 4 and SDPA nodes."""
    return [
        node
        for node in graph.nodes
        if is_op(node, A.scaled_dot_product_attention.default)
        or (is_op(node, A.softmax.int, A._softmax.default) and len(shape_of(node)) == 4)
    ]


FUSION = Fusion(name="sink_attention", anchors=anchors, match=match)
