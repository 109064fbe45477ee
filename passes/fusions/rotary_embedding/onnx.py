"""Rotation in ONNX: the standard operator, with cos and sin that the graph computes, or tables for operators that want them."""

from __future__ import annotations

import numpy as np
import torch
from onnx import TensorProto
from torch import fx

from oxfuse.passes.graph import args_of, dtype_of, shape_of
from oxfuse.passes.onnx_graph import OnnxGraph, Value


def rotary_embedding(to: OnnxGraph, node: fx.Node) -> Value:
    """RotaryEmbedding of q and k in float32, with heads side by side."""
    q, k, positions, inv_freq, scale = args_of(node)
    place = to.op("Unsqueeze", to.op("Cast", to.of(positions), to=TensorProto.FLOAT), to.ints(2))
    angle = to.op("Mul", place, to.of(inv_freq))  # [B, S, R / 2]
    tables = [to.op("Mul", to.op(kind, angle), to.constant(scale, np.float32)) for kind in ("Cos", "Sin")]
    turned = []
    for x in (q, k):
        heads, dim = shape_of(x)[2:]
        rotated = 2 * shape_of(inv_freq)[0]
        flat = to.op(
            "RotaryEmbedding",
            to.cast(to.reshaped(to.of(x), [0, 0, heads * dim]), dtype_of(x), torch.float32),
            *tables,
            num_heads=heads,
            interleaved=0,
            rotary_embedding_dim=rotated if rotated < dim else 0,
        )
        turned.append(to.reshaped(to.cast(flat, torch.float32, dtype_of(x)), [0, 0, heads, dim]))
    return turned[0], turned[1]


def angle_tables(to: OnnxGraph, inv_freq: fx.Node, scale: float) -> tuple[str, str]:
    """Return the names of scaled cos and sin of every position, [max_context, R / 2], computed as the op does, then rounded."""
    frequencies = to.module.get_buffer(str(inv_freq.target))
    angle = torch.arange(to.target.max_context).float()[:, None] * frequencies
    prefix = f"{inv_freq.target}_{scale:g}"
    cos, sin = ((table * scale).to(to.target.dtype) for table in (angle.cos(), angle.sin()))
    return to.table(f"{prefix}_cos", cos), to.table(f"{prefix}_sin", sin)


PORTABLE = {"oxfuse::rotary_embedding": rotary_embedding}
CONTRIB = dict[str, object]()
