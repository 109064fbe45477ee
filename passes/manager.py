"""Run the passes over a graph: in order, counted, linted and validated, each rewrite checked numerically.

`drop_noops` cleans the graph, the fusions follow in the order that their `after` fields give. A region that a fusion refuses is
an error under policy `strict` and a line of the report under `best_effort`. After every pass the graph is linted, dead code
and unused weights go, and the program's results must have kept their shapes and dtypes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import fx

from oxfuse.errors import InternalError, UserError
from oxfuse.passes.check import TOLERANCE, rewrite_error, signature_of
from oxfuse.passes.drop_noops import drop_noops
from oxfuse.passes.fusion import Emitter, Fusion, all_fusions
from oxfuse.passes.graph import A, Refusal, args_of, is_op, layer_name, remove_dead_code
from oxfuse.passes.weights import WeightTable

Policy = Literal["strict", "best_effort"]
Observer = Callable[[str, fx.GraphModule], None]
"""Called with a pass's name and the graph after it; `--dump-graphs` is one."""


@dataclass(frozen=True, kw_only=True)
class Refused:
    """A region that looked like a fusion's, by its anchor; the layer it stands in, and why it was left alone."""

    layer: str
    reason: str
    anchor: fx.Node = field(repr=False, compare=False)


@dataclass(kw_only=True)
class PassResult:
    """What one pass did. `checked` counts structurally distinct rewrites, each of which was run against what it replaced."""

    name: str
    count: int = 0
    checked: int = 0
    max_error: float | None = None
    layers: list[str] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)


@torch.no_grad()
def run_passes(
    module: fx.GraphModule,
    weights: WeightTable,
    *,
    requested: Iterable[str] = (),
    policy: Policy = "strict",
    observe: Observer | None = None,
) -> list[PassResult]:
    """Fuse the module in place and bring the table along; return what each pass did.

    `requested` names fusions that must match. Raises UserError under policy `strict` if one of them matches nowhere or any
    region is refused; InternalError if a pass breaks the graph or a name is unknown.
    """
    fusions = all_fusions()
    if unknown := set(requested) - {fusion.name for fusion in fusions}:
        raise InternalError(f"Unknown fusions {sorted(unknown)}; there are {[fusion.name for fusion in fusions]}.")
    results_before = _results(module)
    _finish("export", module, weights, results_before, observe)
    results = [PassResult(name="drop_noops", count=drop_noops(module))]
    _finish("drop_noops", module, weights, results_before, observe)
    for fusion in fusions:
        if fusion.live and policy == "strict":
            continue
        result = _fuse(fusion, module, weights)
        results.append(result)
        if policy == "strict":
            _insist(result, fusion.name in set(requested))
        _finish(fusion.name, module, weights, results_before, observe)
    kept = set(module.graph.nodes)
    for result in results:  # what a later fusion took was not left alone
        result.refused = [refused for refused in result.refused if refused.anchor in kept]
    return results


def _fuse(fusion: Fusion, module: fx.GraphModule, weights: WeightTable) -> PassResult:
    graph, result, errors = module.graph, PassResult(name=fusion.name), dict[str, float]()
    for anchor in fusion.anchors(graph):
        emitter = Emitter(module=module, weights=weights, like=anchor)
        layer = layer_name(anchor)
        try:
            match = fusion.match(anchor, weights)
            positions = {node: i for i, node in enumerate(graph.nodes)}
            last_input = max(match.inputs, key=positions.__getitem__)
            first_compute = next(n for n in graph.nodes if n.op not in ("placeholder", "get_attr"))
            after = last_input if last_input.op == "call_function" else first_compute.prev
            with graph.inserting_after(after):
                point = graph.call_function(A.sym_size.int)  # a mark: nodes are inserted before it, in the order of their calls
            with graph.inserting_before(point):
                new = match.emit(emitter)
            graph.erase_node(point)
            signature = signature_of(graph, match.outputs, match.inputs, weights) + signature_of(
                graph, new, match.inputs, weights
            )
            if signature not in errors:
                errors[signature] = rewrite_error(graph, match.outputs, new, match.inputs, weights)
            if not errors[signature] <= TOLERANCE:
                raise Refusal(
                    f"the fused form differs from the region by {errors[signature]:.1e}, more than {TOLERANCE:.0e}", anchor
                )
        except Refusal as refusal:
            for node in reversed(emitter.added):
                graph.erase_node(node)
            where = f" (at {refusal.node.name})" if refusal.node is not None else ""
            result.refused.append(Refused(layer=layer, reason=refusal.reason + where, anchor=anchor))
            continue
        for old, replacement in zip(match.outputs, new, strict=True):
            old.replace_all_uses_with(replacement)
        result.count += 1
        result.layers.append(layer)
        result.max_error = max(errors.values())
    result.checked = len(errors)
    cancel_transposes(graph)
    return result


def cancel_transposes(graph: fx.Graph) -> None:
    """Replace a transpose of a transpose over the same two dims by what it began with."""
    for node in graph.nodes:
        inner = args_of(node)[0] if is_op(node, A.transpose.int) else None
        if is_op(inner, A.transpose.int) and set(args_of(node)[1:]) == set(args_of(inner)[1:]):
            node.replace_all_uses_with(args_of(inner)[0])


def _insist(result: PassResult, requested: bool) -> None:
    if result.refused:
        first = result.refused[0]
        others = f", and {len(result.refused) - 1} more" * (len(result.refused) > 1)
        raise UserError(
            f"{result.name} fused {result.count} regions, but not {first.layer}: {first.reason}{others}. "
            "The model is not what this fusion computes; run with --dump-graphs to see the graph."
        )
    if requested and not result.count:
        raise UserError(
            f"{result.name} matched nothing, though this model must have it: the graph holds none of its anchors. "
            "Run with --dump-graphs to see the graph."
        )


def _results(module: fx.GraphModule) -> list[str]:
    values = [node.meta.get("val") for node in module.graph.output_node().all_input_nodes]
    return [f"{v.dtype}{list(v.shape)}" if isinstance(v, torch.Tensor) else str(v) for v in values]


def _finish(name: str, module: fx.GraphModule, weights: WeightTable, expected: list[str], observe: Observer | None) -> None:
    """Remove what a pass left unused, then check that the graph is whole."""
    graph = module.graph
    remove_dead_code(graph)
    try:
        graph.lint()
    except (RuntimeError, AssertionError) as error:
        raise InternalError(f"Pass {name} broke the graph: {error}") from error
    for node in graph.nodes:
        if node.op == "call_function" and node.meta.get("val") is None and not _returns_nothing(node):
            raise InternalError(f"Pass {name} left {node.name} without a value, so its shape and dtype are unknown.")
    if (found := _results(module)) != expected:
        raise InternalError(f"Pass {name} changed the results from {expected} to {found}.")
    read = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    for unused in [weight for weight in weights if weight not in read]:
        del weights[unused]
    module.recompile()
    if observe is not None:
        observe(name, module)


def _returns_nothing(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and not node.target._schema.returns
