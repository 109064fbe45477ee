"""Check a rewrite numerically: run the region's own nodes and the fused form on the same random tokens and weights.

Both stand in the graph when this is called. Everything runs on the CPU and in float32, half-precision casts included, so that a
difference is a defect and not rounding. Weights are made up: large ones are overlapping views of one small buffer, so that a
layer of a 120-billion-parameter model is checked in some 100 MB; a weight that the rewrite transformed gets the transformed
values of the weight it came from.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any

import torch
from torch import Tensor, fx, nn

from oxfuse.passes.graph import ancestors, in_order, is_mutable, require
from oxfuse.passes.weights import MXFP4_BLOCK, Weight, WeightTable

TOKENS = 4
TOLERANCE = 1e-4
"""Of max(1, largest value): what float32 sums of a few thousand terms in another order may differ by."""
_OVERLAP_ABOVE = 1 << 22
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_HALF = (torch.bfloat16, torch.float16)


def signature_of(graph: fx.Graph, outputs: tuple[fx.Node, ...], inputs: tuple[fx.Node, ...], weights: WeightTable) -> str:
    """Return a hash of a region's structure: ops, constants, shapes and weight recipes, but no names.

    Regions of equal signature are the same computation on other weights, so that one check serves them all.
    """
    region = in_order(graph, ancestors(outputs, inputs))
    index = {node: f"%{i}" for i, node in enumerate([*inputs, *region])}
    lines = [_describe(node.meta.get("val")) for node in inputs]
    for node in region:
        args = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: fx.node._format_arg(index[n]))
        recipe = ""
        if node.op == "get_attr" and (weight := weights.get(str(node.target))):
            recipe = f"{weight.shape} {weight.encoding} {weight.part} {[t.label for t in weight.transforms]}"
        elif node.op != "get_attr":
            recipe = str(node.target)
        lines.append(f"{node.op} {recipe} {args} {_describe(node.meta.get('val'))}")
    return hashlib.sha256("\n".join([*lines, *(index[n] for n in outputs)]).encode()).hexdigest()


def _describe(value: Any) -> str:
    return f"{value.dtype}{list(value.shape)}" if isinstance(value, Tensor) else str(value)


def rewrite_error(
    graph: fx.Graph,
    old: tuple[fx.Node, ...],
    new: tuple[fx.Node, ...],
    inputs: tuple[fx.Node, ...],
    weights: WeightTable,
) -> float:
    """Return the largest difference between old and new outputs over max(1, largest old value), on TOKENS random tokens.

    Raises Refusal where the region writes in place to what outlives it, or yields other shapes.
    """
    region = ancestors(old, inputs)
    for node in graph.nodes:
        if is_mutable(node) and node not in region and any(n in region for n in node.all_input_nodes if n.op != "get_attr"):
            writes = node.args and isinstance(node.args[0], fx.Node) and node.args[0] in region
            require(not writes, "an in-place op writes to the region from outside", node)
    assert graph.owning_module is not None
    samples = _Samples(weights, graph.owning_module)
    expected, got = (_run(graph, outputs, inputs, samples) for outputs in (old, new))
    worst = 0.0
    for a, b, node in zip(expected, got, old, strict=True):
        require(a.shape == b.shape, f"the fused form yields shape {tuple(b.shape)}, the region {tuple(a.shape)}", node)
        scale = max(1.0, float(a.abs().max()))
        difference = float((a.double() - b.double()).abs().max()) / scale
        worst = max(worst, difference if math.isfinite(difference) else math.inf)
    return worst


def _run(graph: fx.Graph, outputs: tuple[fx.Node, ...], inputs: tuple[fx.Node, ...], samples: _Samples) -> list[Tensor]:
    env: dict[fx.Node, Any] = {node: samples.activation(node) for node in inputs}

    def value_of(argument: Any) -> Any:
        if isinstance(argument, fx.Node):
            return env[argument]
        if isinstance(argument, torch.device):
            return torch.device("cpu")
        return torch.float32 if isinstance(argument, torch.dtype) and argument in _HALF else argument

    for node in in_order(graph, ancestors(outputs, inputs)):
        if node.op == "placeholder":
            env[node] = samples.activation(node)
        elif node.op == "get_attr":
            env[node] = samples.weight(node)
        else:
            require(callable(node.target), f"the region holds a {node.op} node", node)
            args, kwargs = fx.node.map_aggregate((node.args, dict(node.kwargs)), value_of)
            assert callable(node.target)
            env[node] = node.target(*args, **kwargs)
    return [env[node] for node in outputs]


class _Samples:
    """Made-up values, the same for the region and the fused form."""

    def __init__(self, weights: WeightTable, module: nn.Module) -> None:
        self._weights, self._module = weights, module
        self._random = torch.Generator().manual_seed(0)
        self._activations: dict[fx.Node, Any] = {}
        self._sources: dict[str, dict[str, Tensor]] = {}

    def activation(self, node: fx.Node) -> Any:
        if node not in self._activations:
            value = node.meta["val"]
            if isinstance(value, Tensor):
                shape = [_size(s) for s in value.shape]
                if value.dtype.is_floating_point:
                    self._activations[node] = torch.randn(shape, generator=self._random)
                elif value.dtype == torch.bool:  # a mask
                    self._activations[node] = torch.rand(shape, generator=self._random) > 0.3
                else:  # positions: consecutive, since some masks take any other step for a second sequence
                    self._activations[node] = torch.arange(37, 37 + shape[-1]).expand(shape).to(value.dtype)
            else:
                self._activations[node] = _size(value)
        value = self._activations[node]
        return value.clone() if isinstance(value, Tensor) else value

    def weight(self, node: fx.Node) -> Tensor:
        weight = self._weights.get(str(node.target))
        if weight is None:  # a constant of the graph: not a weight, so its value counts
            value = fx.graph_module._get_attr(self._module, str(node.target))
            assert isinstance(value, Tensor)
            value = value.cpu()
        else:
            if weight.source not in self._sources:
                self._sources[weight.source] = self._make(self._weights.get(weight.source, weight))
            value = self._sources[weight.source][weight.part or "dense"]
            for transform in weight.transforms:
                value = transform.apply(value)
        return value.float() if value.dtype in _HALF else value

    def _make(self, origin: Weight) -> dict[str, Tensor]:
        if origin.encoding == "mxfp4":
            return self._make_mxfp4(origin)
        shape = origin.shape
        if len(shape) == 1:  # norms, sinks, biases; or frequencies of rotation
            return {"dense": torch.rand(shape, generator=self._random) + (0.05 if origin.computed else 0.5)}
        if len(shape) == 3 and math.prod(shape) > _OVERLAP_ABOVE:
            base = torch.randn((shape[1], shape[2] + 2 * shape[0]), generator=self._random) * 4 * shape[1] ** -0.5
            return {"dense": base.as_strided(shape, (2, base.shape[1], 1))}
        fan_in = shape[-2] if len(shape) == 3 else shape[-1]
        return {"dense": torch.randn(shape, generator=self._random) * 4 * fan_in**-0.5}

    def _make_mxfp4(self, origin: Weight) -> dict[str, Tensor]:
        """Make blocks, scales and their dense form; expert e is the rows from 2e on of one matrix, in all three."""
        experts, columns, blocks = origin.parts()["scales"].shape
        rows, size = columns + 2 * experts, MXFP4_BLOCK // 2
        codes = torch.randint(0, 256, (rows, blocks, size), dtype=torch.uint8, generator=self._random)
        centre = 127 - round(math.log2(blocks * MXFP4_BLOCK) / 2)  # sums stay near the clamp at 7, on both sides of it
        scales = torch.randint(centre - 2, centre + 2, (rows, blocks), dtype=torch.uint8, generator=self._random)
        values = torch.tensor([*_E2M1, *(-v for v in _E2M1)])
        pairs = torch.stack((values[(codes & 15).long()], values[(codes >> 4).long()]), -1)
        matrix = (pairs.flatten(-2) * torch.exp2(scales.float() - 127)[..., None]).flatten(-2).T.contiguous()  # [in, rows]
        return {
            "dense": matrix.as_strided((experts, blocks * MXFP4_BLOCK, columns), (2, rows, 1)),
            "blocks": codes.as_strided((experts, columns, blocks, size), (2 * blocks * size, blocks * size, size, 1)),
            "scales": scales.as_strided((experts, columns, blocks), (2 * blocks, blocks, 1)),
        }


def _size(value: Any) -> int:
    if isinstance(value, torch.SymInt):
        expression = value.node.expr
        return int(expression.subs(dict.fromkeys(expression.free_symbols, TOKENS)))
    return int(value)
