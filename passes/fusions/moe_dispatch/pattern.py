"""Find a mixture of experts: router, top-k, clamped SwiGLU experts, weighted sum.

Anchor: `topk`. The region ends at the first later node that every path from the top-k crosses and that is shaped like the
router's input, so each way of dispatching (dense, batched, grouped products) is found alike. Roles of weights follow from their
shapes, the constants of the activation from its nodes; all the rest is left to the numeric check.
"""

from __future__ import annotations

import math

from torch import fx

from oxfuse.passes.fusion import Emitter, Fusion, Match
from oxfuse.passes.fusions.moe_dispatch import reference as reference  # registers the op
from oxfuse.passes.graph import (
    OXFUSE,
    A,
    Refusal,
    after_casts,
    ancestors,
    args_of,
    as_node,
    constant,
    dtype_of,
    in_order,
    is_op,
    is_tensor,
    only,
    require,
    same_shape,
    shape_of,
    the_op,
    uncast,
)
from oxfuse.passes.weights import SwapRowsAndColumns, WeightTable


def match(topk: fx.Node, weights: WeightTable) -> Match:
    """Return the match around `topk`, or refuse."""
    router = the_op(uncast(args_of(topk)[0]), "a linear router under the top-k", A.linear.default)
    require(len(args_of(router)) == 3, "the router has no bias", router)
    x, router_weight, router_bias = (as_node(uncast(a)) for a in args_of(router))
    top_k = int(constant(args_of(topk)[1], "the number of chosen experts", topk))
    experts, hidden = shape_of(router_weight)
    out = _end(topk, x)
    region = ancestors([out], [x])
    read = [n for n in in_order(topk.graph, region) if n.op == "get_attr" and n not in (router_weight, router_bias)]
    inner = only(
        [
            n
            for n in read
            if len(shape_of(n)) == 3
            and shape_of(n)[1] == hidden
            and shape_of(n)[2] % 2 == 0
            and _has(read, (experts, shape_of(n)[2] // 2, hidden))
        ],
        "gate and up weight [experts, hidden, 2·inner]",
        topk,
    )
    size = shape_of(inner)[2] // 2
    gate_up, gate_up_bias, down, down_bias = _roles(read, inner, (experts, size, hidden), topk)
    alpha, limit = _activation(topk.graph, region, topk)

    def emit(to: Emitter) -> tuple[fx.Node, ...]:
        matrices = [part for weight in (gate_up, down) for part in _stored(to, weight)]
        new = to.call(
            OXFUSE.moe_dispatch.default, x, router_weight, router_bias,
            matrices[0], matrices[1], gate_up_bias, matrices[2], matrices[3], down_bias, top_k, alpha, limit,
        )  # fmt: skip
        return (new,)

    require(dtype_of(out) == dtype_of(x), f"the result is {dtype_of(out)}, x is {dtype_of(x)}", out)
    return Match(inputs=(x,), outputs=(out,), emit=emit)


def _end(topk: fx.Node, x: fx.Node) -> fx.Node:
    """Return the first node after `topk` that all its paths cross and that has the size of x."""
    region, node = {topk}, topk
    while (node := node.next).op != "output":
        if region.isdisjoint(node.all_input_nodes):
            continue
        region.add(node)
        crossed = all(user in region for inner in region - {node} for user in inner.users)
        if crossed and is_tensor(node) and same_shape(node, x):
            return after_casts(node)
    raise Refusal("the paths from the top-k never meet", topk)


def _has(nodes: list[fx.Node], shape: tuple[int, ...]) -> bool:
    return any(shape_of(n) == shape for n in nodes)


def _roles(read: list[fx.Node], gate_up: fx.Node, down_shape: tuple[int, ...], topk: fx.Node) -> tuple[fx.Node, ...]:
    experts, size, hidden = down_shape
    rest = [n for n in read if n is not gate_up]
    down = only([n for n in rest if shape_of(n) == down_shape], f"down weight {list(down_shape)}", topk)
    biases = [n for n in rest if len(shape_of(n)) == 2]
    if 2 * size == hidden:  # alike in shape: the first one read belongs to the first product
        require([shape_of(n) for n in biases] == [(experts, hidden)] * 2, "the experts' biases are missing", topk)
        return gate_up, biases[0], down, biases[1]
    gate_up_bias = only(
        [n for n in biases if shape_of(n) == (experts, 2 * size)], f"gate and up bias {[experts, 2 * size]}", topk
    )
    down_bias = only([n for n in biases if shape_of(n) == (experts, hidden)], f"down bias {[experts, hidden]}", topk)
    return gate_up, gate_up_bias, down, down_bias


def _activation(graph: fx.Graph, region: set[fx.Node], topk: fx.Node) -> tuple[float, float]:
    """Return alpha and limit of (up + 1) · gate · sigmoid(alpha · gate), gate and up clamped."""
    sigmoid = only([n for n in in_order(graph, region) if is_op(n, A.sigmoid.default)], "sigmoid", topk)
    scaled = uncast(args_of(sigmoid)[0])
    alpha = constant(args_of(scaled)[1], "alpha", scaled) if is_op(scaled, A.mul.Tensor, A.mul.Scalar) else 1.0
    limits = {float(b) for n in region if is_op(n, A.clamp.default, A.clamp_max.default) for b in args_of(n)[1:] if b is not None}
    limits = {abs(b) for b in limits if math.isfinite(b)}
    require(len(limits) == 1, f"gate and up are clamped at {sorted(limits) or 'nothing'}, not at one limit", sigmoid)
    return alpha, limits.pop()


def _stored(to: Emitter, node: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    """Replace a weight [E, in, out] by its MXFP4 blocks and scales, or by rows [E, out, in], or look at it as such."""
    name = str(node.target)
    weight = to.weights[name]
    if weight.encoding == "mxfp4":
        parts = weight.parts()
        return to.weight(f"{name}_blocks", parts["blocks"]), to.weight(f"{name}_scales", parts["scales"])
    if weight.fixed:
        device = node.meta["val"].device.type
        require(device in ("cpu", "cuda"), f"there is no kernel for {device}", node)
        return to.call(A.transpose.int, node, 1, 2), None
    return to.weight(f"{name}_rows", weight.then(SwapRowsAndColumns())), None


FUSION = Fusion(
    name="moe_dispatch",
    anchors=lambda graph: [node for node in graph.nodes if is_op(node, A.topk.default)],
    match=match,
)
