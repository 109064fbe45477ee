"""Turn a cache-free graph over whole sequences into what ONNX models compute: padded batches, with keys and values handed on.

In:  ids [1, T], positions [1, T], rows [R] -> values [1, R, W], with `sink_attention_dense` in every layer. Nothing in the graph
     may hold on to the batch of one.
Out: input_ids [B, S], attention_mask [B, P + S], first_logit [1] and, layer by layer, past_k and past_v [B, KV, P, D] -> values
     [B, R, W] of the tokens from index first_logit on (negative: from the end), and present_k and present_v [B, KV, P + S, D] of
     each layer. Without a cache (`cached` False) P is 0, there is no past and no present, and no first_logit: R is S, or 1 with
     `pooled`: each row's last token whose mask is 1.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

from torch import fx

from oxfuse.errors import InternalError
from oxfuse.passes.fusions.sink_attention import past as past  # registers the ops
from oxfuse.passes.graph import OXFUSE, A, args_of, is_op
from oxfuse.passes.insert_cache import PagedCache, cache_free_parts, without_inputs

INPUTS, FIRST = ("input_ids", "attention_mask"), "first_logit"


def insert_past(
    module: fx.GraphModule, inputs: Mapping[str, str], *, cached: bool, pooled: bool
) -> tuple[fx.GraphModule, PagedCache]:
    """Return the new module and what its layers keep.

    `inputs` names the placeholders of the old graph that carry "token_ids", "positions" and "rows". The new module shares the old
    one's weights; its inputs have no fake values, and those of its other nodes are the old graph's. Raises InternalError if the
    graph is not of the form that the docstring of this module gives.
    """
    graph = module.graph
    old, attentions, cache = cache_free_parts(graph, inputs)
    with graph.inserting_before(next(iter(graph.nodes))):
        ids, mask = (graph.placeholder(name) for name in INPUTS)
        first = graph.placeholder(FIRST) if cached else None
        pasts = [[graph.placeholder(f"past_{kv}_{i}") if cached else None for kv in "kv"] for i in range(len(attentions))]
    with graph.inserting_before(next(n for n in graph.nodes if n.op not in ("placeholder", "get_attr"))):
        places = graph.call_function(OXFUSE.new_places.default, (mask, ids))
    for name, value in (("token_ids", ids), ("positions", places)):
        old[inputs[name]].replace_all_uses_with(value)
    presents = []
    for node, kept in zip(attentions, pasts, strict=True):
        q, k, v, sink, window, scale = args_of(node)
        with graph.inserting_before(node):
            new = graph.call_function(OXFUSE.sink_attention_past.default, (q, k, v, sink, *kept, mask, window, scale))
            new.meta["nn_module_stack"] = node.meta.get("nn_module_stack", {})
            out, *present = (graph.call_function(operator.getitem, (new, i)) for i in range(3))
        out.meta = dict(node.meta)
        node.replace_all_uses_with(out)
        presents += present
    keep = (OXFUSE.tokens_from.default, first) if first else (OXFUSE.last_tokens.default, mask) if pooled else None
    _keep_rows(graph, old[inputs["rows"]], keep)
    output = graph.output_node()
    (result,) = output.all_input_nodes
    output.args = ((result, *(presents if cached else ())),)
    return without_inputs(module, old), cache


def _keep_rows(graph: fx.Graph, rows: fx.Node, keep: tuple[Any, fx.Node] | None) -> None:
    """Let hidden[:, rows] be all rows, or what the op `keep` makes of them and its other argument."""
    for index in list(rows.users):
        hidden, indices = args_of(index)[:2] if is_op(index, A.index.Tensor) else (None, None)
        if hidden is None or indices != [None, rows]:
            raise InternalError(f"The rows are read by {index.name}, which is not hidden[:, rows].")
        kept: Any = hidden
        if keep is not None:
            with graph.inserting_before(index):
                kept = graph.call_function(keep[0], (hidden, keep[1]))
            kept.meta = dict(index.meta)
        index.replace_all_uses_with(kept)
        graph.erase_node(index)
