"""RMSNorm in ONNX: the standard operator, or ONNX Runtime's with the residual sum in it."""

from __future__ import annotations

from torch import fx

from oxfuse.passes.graph import args_of
from oxfuse.passes.onnx_graph import CONTRIB as CONTRIB_DOMAIN
from oxfuse.passes.onnx_graph import OnnxGraph, Value


def rms_norm(to: OnnxGraph, node: fx.Node) -> Value:
    """RMSNormalization over the last dim."""
    x, weight, eps = args_of(node)
    return to.op("RMSNormalization", to.of(x), to.of(weight), axis=-1, epsilon=float(eps))


def add_rms_norm(to: OnnxGraph, node: fx.Node) -> Value:
    """A sum, and RMSNormalization of it."""
    x, residual, weight, eps = args_of(node)
    total = to.op("Add", to.of(x), to.of(residual))
    return to.op("RMSNormalization", total, to.of(weight), axis=-1, epsilon=float(eps)), total


def skip_norm(to: OnnxGraph, node: fx.Node) -> Value:
    """Both in one operator, whose results 1 and 2 are for training."""
    x, residual, weight, eps = args_of(node)
    inputs = to.of(x), to.of(residual), to.of(weight)
    normed, _, _, total = to.ops(
        "SkipSimplifiedLayerNormalization", *inputs, outputs="1001", domain=CONTRIB_DOMAIN, epsilon=float(eps)
    )
    return normed, total


PORTABLE = {"oxfuse::rms_norm": rms_norm, "oxfuse::add_rms_norm": add_rms_norm}
CONTRIB = {"oxfuse::add_rms_norm": skip_norm}
