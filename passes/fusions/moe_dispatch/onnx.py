"""Mixture of experts in ONNX: ONNX Runtime's MoE, or a loop over the experts, each of which takes the tokens that chose it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from onnx import GraphProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper
from torch import fx

from oxfuse.errors import InternalError, UserError
from oxfuse.passes.graph import args_of, shape_of
from oxfuse.passes.onnx_graph import CONTRIB as CONTRIB_DOMAIN
from oxfuse.passes.onnx_graph import TO_THE_END, OnnxGraph, Value
from oxfuse.passes.quantise import BLOCK, Bits, HalfPowers, Mxfp4Bytes, Mxfp4Columns


def moe(to: OnnxGraph, node: fx.Node) -> Value:
    """The contrib operator. It takes the router's logits, and the rows of gate and up in turns, as the checkpoint has them."""
    if to.target.experts != "exact":
        return quantised_moe(to, node)
    if to.target.provider == "cuda" and args_of(node)[4] is not None:
        return mxfp4_moe(to, node)
    x, router, router_bias, gate_up, _, gate_up_bias, down, _, down_bias, top_k, alpha, limit = _dense(node)
    logits = to.op("Gemm", to.of(x), to.of(router), to.of(router_bias), transB=1)
    inputs = to.of(x), logits, to.of(gate_up), to.of(gate_up_bias), to.of(down), to.of(down_bias)
    return to.op("MoE", *inputs, domain=CONTRIB_DOMAIN, **_attributes(top_k, alpha, limit))


def quantised_moe(to: OnnxGraph, node: fx.Node) -> Value:
    """The contrib operator for experts of 8 or 4 bits. Both multiply with activations rounded to 8 bits a block of 32.

    Raises UserError for sizes that are no multiples of a block.
    """
    x, router, router_bias, gate_up, gate_up_scales, gate_up_bias, down, down_scales, down_bias, top_k, alpha, limit = args_of(
        node
    )
    hidden, inner = shape_of(x)[-1], shape_of(gate_up_bias)[1] // 2
    if hidden % BLOCK or inner % BLOCK:
        raise UserError(
            f"experts={to.target.experts!r} works on blocks of {BLOCK}, but the experts have {hidden} inputs and {inner} hidden "
            "values: leave it at exact."
        )
    bits: Bits = 8 if to.target.experts == "int8" else 4
    logits = to.op("Gemm", to.of(x), to.of(router), to.of(router_bias), transB=1)
    first, second = (_quantised(to, *bank, bits) for bank in ((gate_up, gate_up_scales), (down, down_scales)))
    return to.op(
        "QMoE",
        *(to.of(x), logits, *first, to.of(gate_up_bias), *second, to.of(down_bias)),
        domain=CONTRIB_DOMAIN,
        expert_weight_bits=bits,
        block_size=BLOCK,
        accuracy_level=4,
        **_attributes(top_k, alpha, limit),
    )


def _quantised(to: OnnxGraph, weight: fx.Node, scales: fx.Node | None, bits: Bits) -> tuple[str, str]:
    """Return the names of numbers and scales of a bank [E, out, in]: of MXFP4 as it is where it fits, else quantised."""
    if scales is not None:
        return to.derived(weight, "int8", Mxfp4Bytes(), torch.uint8), to.derived(scales, "float", HalfPowers(), torch.float32)
    return to.quantised(weight, bits)


def mxfp4_moe(to: OnnxGraph, node: fx.Node) -> Value:
    """The contrib operator for MXFP4 as it is, which GPUs alone have. Its scale of a whole expert is 1."""
    x, router, router_bias, gate_up, gate_up_scales, gate_up_bias, down, down_scales, down_bias, top_k, alpha, limit = args_of(
        node
    )
    logits = to.op("Gemm", to.of(x), to.of(router), to.of(router_bias), transB=1)
    first, second = (
        (
            to.derived(weight, "columns", Mxfp4Columns(), torch.uint8),
            to.viewed(str(scales.target), "e8m0", element=TensorProto.FLOAT8E8M0),
        )
        for weight, scales in ((gate_up, gate_up_scales), (down, down_scales))
    )
    ones = to.constant(np.ones(shape_of(gate_up)[0]), np.float32)
    return to.op(
        "QMoE",
        *(to.of(x), logits, *first, to.of(gate_up_bias), *second, to.of(down_bias), *[""] * 7, ones, ones),
        domain=CONTRIB_DOMAIN,
        quant_type="fp4",
        expert_weight_bits=4,
        block_size=BLOCK,
        **_attributes(top_k, alpha, limit),
    )


def _attributes(top_k: int, alpha: float, limit: float) -> dict[str, Any]:
    """Return what MoE and QMoE are told. A wrong value runs without a word."""
    return {
        "k": top_k,
        "activation_type": "swiglu",
        "activation_alpha": float(alpha),
        "activation_beta": 1.0,
        "swiglu_limit": float(limit),
        "swiglu_fusion": 1,
        "normalize_routing_weights": 1,
    }


def loop(to: OnnxGraph, node: fx.Node) -> Value:
    """Standard operators. Only chosen experts compute; the others meet no tokens."""
    x, router, router_bias, gate_up, _, gate_up_bias, down, _, down_bias, top_k, alpha, limit = _dense(node)
    logits = to.op("Gemm", to.of(x), to.of(router), to.of(router_bias), transB=1)
    top, chosen = to.ops("TopK", logits, to.ints(top_k), outputs="11", axis=1, largest=1, sorted=1)
    weights = to.op("Softmax", top, axis=1)
    zeros = to.op("Expand", to.constant(0, np.float32), to.op("Shape", to.of(x)))
    banks = [to.of(bank) for bank in (gate_up, gate_up_bias, down, down_bias)]
    body = _body(node.name, to.of(x), chosen, weights, banks, float(alpha), float(limit))
    experts = gate_up.meta["val"].shape[0]
    go_on = to.constant(True, np.bool_)  # onnx's evaluator does nothing without it
    return to.op("Loop", to.constant(experts, np.int64), go_on, zeros, body=body)


class _Nodes:
    """Nodes of a graph inside the graph, whose values have names of their own."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.nodes: list[NodeProto] = []

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """Add a node; return the name of its result."""
        name = f"{self.prefix}_{len(self.nodes) + 1}"
        self.nodes.append(helper.make_node(kind, inputs, [name], **attributes))
        return name

    def constant(self, values: Any, dtype: Any) -> str:
        """Return the name of a constant."""
        return self.op("Constant", value=numpy_helper.from_array(np.asarray(values, dtype)))

    def graph(self, name: str, inputs: list[ValueInfoProto], *outputs: ValueInfoProto) -> GraphProto:
        """Return the graph."""
        return helper.make_graph(self.nodes, name, inputs, outputs)


def _body(name: str, x: str, chosen: str, weights: str, banks: list[str], alpha: float, limit: float) -> GraphProto:
    """Return the graph of one turn: (expert, go on, sum [T, H]) -> (go on, sum). An expert without tokens is not even read."""
    to, expert, go_on, total = _Nodes(name), f"{name}_expert", f"{name}_go_on", f"{name}_sum"
    hit = to.op("Equal", chosen, expert)  # [T, k]
    last = to.constant([1], np.int64)
    share = to.op("ReduceSum", to.op("Mul", weights, to.op("Cast", hit, to=TensorProto.FLOAT)), last, keepdims=1)
    any_hit = to.op("ReduceMax", to.op("Cast", hit, to=TensorProto.INT32), last, keepdims=0)
    rows = to.op("Squeeze", to.op("NonZero", any_hit), to.constant([0], np.int64))
    some = to.op("Greater", to.op("ReduceMax", any_hit, keepdims=0), to.constant(0, np.int32))
    info = helper.make_tensor_value_info

    act = _Nodes(f"{name}_act")
    gate_up, gate_up_bias, down, down_bias = (act.op("Gather", bank, expert, axis=0) for bank in banks)
    both = act.op("Gemm", act.op("Gather", x, rows, axis=0), gate_up, gate_up_bias, transB=1)
    ends, axis, step = act.constant([TO_THE_END], np.int64), act.constant([1], np.int64), act.constant([2], np.int64)
    gate, up = (act.op("Slice", both, act.constant([first], np.int64), ends, axis, step) for first in (0, 1))
    most = act.constant(limit, np.float32)
    gate, up = act.op("Clip", gate, "", most), act.op("Clip", up, act.op("Neg", most), most)
    swish = act.op("Mul", gate, act.op("Sigmoid", act.op("Mul", gate, act.constant(alpha, np.float32))))
    hidden = act.op("Mul", act.op("Add", up, act.constant(1.0, np.float32)), swish)
    out = act.op("Mul", act.op("Gemm", hidden, down, down_bias, transB=1), act.op("Gather", share, rows, axis=0))
    added = act.op("ScatterND", total, act.op("Unsqueeze", rows, act.constant([1], np.int64)), out, reduction="add")
    rest = _Nodes(f"{name}_rest")
    same = rest.op("Identity", total)

    then = act.graph(f"{name}_chosen", [], info(added, TensorProto.FLOAT, None))
    other = rest.graph(f"{name}_not_chosen", [], info(same, TensorProto.FLOAT, None))
    result, still = to.op("If", some, then_branch=then, else_branch=other), to.op("Identity", go_on)
    inputs = [info(expert, TensorProto.INT64, []), info(go_on, TensorProto.BOOL, []), info(total, TensorProto.FLOAT, None)]
    return to.graph(f"{name}_turn", inputs, info(still, TensorProto.BOOL, []), info(result, TensorProto.FLOAT, None))


def _dense(node: fx.Node) -> tuple[Any, ...]:
    args = args_of(node)
    if args[4] is not None or args[7] is not None:
        raise InternalError(f"{node.name} has MXFP4 experts, for which there is no exact form in ONNX: fuse them dense.")
    return args


PORTABLE = {"oxfuse::moe_dispatch": loop}
CONTRIB = {"oxfuse::moe_dispatch": moe}
