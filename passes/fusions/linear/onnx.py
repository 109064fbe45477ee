"""Dense layers in ONNX: Gemm, which takes the weight as the checkpoint stores it. MatMul would want another copy, transposed."""

from __future__ import annotations

from torch import fx

from oxfuse.passes.graph import args_of, shape_of
from oxfuse.passes.onnx_graph import OnnxGraph, Value


def linear(to: OnnxGraph, node: fx.Node) -> Value:
    """Gemm over all leading dims at once."""
    x, weight, *bias = args_of(node)
    rank, (outputs, depth) = len(shape_of(node)), shape_of(weight)
    flat = to.of(x) if rank == 2 else to.reshaped(to.of(x), [-1, depth])
    product = to.op("Gemm", flat, to.of(weight), to.of(bias[0] if bias else None), transB=1)
    if rank == 2:
        return product
    return to.op("Reshape", product, to.op("Concat", to.op("Shape", to.of(x), end=rank - 1), to.ints(outputs), axis=0))


PORTABLE = {"aten::linear": linear}
CONTRIB = dict[str, object]()
