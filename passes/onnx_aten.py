"""What torch's own ops mean in ONNX, as far as fused graphs hold them."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from oxfuse.errors import InternalError, UserError
from oxfuse.passes.graph import args_of, dtype_of, shape_of
from oxfuse.passes.onnx_graph import CONTRIB, Form, OnnxGraph, Value
from oxfuse.passes.quantise import BLOCK


def _embedding(to: OnnxGraph, node: fx.Node) -> Value:
    weight, ids = args_of(node)[:2]
    if to.target.dense == "exact":
        return to.op("Gather", to.of(weight), to.of(ids), axis=0)
    check_blocks(weight)
    values, scales = to.quantised(weight, 8)
    axes = {"gather_axis": 0, "quantize_axis": 1}
    return to.op("GatherBlockQuantized", values, to.of(ids), scales, domain=CONTRIB, bits=8, block_size=BLOCK, **axes)


def check_blocks(weight: fx.Node) -> None:
    """Raise UserError for a dense weight whose rows are not whole blocks."""
    if (size := shape_of(weight)[-1]) % BLOCK:
        raise UserError(f"dense='int8' works on blocks of {BLOCK}, but {weight.target} has rows of {size}: leave it at exact.")


def _layer_norm(to: OnnxGraph, node: fx.Node) -> Value:
    x, shape, weight, bias, eps = args_of(node)[:5]
    return to.op("LayerNormalization", to.of(x), to.of(weight), to.of(bias), axis=-len(shape), epsilon=float(eps))


def _same(kind: str) -> Form:
    """Return the form of an op that ONNX has with the same arguments."""

    def form(to: OnnxGraph, node: fx.Node) -> Value:
        inputs = args_of(node)
        if node.kwargs or not all(isinstance(value, fx.Node) for value in inputs):
            raise InternalError(f"{node.name} calls {node.target} with {inputs} {dict(node.kwargs)}, which has no ONNX form.")
        return to.op(kind, *(to.of(value) for value in inputs))

    return form


def _gelu(to: OnnxGraph, node: fx.Node) -> Value:
    """In float32, as torch computes it inside: onnxruntime has no Gelu of every 16-bit type on every provider."""
    x, dtype = args_of(node)[0], dtype_of(node)
    wide = to.cast(to.of(x), dtype, torch.float32)
    return to.cast(to.op("Gelu", wide, approximate=str(node.kwargs.get("approximate", "none"))), torch.float32, dtype)


def _silu(to: OnnxGraph, node: fx.Node) -> Value:
    x = to.of(args_of(node)[0])
    return to.op("Mul", x, to.op("Sigmoid", x))


def _view(to: OnnxGraph, node: fx.Node) -> Value:
    x, shape = args_of(node)
    return to.reshaped(to.of(x), [size if isinstance(size, int) else to.of(size) for size in shape])


def _flatten(to: OnnxGraph, node: fx.Node) -> Value:
    x, first, *last = args_of(node)
    rank = len(shape_of(x))
    first, end = first % rank, (last[0] if last else -1) % rank + 1
    if first == 0:
        return to.reshaped(to.of(x), [-1, *shape_of(x)[end:]])
    ends = to.op("Shape", to.of(x), start=end) if end < rank else None
    parts = [to.op("Shape", to.of(x), end=first), to.ints(-1), *([] if ends is None else [ends])]
    return to.op("Reshape", to.of(x), to.op("Concat", *parts, axis=0))


def _transpose(to: OnnxGraph, node: fx.Node) -> Value:
    x, a, b = args_of(node)
    order = [*range(len(shape_of(x)))]
    order[a], order[b] = order[b], order[a]
    return to.op("Transpose", to.of(x), perm=order)


def _parts(to: OnnxGraph, node: fx.Node) -> Value:
    """Chunk and split, whose sizes are those of the results."""
    x, _, dim = args_of(node)
    sizes = [int(part.shape[dim]) for part in node.meta["val"]]
    return to.ops("Split", to.of(x), to.ints(*sizes), outputs="1" * len(sizes), axis=dim)


def _size(to: OnnxGraph, node: fx.Node) -> Value:
    x, dim = args_of(node)
    return to.size(to.of(x), dim)


def _cast(to: OnnxGraph, node: fx.Node) -> Value:
    x = args_of(node)[0]
    return to.cast(to.of(x), dtype_of(x), dtype_of(node))


def _itself(to: OnnxGraph, node: fx.Node) -> Value:
    return to.of(args_of(node)[0])


def _dims(kind: str) -> Form:
    def form(to: OnnxGraph, node: fx.Node) -> Value:
        x, dim = args_of(node)
        return to.op(kind, to.of(x), to.ints(dim))

    return form


FORMS: dict[str, Any] = {
    "aten::embedding": _embedding,
    "aten::layer_norm": _layer_norm,
    "aten::add": _same("Add"),
    "aten::mul": _same("Mul"),
    "aten::relu": _same("Relu"),
    "aten::gelu": _gelu,
    "aten::silu": _silu,
    "aten::view": _view,
    "aten::reshape": _view,
    "aten::flatten": _flatten,
    "aten::transpose": _transpose,
    "aten::chunk": _parts,
    "aten::split_with_sizes": _parts,
    "aten::sym_size": _size,
    "aten::unsqueeze": _dims("Unsqueeze"),
    "aten::squeeze": _dims("Squeeze"),
    "aten::to": _cast,
    "aten::contiguous": _itself,
}
