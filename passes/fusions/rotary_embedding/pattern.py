"""Find the rotation of queries and keys: rotate-half form, whole or partial heads, with or without a scale (YaRN).

Anchors: attention that is fused already. Its q and k are followed back to x, cos and sin; cos and sin are followed back to the
positions and the inverse frequencies. One fused op rotates both. What cos and sin are computed like is left to the numeric check.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from oxfuse.passes.fusion import Emitter, Fusion, Match
from oxfuse.passes.fusions.rotary_embedding import reference as reference
from oxfuse.passes.graph import (
    OXFUSE,
    A,
    Refusal,
    ancestors,
    args_of,
    as_node,
    is_op,
    is_tensor,
    only,
    require,
    same_size,
    shape_of,
    the_op,
    through,
    uncast,
)
from oxfuse.passes.weights import WeightTable

_Rotation = tuple[fx.Node, fx.Node, fx.Node]
ATTENTIONS = (OXFUSE.sink_attention_dense.default, OXFUSE.masked_attention.default)
_RESHAPES = (A.unsqueeze.default, A.expand.default, A.view.default, A.reshape.default)


def rotation(rotated: fx.Node) -> _Rotation:
    """Return (x, cos, sin) of a rotated tensor [B, heads, S, D], or refuse."""
    node = uncast(rotated)
    if is_op(node, A.cat.default) and len(args_of(node)[0]) == 2:
        first, second = (uncast(part) for part in args_of(node)[0])
        if is_op(first, A.sub.Tensor) and is_op(second, A.add.Tensor):
            return _by_halves(first, second)
        x, cos, sin = rotation(first)  # the rotated part of a partial rotation
        whole = as_node(uncast(x))
        (part, start, end), rest = (
            _slice_of(x) or (whole, 0, shape_of(whole)[-1]),
            _slice_of(second),
        )  # all may turn, none be left
        require(
            rest is not None and part is rest[0] and (start, end) == (0, rest[1]), "the two parts are not of one tensor", node
        )
        return part, cos, sin
    return _by_rotate_half(the_op(node, "a rotation", A.add.Tensor))


def _by_halves(first: fx.Node, second: fx.Node) -> _Rotation:
    """cat(a·cos - b·sin, b·cos + a·sin) with a and b the halves of x."""
    (a, cos), (b, sin) = (_product(arg) for arg in args_of(first))
    pairs = [_product(arg) for arg in args_of(second)]
    require([tuple(p) for p in pairs] in ([(b, cos), (a, sin)], [(a, sin), (b, cos)]), "not a rotation of two halves", second)
    half_a, half_b = _half(a), _half(b)
    require(half_a[0] is half_b[0] and (half_a[1], half_b[1]) == (0, 1), "the halves are not of one tensor", first)
    return half_a[0], cos, sin


def _by_rotate_half(total: fx.Node) -> _Rotation:
    """x·cos + cat(-x2, x1)·sin."""
    (x, cos), (turned, sin) = (_product(arg) for arg in args_of(total))
    the_op(turned, "rotate_half", A.cat.default)
    minus, first = (uncast(part) for part in args_of(turned)[0])
    the_op(minus, "the negated second half", A.neg.default)
    half_a, half_b = _half(first), _half(args_of(minus)[0])
    whole = half_a[0] is uncast(x) and half_b[0] is uncast(x)
    require(whole and (half_a[1], half_b[1]) == (0, 1), "rotate_half is of another tensor", total)
    return as_node(uncast(x)), cos, sin


def _product(node: Any) -> tuple[fx.Node, fx.Node]:
    product = the_op(uncast(node), "a product with cos or sin", A.mul.Tensor)
    a, b = (as_node(uncast(arg)) for arg in args_of(product))
    return (b, a) if len(shape_of(a)) == 4 and _is_table(a) and not _is_table(b) else (a, b)


def _is_table(node: fx.Node) -> bool:
    """Tell whether a factor is cos or sin: reshaped from one, and from no activation."""
    return is_op(_unscaled(node), A.cos.default, A.sin.default)


def _unscaled(node: Any) -> Any:
    while is_op(node, *_RESHAPES, A.to.dtype, A.to.dtype_layout, A._to_copy.default, A.mul.Tensor, A.mul.Scalar, A.slice.Tensor):
        node = args_of(node)[0]
    return node


def _half(node: Any) -> tuple[fx.Node, int]:
    """Return (x, which half) of one half of the last dim of x."""
    node = as_node(uncast(node))
    if is_op(node, operator.getitem) and is_op(args_of(node)[0], A.chunk.default, A.split.Tensor, A.split_with_sizes.default):
        x, size = as_node(uncast(args_of(node)[0].args[0])), shape_of(node)[-1]
        require(2 * size == shape_of(x)[-1], "the parts are not halves", node)
        return x, int(args_of(node)[1])
    part = _slice_of(node)
    if part is None:
        raise Refusal("not a half of a tensor", node)
    x, start, end = part
    size = shape_of(x)[-1]
    require((start, end) in ((0, size // 2), (size // 2, size)), "the slice is not a half", node)
    return x, int(start != 0)


def _slice_of(node: Any) -> tuple[fx.Node, int, int] | None:
    """Return (x, start, end) of a slice of the last dim, or of a part it was split into; else None."""
    node = uncast(node)
    if is_op(node, operator.getitem) and is_op(args_of(node)[0], A.split_with_sizes.default):
        x, sizes, *dim = args_of(args_of(node)[0])
        index = int(args_of(node)[1])
        return (as_node(uncast(x)), sum(sizes[:index]), sum(sizes[: index + 1])) if dim in ([-1], [3]) else None
    if not is_op(node, A.slice.Tensor) or args_of(node)[1] not in (-1, 3) or (len(args_of(node)) > 4 and args_of(node)[4] != 1):
        return None
    x = as_node(uncast(args_of(node)[0]))
    size = shape_of(x)[-1]
    start = int(args_of(node)[2] or 0) if len(args_of(node)) > 2 else 0
    end = int(args_of(node)[3]) if len(args_of(node)) > 3 and args_of(node)[3] is not None else size
    return x, start % size if start < 0 else start, min(end if end >= 0 else end + size, size)


def match(attention: fx.Node, weights: WeightTable) -> Match:
    """Return the match behind the q and k of a fused attention, or refuse."""
    turned_q, turned_k = (
        as_node(the_op(a, "queries and keys, heads first", A.transpose.int).args[0]) for a in args_of(attention)[:2]
    )
    q, cos, sin = rotation(turned_q)
    try:
        k, cos_k, sin_k = rotation(turned_k)
    except Refusal:
        found = _beside(attention, turned_q, cos, sin)
        if found is None:
            raise
        turned_k, k, cos_k, sin_k = found
    require(_same_table(cos, cos_k) and _same_table(sin, sin_k), "queries and keys are rotated by different angles", attention)
    table = ancestors([cos, sin])
    positions = _positions(table, cos)
    inv_freq = only([n for n in table if n.op == "get_attr" and not _is_int(n)], "tensor of inverse frequencies", cos)
    require(len(shape_of(inv_freq)) == 1, "the inverse frequencies are not a vector", inv_freq)
    scale = _scale(cos)
    require(scale == _scale(sin), "cos and sin are scaled differently", cos)
    batch, length = shape_of(q)[0], shape_of(q)[2]
    rows, columns = shape_of(positions)
    fits = same_size(columns, length) and (same_size(rows, batch) or rows == 1)
    require(fits, f"positions of shape {[rows, columns]} are not those of {[batch, length]} tokens", positions)

    def emit(to: Emitter) -> tuple[fx.Node, ...]:
        tokens_first = [to.call(A.transpose.int, x, 1, 2) for x in (q, k)]
        each = positions
        if not same_size(rows, batch):
            sizes = [to.call(A.sym_size.int, q, 0) if isinstance(batch, torch.SymInt) else batch, -1]
            each = to.call(A.expand.default, positions, sizes)
        both = to.call(OXFUSE.rotary_embedding.default, *tokens_first, each, inv_freq, scale)
        return tuple(to.call(A.transpose.int, to.call(operator.getitem, both, i), 1, 2) for i in range(2))

    return Match(inputs=(q, k, positions), outputs=(turned_q, turned_k), emit=emit)


def _same_table(a: fx.Node, b: fx.Node) -> bool:
    return uncast(through(a, *_RESHAPES)) is uncast(through(b, *_RESHAPES))


def _beside(attention: fx.Node, turned_q: fx.Node, cos: fx.Node, sin: fx.Node) -> tuple[fx.Node, ...] | None:
    """Return the rotation by the same angles that stands between the attention before and this one: (rotated, x, cos, sin).

    Keys that go into a cache are not what the attention reads, and what it reads may not even show that it depends on them.
    """
    own, node = ancestors([turned_q]), attention.prev
    while node.op not in ("root", "placeholder") and not is_op(node, *ATTENTIONS):
        if node not in own and is_op(node, A.cat.default, A.add.Tensor):
            try:
                x, cos_k, sin_k = rotation(node)
            except (Refusal, IndexError):
                x = None
            if x is not None and _same_table(cos, cos_k) and _same_table(sin, sin_k):
                return node, x, cos_k, sin_k
        node = node.prev
    return None


def _positions(table: set[fx.Node], cos: fx.Node) -> fx.Node:
    """Return what is converted to the angles' dtype, as integers [B, S]."""
    whole = [
        n for n in table if is_tensor(n) and _is_int(n) and any(u in table and is_tensor(u) and not _is_int(u) for u in n.users)
    ]
    positions = as_node(only(whole, "tensor of positions", cos))
    while len(shape_of(positions)) != 2:
        positions = as_node(args_of(the_op(positions, "positions [B, S]", *_RESHAPES))[0])
    return positions


def _scale(table: fx.Node) -> float:
    """Return the product of the constants between cos (or sin) and its use."""
    scale, node = 1.0, table
    while not is_op(node, A.cos.default, A.sin.default):
        if is_op(node, A.mul.Tensor, A.mul.Scalar):
            require(isinstance(args_of(node)[1], int | float), "cos is scaled by a tensor", node)
            scale *= float(str(args_of(node)[1]))
        node = the_op(node, "cos or sin", *_RESHAPES, A.to.dtype, A.to.dtype_layout, A._to_copy.default, A.mul, A.slice.Tensor)
        node = as_node(args_of(node)[0])
    return scale


def _is_int(node: fx.Node) -> bool:
    return not node.meta["val"].dtype.is_floating_point


def _anchors(graph: fx.Graph) -> list[fx.Node]:
    attentions = [n for n in graph.nodes if is_op(n, *ATTENTIONS)]
    return [n for n in attentions if not is_op(through(args_of(n)[0], operator.getitem), OXFUSE.rotary_embedding.default)]


FUSION = Fusion(
    name="rotary_embedding",
    anchors=_anchors,
    match=match,
    after=("sink_attention", "masked_attention"),  # the fused attention says which tensors are its queries and keys
)
