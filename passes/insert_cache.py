"""Turn a cache-free graph over whole sequences into the `step` program: flat tokens of many sequences over a paged cache.

In:  ids [1, T], positions [1, T], rows [R] -> logits [1, R, V], with `sink_attention_dense` in every layer.
Out: token_ids [T], positions [T], query_start [N+1], kv_lens [N], slots [G, T], block_tables [G, N, M], rows [R] and, layer by
layer, k_cache [blocks, KV, D, block_size] and v_cache [blocks, KV, block_size, D] -> logits [R, V]. Layers of one window share a
cache group: its slots and block tables are row g of `slots` and `block_tables`. Groups are sorted by window, full attention (0)
first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx

from oxfuse.errors import InternalError
from oxfuse.passes.fusions.sink_attention import reference as reference  # registers the op
from oxfuse.passes.graph import OXFUSE, A, args_of, is_op, remove_dead_code, shape_of

STEP_INPUTS = ("token_ids", "positions", "query_start", "kv_lens", "slots", "block_tables", "rows")


@dataclass(frozen=True, kw_only=True)
class LayerCache:
    """What one attention layer keeps: `group` indexes the sorted windows."""

    group: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True, kw_only=True)
class PagedCache:
    """The paged cache of a step program: windows of the groups, and the layers in the graph's order."""

    windows: tuple[int, ...]
    layers: tuple[LayerCache, ...]


def insert_paged_cache(module: fx.GraphModule, inputs: Mapping[str, str]) -> tuple[fx.GraphModule, PagedCache]:
    """Return the step module and its cache.

    `inputs` names the placeholders of the old graph that carry "token_ids", "positions" and "rows". All other placeholders
    must be unused. The new module shares the old one's weights. Its inputs have no fake values, and those of its other nodes are
    the old graph's: an export renews them.
    Raises InternalError if the graph is not of the form that the docstring of this module gives.
    """
    graph = module.graph
    attentions = [n for n in graph.nodes if is_op(n, OXFUSE.sink_attention_dense.default)]
    windows = sorted({int(args_of(n)[4]) for n in attentions})
    old = {n.name: n for n in graph.nodes if n.op == "placeholder"}
    if missing := set(inputs.values()) - old.keys():
        raise InternalError(f"The graph lacks the inputs {sorted(missing)}; it has {sorted(old)}.")
    layers = []
    first = next(iter(graph.nodes))
    with graph.inserting_before(first):
        new = {name: graph.placeholder(name) for name in STEP_INPUTS}
        caches = []
        for i, node in enumerate(attentions):
            kv_heads, head_dim = (int(s) for s in shape_of(args_of(node)[1])[2:])
            caches.append([graph.placeholder(f"{kv}_cache_{i}") for kv in "kv"])
            layers.append(LayerCache(group=windows.index(int(args_of(node)[4])), kv_heads=kv_heads, head_dim=head_dim))
    first_compute = next(n for n in graph.nodes if n.op not in ("placeholder", "get_attr"))
    with graph.inserting_before(first_compute):
        for name, target in inputs.items():
            replacement = new[name] if name == "rows" else graph.call_function(A.unsqueeze.default, (new[name], 0))
            old[target].replace_all_uses_with(replacement)
        groups = [
            [graph.call_function(A.select.int, (new[name], 0, g)) for name in ("slots", "block_tables")]
            for g in range(len(windows))
        ]
    for node, layer, cache in zip(attentions, layers, caches, strict=True):
        q, k, v, sink, window, scale = args_of(node)
        slots, table = groups[layer.group]
        with graph.inserting_before(node):
            flat = [graph.call_function(A.squeeze.dim, (x, 0)) for x in (q, k, v)]
            out = graph.call_function(
                OXFUSE.sink_attention.default,
                (*flat, sink, *cache, new["query_start"], new["kv_lens"], slots, table, window, scale),
            )
            out.meta["nn_module_stack"] = node.meta.get("nn_module_stack", {})
            node.replace_all_uses_with(graph.call_function(A.unsqueeze.default, (out, 0)))
    (result,) = (n for n in graph.output_node().all_input_nodes)
    with graph.inserting_before(graph.output_node()):
        graph.output_node().args = (graph.call_function(A.squeeze.dim, (result, 0)),)
    _erase(graph, old.values())
    graph.set_codegen(fx.graph.CodeGen())  # the exported one checks the old inputs
    graph.lint()
    step = fx.GraphModule(module, graph)
    return step, PagedCache(windows=tuple(windows), layers=tuple(layers))


def _erase(graph: fx.Graph, old: object) -> None:
    remove_dead_code(graph)
    for node in list(old):  # type: ignore[call-overload]
        if node.users:
            raise InternalError(
                f"The input {node.name} is still read by {next(iter(node.users)).name} after the cache was inserted."
            )
        graph.erase_node(node)
