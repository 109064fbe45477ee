"""Builds an ONNX graph from a fused one: node by node, with what each op means in ONNX taken from the fusions' `onnx.py`.

Two profiles. "ort" uses ONNX Runtime's contrib operators (domain com.microsoft), "portable" standard operators alone, which
other runtimes have too. Equal nodes are made once, so tables and masks that every layer needs exist once. Weights stay names: who
writes the model says where their bytes lie.
"""

from __future__ import annotations

import importlib
import importlib.util
import operator
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import fx

from oxfuse.errors import InternalError
from oxfuse.passes import fusions
from oxfuse.passes.graph import A, args_of, is_op
from oxfuse.passes.quantise import Bits, BlockScales, BlockValues
from oxfuse.passes.weights import Transform, WeightTable

Profile = Literal["ort", "portable"]
Provider = Literal["cpu", "cuda"]
Experts = Literal["exact", "int8", "int4"]
Dense = Literal["exact", "int8"]
OPSET = 23
"""The first with RMSNormalization and RotaryEmbedding."""
IR_VERSION = 11
IR_VERSION_E8M0 = 12
"""Of models with tensors of that type, which came with it."""
CONTRIB = "com.microsoft"
DTYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.int64: TensorProto.INT64,
    torch.int32: TensorProto.INT32,
    torch.uint8: TensorProto.UINT8,
    torch.bool: TensorProto.BOOL,
}
TO_THE_END = 1 << 62
"""An end of slices behind every end."""
Value = str | tuple[str, ...]
Form = Callable[["OnnxGraph", fx.Node], Value]
"""Adds the nodes that a call means and returns the name of its result, or of its results."""


@dataclass(frozen=True, kw_only=True)
class OnnxTarget:
    """What a model is for.

    provider: onnxruntime's part that shall run it. dtype: of weights, activations and caches. max_context: no sequence is longer.
    experts, dense: how experts, and the embeddings and the head, are stored and computed.
    """

    profile: Profile
    provider: Provider = "cpu"
    dtype: torch.dtype = torch.float32
    max_context: int
    experts: Experts = "exact"
    dense: Dense = "exact"


@dataclass(frozen=True, kw_only=True)
class View:
    """A weight's bytes as a tensor of another element type, one of ONNX's, or of another shape; None: as it is stored."""

    weight: str
    element: int | None
    shape: tuple[int, ...] | None


class OnnxGraph:
    """An ONNX graph in the making. `of` gives the name of what a node of the fused graph yields."""

    def __init__(self, module: fx.GraphModule, weights: WeightTable, target: OnnxTarget) -> None:
        """Begin a graph for `module`, whose computed buffers have values and whose weights are those of the table `weights`."""
        self.module, self.target = module, target
        self.table_of_weights = weights
        self.computed: dict[str, torch.Tensor] = {}
        """Weights that forms made, such as tables, by name."""
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}
        self.weights: set[str] = set()
        """Names of the weights that nodes may read."""
        self.views: dict[str, View] = {}
        """Other forms of the same bytes, by name."""
        self.head = _head(module.graph)
        self._values: dict[fx.Node, Value] = {}
        self._made: dict[object, tuple[str, ...]] = {}
        self._count = 0

    def of(self, node: Any) -> str:
        """Return the name of a node's value, "" for None, which is how ONNX leaves an input out."""
        if node is None:
            return ""
        value = self._values[node]
        if not isinstance(value, str):
            raise InternalError(f"{node.name} has {len(value)} results, one was expected.")
        return value

    def parts_of(self, node: fx.Node) -> tuple[str, ...]:
        """Return the names of the values of a node with several."""
        value = self._values[node]
        return (value,) if isinstance(value, str) else value

    def set(self, node: fx.Node, value: Value) -> None:
        """Say what a node's value is called."""
        self._values[node] = value
        if node.op == "get_attr":
            assert isinstance(value, str)
            self.weights.add(value)

    def op(self, kind: str, *inputs: str, domain: str = "", **attributes: Any) -> str:
        """Add a node with one result, unless an equal one is there; return the result's name."""
        return self.ops(kind, *inputs, outputs="1", domain=domain, **attributes)[0]

    def ops(self, kind: str, *inputs: str, outputs: str, domain: str = "", **attributes: Any) -> tuple[str, ...]:
        """Do the same with several results, a "1" in `outputs` each; a "0" leaves an optional one out, whose name is "".

        Attributes that are None are left out, and so are empty inputs at the end.
        """
        attributes = {name: value for name, value in attributes.items() if value is not None}
        while inputs and not inputs[-1]:
            inputs = inputs[:-1]
        key = kind, domain, inputs, outputs, tuple((name, _frozen(value)) for name, value in sorted(attributes.items()))
        if key not in self._made:
            self._count += 1
            names = tuple(f"{kind}_{self._count}_{i}" if wanted == "1" else "" for i, wanted in enumerate(outputs))
            self.nodes.append(helper.make_node(kind, inputs, names, name=f"{kind}_{self._count}", domain=domain, **attributes))
            self._made[key] = names
        return self._made[key]

    def constant(self, values: Any, dtype: Any) -> str:
        """Return the name of a small tensor that the model itself holds; `dtype` is NumPy's."""
        array = np.asarray(values, dtype)
        key = "constant", array.dtype.str, array.shape, array.tobytes()
        if key not in self._made:
            name = f"constant_{len(self.constants) + 1}"
            self.constants[name] = numpy_helper.from_array(array, name)
            self._made[key] = (name,)
        return self._made[key][0]

    def ints(self, *values: int) -> str:
        """Return the name of a constant int64 vector."""
        return self.constant(values, np.int64)

    def derived(self, node: fx.Node, suffix: str, transform: Transform, dtype: torch.dtype) -> str:
        """Return the name of a weight in another form; the table of weights gets it, with the transform as its last step."""
        weight = self.table_of_weights[str(node.target)].then(transform, dtype)
        equal = (name for name, known in self.table_of_weights.items() if known == weight)  # that of a tied weight
        name = next(equal, f"{node.target}_{suffix}")
        self.table_of_weights[name] = weight
        self.weights.add(name)
        return name

    def quantised(self, node: fx.Node, bits: Bits) -> tuple[str, str]:
        """Return the names of a weight [..., K] as whole numbers, and of their scales float32 [..., K / 32]."""
        values = self.derived(node, f"int{bits}", BlockValues(bits), torch.uint8)
        return values, self.derived(node, f"int{bits}_scales", BlockScales(bits), torch.float32)

    def viewed(self, weight: str, suffix: str, *, element: int | None = None, shape: tuple[int, ...] | None = None) -> str:
        """Return the name of a view of a weight: the weight file holds its bytes once."""
        self.views[name := f"{weight}_{suffix}"] = View(weight=weight, element=element, shape=shape)
        return name

    def cast(self, value: str, old: torch.dtype, new: torch.dtype) -> str:
        """Return a value of dtype `old` in dtype `new`."""
        return value if old == new else self.op("Cast", value, to=DTYPES[new])

    def table(self, name: str, values: torch.Tensor) -> str:
        """Return the name of a weight that follows from the configuration: written once, however often it is asked for."""
        self.computed.setdefault(name, values)
        return name

    def size(self, value: str, dim: int) -> str:
        """Return the name of a size of a tensor, int64 [1]; `dim` counts from the front."""
        return self.op("Shape", value, start=dim, end=dim + 1)

    def reshaped(self, value: str, shape: Sequence[int | str]) -> str:
        """Return a tensor in another shape, of numbers (0: as it was, -1: what is left) and names of int64 [1]."""
        return self.op("Reshape", value, self.shape(shape))

    def shape(self, shape: Sequence[int | str]) -> str:
        """Return the name of an int64 vector of numbers and names of int64 [1]."""
        if all(isinstance(size, int) for size in shape):
            return self.constant(shape, np.int64)
        return self.op("Concat", *(self.ints(size) if isinstance(size, int) else size for size in shape), axis=0)

    def emit(self, graph: fx.Graph, forms: Mapping[str, Form]) -> None:
        """Add what the calls of `graph` mean; inputs and weights have been `set`. Raises InternalError for an unknown op."""
        for node in graph.nodes:
            if node.op != "call_function":
                continue
            if node.target is operator.getitem:
                source, index = args_of(node)
                self.set(node, self.parts_of(source)[index])
                continue
            form = forms.get(name := operator_name(node))
            if form is None:
                raise InternalError(f"No ONNX form of {name} is known, which {node.name} calls.")
            self.set(node, form(self, node))

    def used_nodes(self, outputs: Sequence[str]) -> list[onnx.NodeProto]:
        """Return the nodes that the outputs need, in order: forms may have taken in what others made."""
        needed, kept = set(outputs), []
        for node in reversed(self.nodes):
            if needed.intersection(node.output):
                needed.update(_read(node))
                kept.append(node)
        return kept[::-1]


def _head(graph: fx.Graph) -> fx.Node | None:
    """Return the dense layer that the first result of a graph comes from, with nothing but views in between; None without one."""
    node: Any = graph.output_node().args[0]
    node = node[0] if isinstance(node, list | tuple) else node
    while isinstance(node, fx.Node) and node.op == "call_function":
        if is_op(node, A.linear):
            return node
        node = node.args[0] if is_op(node, A.view, A.to, A.squeeze) else None
    return None


def _read(node: onnx.NodeProto) -> set[str]:
    """Return the names that a node reads, those that its subgraphs take from outside included."""
    names = set(node.input)
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            for inner in attribute.g.node:
                names |= _read(inner)
            names |= {output.name for output in attribute.g.output}
    return names


def operator_name(node: fx.Node) -> str:
    """Return "oxfuse::rms_norm" for a call of that op, whatever its overload."""
    target: Any = node.target
    return str(target._schema.name) if isinstance(target, torch._ops.OpOverload) else str(target)


def forms(profile: Profile) -> dict[str, Form]:
    """Return what the fusions' `onnx.py` say that ops mean; the contrib form where there is one and the profile allows it."""
    found: dict[str, Form] = {}
    for info in pkgutil.iter_modules(fusions.__path__):
        name = f"{fusions.__name__}.{info.name}.onnx"
        if info.ispkg and importlib.util.find_spec(name) is not None:
            module = importlib.import_module(name)
            found |= module.PORTABLE | (module.CONTRIB if profile == "ort" else {})
    return found


def _frozen(value: Any) -> object:
    if isinstance(value, onnx.GraphProto | onnx.TensorProto):
        return value.SerializeToString()
    return tuple(value) if isinstance(value, list) else value
