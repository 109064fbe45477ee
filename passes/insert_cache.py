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
    """What a program keeps of earlier tokens: windows of the groups, and the layers in the graph's order."""

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
    old, attentions, cache = cache_free_parts(graph, inputs)
    windows, layers = cache.windows, cache.layers
    first = next(iter(graph.nodes))
    with graph.inserting_before(first):
        new = {name: graph.placeholder(name) for name in STEP_INPUTS}
        caches = [[graph.placeholder(f"{kv}_cache_{i}") for kv in "kv"] for i in range(len(layers))]
    first_compute = next(n for n in graph.nodes if n.op not in ("placeholder", "get_attr"))
    with graph.inserting_before(first_compute):
        for name, target in inputs.items():
            replacement = new[name] if name == "rows" else graph.call_function(A.unsqueeze.default, (new[name], 0))
            old[target].replace_all_uses_with(replacement)
        groups = [
            [graph.call_function(A.select.int, (new[name], 0, g)) for name in ("slots", "block_tables")]
            for g in range(len(windows))
        ]
    for node, layer, kept in zip(attentions, layers, caches, strict=True):
        q, k, v, sink, window, scale = args_of(node)
        slots, table = groups[layer.group]
        with graph.inserting_before(node):
            flat = [graph.call_function(A.squeeze.dim, (x, 0)) for x in (q, k, v)]
            out = graph.call_function(
                OXFUSE.sink_attention.default,
                (*flat, sink, *kept, new["query_start"], new["kv_lens"], slots, table, window, scale),
            )
            out.meta["nn_module_stack"] = node.meta.get("nn_module_stack", {})
            node.replace_all_uses_with(graph.call_function(A.unsqueeze.default, (out, 0)))
    (result,) = (n for n in graph.output_node().all_input_nodes)
    with graph.inserting_before(graph.output_node()):
        graph.output_node().args = (graph.call_function(A.squeeze.dim, (result, 0)),)
    return without_inputs(module, old), cache


def cache_free_parts(graph: fx.Graph, inputs: Mapping[str, str]) -> tuple[dict[str, fx.Node], list[fx.Node], PagedCache]:
    """Return the inputs of a cache-free graph by name, its attentions in order, and what these will keep.

    Raises InternalError if it lacks one of the `inputs`.
    """
    old = {node.name: node for node in graph.nodes if node.op == "placeholder"}
    if missing := set(inputs.values()) - old.keys():
        raise InternalError(f"The graph lacks the inputs {sorted(missing)}; it has {sorted(old)}.")
    attentions = [node for node in graph.nodes if is_op(node, OXFUSE.sink_attention_dense.default)]
    windows = sorted({int(args_of(node)[4]) for node in attentions})
    layers = []
    for node in attentions:
        kv_heads, head_dim = (int(size) for size in shape_of(args_of(node)[1])[2:])
        layers.append(LayerCache(group=windows.index(int(args_of(node)[4])), kv_heads=kv_heads, head_dim=head_dim))
    return old, attentions, PagedCache(windows=tuple(windows), layers=tuple(layers))


def without_inputs(module: fx.GraphModule, old: Mapping[str, fx.Node]) -> fx.GraphModule:
    """Return the module after its graph got other inputs, less what that left unused and the `old` ones.

    Raises InternalError where one of these is still read.
    """
    graph = module.graph
    remove_dead_code(graph)
    for node in old.values():
        if node.users:
            raise InternalError(
                f"The input {node.name} is still read by {next(iter(node.users)).name} after the cache was inserted."
            )
        graph.erase_node(node)
    graph.set_codegen(fx.graph.CodeGen())  # the exported one checks the old inputs
    graph.lint()
    return fx.GraphModule(module, graph)
