"""Lower a fused module to an ONNX model whose weights lie in the artifact's weight file.

In: a module as `insert_past` returns it, whose weights were never read. Out: `model.onnx`, a few hundred kilobytes, that names
places in the safetensors file beside it: ONNX's external data is bytes at an offset of any file, so no weight exists twice.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import TensorProto, helper

from oxfuse.compiler.fuse import Fused
from oxfuse.passes.insert_past import FIRST, INPUTS
from oxfuse.passes.onnx_aten import FORMS
from oxfuse.passes.onnx_graph import CONTRIB, DTYPES, IR_VERSION, IR_VERSION_E8M0, OPSET, OnnxGraph, OnnxTarget, View, forms

MODEL = "model.onnx"
IDS, MASK = INPUTS


@dataclass(frozen=True, kw_only=True)
class OnnxModel:
    """A translated module. `weights` are the names of the fused graph's weights that it reads, `tables` its own, with values."""

    graph: OnnxGraph
    nodes: list[onnx.NodeProto]
    inputs: list[onnx.ValueInfoProto]
    outputs: list[onnx.ValueInfoProto]
    weights: tuple[str, ...]
    tables: dict[str, torch.Tensor]


def translate(fused: Fused, target: OnnxTarget, *, pooled: bool) -> OnnxModel:
    """Return the model; weights that it wants in another form join the table of `fused`.

    Inputs and outputs are called as onnxruntime-genai and Optimum call them: input_ids int64 [batch_size, sequence_length],
    attention_mask int64 [batch_size, total_sequence_length], past_key_values.N.key and .value [batch_size, kv_heads,
    past_sequence_length, head_dim] -> logits [batch_size, logits_length, width], present.N.key and .value [batch_size, kv_heads,
    total_sequence_length, head_dim]. first_logit int64 [1] may be left out, which asks for the logits of all tokens. Models
    without a cache have the first two inputs, of one length, and no present; pooled ones answer with [batch_size, width].
    Raises InternalError for an op that has no form in ONNX.
    """
    module, cache, width = fused.step, fused.cache, fused.width
    graph = OnnxGraph(module, fused.weights, target)
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    cached = any(node.name == FIRST for node in placeholders)
    pasts = [f"past_key_values.{i}.{kv}" for i in range(len(cache.layers)) for kv in ("key", "value")] if cached else []
    for node, name in zip(placeholders, [*INPUTS, FIRST, *pasts] if cached else INPUTS, strict=True):
        graph.set(node, name)
    for node in module.graph.nodes:
        if node.op == "get_attr":
            graph.set(node, str(node.target))
    graph.emit(module.graph, {**FORMS, **forms(target.profile)})
    (results,) = module.graph.output_node().args
    found = [graph.of(node) for node in results]  # type: ignore[union-attr]
    if pooled:
        found[0] = graph.op("Squeeze", found[0], graph.ints(1))
    names = ["logits", *(name.replace("past_key_values", "present") for name in pasts)]
    nodes = graph.used_nodes(found)
    _rename(nodes, dict(zip(found, names, strict=True)))

    def sizes(length: str) -> list[list[int | str]]:
        return [["batch_size", layer.kv_heads, length, layer.head_dim] for layer in cache.layers for _ in "kv"]

    element, total = DTYPES[target.dtype], "total_sequence_length" if cached else "sequence_length"
    inputs = [
        helper.make_tensor_value_info(IDS, TensorProto.INT64, ["batch_size", "sequence_length"]),
        helper.make_tensor_value_info(MASK, TensorProto.INT64, ["batch_size", total]),
        *([helper.make_tensor_value_info(FIRST, TensorProto.INT64, [1])] if cached else []),
        *(_info(name, element, shape) for name, shape in zip(pasts, sizes("past_sequence_length"), strict=False)),
    ]
    outputs = [
        _info("logits", element, ["batch_size", *([] if pooled else ["logits_length" if cached else "sequence_length"]), width]),
        *(_info(name, element, shape) for name, shape in zip(names[1:], sizes(total), strict=False)),
    ]
    read = {name for node in nodes for name in _inputs(node)}
    return OnnxModel(
        graph=graph,
        nodes=nodes,
        inputs=inputs,
        outputs=outputs,
        weights=tuple(sorted(graph.weights & {*read, *(graph.views[name].weight for name in graph.views.keys() & read)})),
        tables={name: value for name, value in graph.computed.items() if name in read},
    )


def write_model(model: OnnxModel, path: Path, weights: Path, stored: Mapping[str, str]) -> None:
    """Write the model to `path`; its weights are the tensors `stored[name]` of the safetensors file `weights` in that folder."""
    header, begin = _read_header(weights)
    read = {name for node in model.nodes for name in _inputs(node)}
    whole = {name: View(weight=name, element=None, shape=None) for name in (*model.weights, *model.tables)}
    external = []
    for name, view in sorted((whole | model.graph.views).items()):
        if name not in read:
            continue
        entry = header[stored[view.weight]]
        element = _CODES[entry["dtype"]] if view.element is None else view.element
        tensor = TensorProto(name=name, data_type=element, dims=entry["shape"] if view.shape is None else view.shape)
        tensor.data_location = TensorProto.EXTERNAL
        first, last = entry["data_offsets"]
        for key, value in (("location", weights.name), ("offset", begin + first), ("length", last - first)):
            tensor.external_data.add(key=key, value=str(value))
        external.append(tensor)
    constants = [tensor for name, tensor in model.graph.constants.items() if name in read]
    if any(value.name == FIRST for value in model.inputs):  # an input with a value may be left out
        constants.append(helper.make_tensor(FIRST, TensorProto.INT64, [1], [0]))
    graph = helper.make_graph(model.nodes, "oxfuse", model.inputs, model.outputs, [*external, *constants])
    domains = [helper.make_opsetid("", OPSET)]
    if any(node.domain == CONTRIB for node in model.nodes):
        domains.append(helper.make_opsetid(CONTRIB, 1))
    version = IR_VERSION_E8M0 if any(tensor.data_type == TensorProto.FLOAT8E8M0 for tensor in external) else IR_VERSION
    proto = helper.make_model(graph, opset_imports=domains, ir_version=version, producer_name="oxfuse")
    path.write_bytes(proto.SerializeToString(deterministic=True))


def _rename(nodes: list[onnx.NodeProto], names: Mapping[str, str]) -> None:
    """Give values other names, where they are made and where they are read."""
    for node in nodes:
        for values in (node.input, node.output):
            for i, value in enumerate(values):
                if value in names:
                    values[i] = names[value]


def _inputs(node: onnx.NodeProto) -> list[str]:
    inner = [name for attribute in node.attribute for sub in attribute.g.node for name in _inputs(sub)]
    return [*node.input, *inner]


def _info(name: str, element: int, shape: list[int | str]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, element, shape)


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """Return the entries of a safetensors file, and where in the file its data begins."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(length)), 8 + length


_CODES = {"F32": TensorProto.FLOAT, "F16": TensorProto.FLOAT16, "BF16": TensorProto.BFLOAT16, "U8": TensorProto.UINT8}
