"""Dense layers in ONNX: Gemm, which takes the weight as the checkpoint stores it. MatMul would want another copy, transposed."""

from __future__ import annotations

from torch import fx

from oxfuse.passes.graph import args_of, shape_of
from oxfuse.passes.onnx_aten import check_blocks
from oxfuse.passes.onnx_graph import CONTRIB as CONTRIB_DOMAIN
from oxfuse.passes.onnx_graph import OnnxGraph, Value
from oxfuse.passes.quantise import BLOCK


def linear(to: OnnxGraph, node: fx.Node) -> Value:
    """Gemm over all leading dims at once."""
    x, weight, *bias = args_of(node)
    rank, (outputs, depth) = len(shape_of(node)), shape_of(weight)
    flat = to.of(x) if rank == 2 else to.reshaped(to.of(x), [-1, depth])
    product = to.op("Gemm", flat, to.of(weight), to.of(bias[0] if bias else None), transB=1)
    if rank == 2:
        return product
    return to.op("Reshape", product, to.op("Concat", to.op("Shape", to.of(x), end=rank - 1), to.ints(outputs), axis=0))


def quantised_linear(to: OnnxGraph, node: fx.Node) -> Value:
    """The contrib operator for weights of 8 bits, where the head shall have them; its inputs are rounded to 8 bits as well."""
    if to.target.dense == "exact" or node is not to.head:
        return linear(to, node)
    x, weight, *bias = args_of(node)
    check_blocks(weight)
    outputs, depth = shape_of(weight)
    values, scales = to.quantised(weight, 8)
    blocks = to.viewed(values, "blocks", shape=(outputs, depth // BLOCK, BLOCK))
    return to.op(
        "MatMulNBits",
        *(to.of(x), blocks, scales, "", "", to.of(bias[0] if bias else None)),
        domain=CONTRIB_DOMAIN,
        N=outputs,
        K=depth,
        bits=8,
        block_size=BLOCK,
        accuracy_level=4,
    )


PORTABLE = {"aten::linear": linear}
CONTRIB = {"aten::linear": quantised_linear}
