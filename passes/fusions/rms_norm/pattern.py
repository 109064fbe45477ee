"""Find RMSNorm, with or without the residual addition before it.

Anchor: `rsqrt`. Form: y = weight * (x * rsqrt(mean(x², -1) + eps)), inside float32 or wider, cast to the dtype of x at the end.
Where x is a sum of two tensors of its own shape, the sum is taken in.
"""

from __future__ import annotations

import operator

from torch import fx

from oxfuse.passes.fusion import Emitter, Fusion, Match
from oxfuse.passes.fusions.rms_norm import reference as reference  # registers the op
from oxfuse.passes.graph import (
    OXFUSE,
    A,
    after_casts,
    args_of,
    constant,
    dtype_of,
    is_op,
    is_tensor,
    only,
    require,
    same_shape,
    shape_of,
    the_op,
    uncast,
)
from oxfuse.passes.weights import WeightTable


def match(rsqrt: fx.Node, weights: WeightTable) -> Match:
    """Return the match around `rsqrt`, or refuse."""
    total = the_op(args_of(rsqrt)[0], "mean + eps under the root", A.add.Tensor)
    mean, eps = the_op(args_of(total)[0], "a mean under the root", A.mean.dim), constant(args_of(total)[1], "eps", total)
    require(list(args_of(mean)[1]) in ([-1], [len(shape_of(mean)) - 1]), "the mean is not over the last dim", mean)
    square = the_op(args_of(mean)[0], "a square under the mean", A.pow.Tensor_Scalar, A.mul.Tensor, A.square.default)
    require(not is_op(square, A.pow.Tensor_Scalar) or args_of(square)[1] == 2, "the power is not 2", square)
    wide = args_of(square)[0]
    require(not is_op(square, A.mul.Tensor) or args_of(square)[1] is wide, "the mean is not of a square", square)
    x = uncast(wide)
    scaled = only([u for u in rsqrt.users if is_op(u, A.mul.Tensor)], "product with the reciprocal root", rsqrt)
    require(wide in args_of(scaled), "the reciprocal root does not scale what it was taken of", scaled)
    product = only(list(scaled.users), "product with the weight", scaled)
    the_op(product, "a product with the weight", A.mul.Tensor)
    weight = only([a for a in product.all_input_nodes if uncast(a).op == "get_attr"], "norm weight", product)
    require(len(shape_of(weight)) == 1, "the norm's weight is not a vector", weight)
    out = after_casts(product)
    require(dtype_of(out) == dtype_of(x), f"the result is {dtype_of(out)}, x is {dtype_of(x)}", out)

    sums = is_op(x, A.add.Tensor) and all(is_tensor(a) and same_shape(a, x) and dtype_of(a) == dtype_of(x) for a in args_of(x))
    if sums and not x.kwargs:
        residual, branch = args_of(x)

        def emit_with_residual(to: Emitter) -> tuple[fx.Node, ...]:
            both = to.call(OXFUSE.add_rms_norm.default, branch, residual, uncast(weight), eps)
            normed, summed = (to.call(operator.getitem, both, i) for i in range(2))
            return normed, summed

        return Match(inputs=(residual, branch), outputs=(out, x), emit=emit_with_residual)
    return Match(inputs=(x,), outputs=(out,), emit=lambda to: (to.call(OXFUSE.rms_norm.default, x, uncast(weight), eps),))


FUSION = Fusion(
    name="rms_norm",
    anchors=lambda graph: [node for node in graph.nodes if is_op(node, A.rsqrt.default)],
    match=match,
    after=("moe_dispatch", "sink_attention", "rotary_embedding"),  # they find their ends by the sums that this one takes in
)
