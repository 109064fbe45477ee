"""Merge neighbouring ops of a step module into ops that a GPU runs as one kernel: there, a launch costs as much as the work.

In:  the step module as `insert_paged_cache` returns it: flat tokens, with a leading batch dim of 1 between the inputs and the
     attention ops.
Out: the same module with, in this order,
     rotary_embedding_store + sink_attention_cached    for rotary_embedding + sink_attention, in every program;
     qkv_rotary                                        for the projections and that store (decode);
     linear_rows                                       for every other dense layer, and an activation behind it (decode);
     norm_router + moe_experts                         for add_rms_norm + moe_dispatch (decode).
Merged ops take flat tensors. A region that is not of the form stated at its rewrite stays as it is, and so does one of which
something else reads a value that would vanish. Weights stay what they are.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, Literal

from torch import fx

from oxfuse.errors import InternalError
from oxfuse.passes.fusions.linear import reference as linear  # registers ops, as do the next five
from oxfuse.passes.fusions.moe_dispatch import reference as moe_dispatch
from oxfuse.passes.fusions.norm_router import reference as norm_router
from oxfuse.passes.fusions.qkv_rotary import reference as qkv_rotary
from oxfuse.passes.fusions.rotary_embedding import reference as rotary_embedding
from oxfuse.passes.fusions.sink_attention import reference as sink_attention
from oxfuse.passes.graph import OXFUSE, A, args_of, is_op, is_tensor, items_of, remove_dead_code, same_shape, shape_of, through
from oxfuse.passes.insert_cache import LayerCache, PagedCache

REGISTERED = (linear, moe_dispatch, norm_router, qkv_rotary, rotary_embedding, sink_attention)
RESHAPES = (
    A.view.default,
    A.reshape.default,
    A._unsafe_view.default,
    A.unflatten.int,
    A.flatten.using_ints,
    A.squeeze.dim,
    A.unsqueeze.default,
)
"""Ops that keep all elements in their order."""
ACTIVATIONS: dict[Any, str] = {A.gelu.default: "gelu", A.relu.default: "relu", A.silu.default: "silu"}


def merge_ops(step: fx.GraphModule, cache: PagedCache, kind: Literal["step", "decode"]) -> dict[str, int]:
    """Rewrite the module in place for steps of any mix ("step"), or of one token a sequence ("decode").

    Returns how many regions each rewrite made; a later rewrite may take in what an earlier one made. Raises InternalError if the
    module does not attend as often as `cache` has layers.
    """
    graph, decode = step.graph, kind == "decode"
    attentions = _calls(graph, OXFUSE.sink_attention.default, OXFUSE.sink_attention_cached.default)
    if len(attentions) != len(cache.layers):
        raise InternalError(f"The module attends {len(attentions)} times, but its cache has {len(cache.layers)} layers.")
    stores = [_merge_store(graph, attention, decode) for attention in attentions]
    counts = {"rotary_embedding_store": sum(store is not None for store in stores)}
    remove_dead_code(graph)  # before users are counted again
    if decode:
        layers = zip(stores, cache.layers, strict=True)
        counts["qkv_rotary"] = sum(store is not None and _merge_projections(graph, store, layer) for store, layer in layers)
        remove_dead_code(graph)  # the projections are no dense layers any more
        counts["linear_rows"] = sum(_replace_linear(graph, dense) for dense in _calls(graph, A.linear.default))
        counts["activation"] = sum(_merge_activation(graph, node) for node in _calls(graph, *ACTIVATIONS))
        counts["norm_router"] = sum(_merge_router(graph, moe) for moe in _calls(graph, OXFUSE.moe_dispatch.default))
        remove_dead_code(graph)
    graph.lint()
    step.recompile()
    return counts


def _merge_store(graph: fx.Graph, attention: fx.Node, decode: bool) -> fx.Node | None:
    """Let one op rotate and fill the cache, and another attend over it. Return the first, or None.

    Form: sink_attention of the two results of one rotary_embedding over [1, T], which nothing else reads, and caches that
    nothing else touches.
    """
    if not is_op(attention, OXFUSE.sink_attention.default):
        return None
    q, k, v, sink, k_cache, v_cache, query_start, kv_lens, slots, table, window, scale = args_of(attention)
    turned = [_unread_but_here(x, A.squeeze.dim) for x in (q, k)]
    rotation = turned[0].args[0] if is_op(turned[0], operator.getitem) else None
    if not is_op(rotation, OXFUSE.rotary_embedding.default) or len(rotation.users) != 2:
        return None
    if items_of(rotation) != dict(enumerate(turned)) or any(list(cache.users) != [attention] for cache in (k_cache, v_cache)):
        return None
    raw_q, raw_k, positions, inv_freq, factor = args_of(rotation)
    if not (_has_one_batch(raw_q, 4) and _has_one_batch(raw_k, 4) and _has_one_batch(positions, 2)):
        return None
    with graph.inserting_before(attention):
        flat_q, flat_k, flat_positions = (_without_batch(graph, x) for x in (raw_q, raw_k, positions))
        store = graph.call_function(
            OXFUSE.rotary_embedding_store.default,
            (flat_q, flat_k, v, flat_positions, inv_freq, factor, k_cache, v_cache, slots),
        )
        attended = graph.call_function(
            OXFUSE.sink_attention_cached.default,
            (store, sink, k_cache, v_cache, query_start, kv_lens, table, window, scale, decode),
        )
    store.meta = _place_of(rotation)
    _replace(graph, attention, attended)
    return store


def _merge_projections(graph: fx.Graph, store: fx.Node, layer: LayerCache) -> bool:
    """Take the projections of q, k and v, or the one of all three, into the op that rotates and stores them."""
    *values, positions, inv_freq, factor, k_cache, v_cache, slots = args_of(store)
    found = _separate_projections(values, layer) or _joint_projection(values, layer)
    if found is None:
        return False
    x, projections = found
    with graph.inserting_before(store):
        weights = [by_heads for projection in projections for by_heads in projection.views(graph)]
        merged = graph.call_function(
            OXFUSE.qkv_rotary.default,
            (_without_batch(graph, x), *weights, positions, inv_freq, factor, k_cache, v_cache, slots),
        )
    _replace(graph, store, merged)
    return True


@dataclass(frozen=True, kw_only=True)
class _Projection:
    """A dense layer whose outputs are `shape`: [heads, head_dim], or [heads, parts, head_dim] of which it is part `part`."""

    dense: fx.Node
    shape: tuple[int, ...]
    part: int | None = None

    def views(self, graph: fx.Graph) -> list[fx.Node | None]:
        """Return weight [heads, head_dim, H] and bias [heads, head_dim]."""
        depth = shape_of(args_of(self.dense)[1])[1]
        return [self._view(graph, value, tail) for value, tail in zip(_weight_and_bias(self.dense), ((depth,), ()), strict=True)]

    def _view(self, graph: fx.Graph, value: fx.Node | None, tail: tuple[int, ...]) -> fx.Node | None:
        if value is None:
            return None
        viewed = graph.call_function(A.view.default, (value, [*self.shape, *tail]))
        return viewed if self.part is None else graph.call_function(A.select.int, (viewed, 1, self.part))


def _separate_projections(values: list[fx.Node], layer: LayerCache) -> tuple[fx.Node, list[_Projection]] | None:
    """Form: three dense layers of one [1, T, H], each seen as [1, T, heads, head_dim] and read by the store alone."""
    found = (_unread_but_here(value, *RESHAPES) for value in values)
    layers = [node for node in found if is_op(node, A.linear.default)]
    if len(layers) != 3:
        return None
    x = args_of(layers[0])[0]
    shapes = [(shape_of(args_of(dense)[1])[0] // layer.head_dim, layer.head_dim) for dense in layers]
    if any(args_of(dense)[0] is not x for dense in layers) or not _has_one_batch(x, 3):
        return None
    if [heads for heads, _ in shapes[1:]] != [layer.kv_heads] * 2:
        return None
    if [_shape_without_batch(value)[1:] for value in values] != shapes:
        return None
    return x, [_Projection(dense=dense, shape=shape) for dense, shape in zip(layers, shapes, strict=True)]


def _joint_projection(values: list[fx.Node], layer: LayerCache) -> tuple[fx.Node, list[_Projection]] | None:
    """Form: a dense layer of [1, T, H], seen as [1, T, heads, 3 * head_dim] and cut into q, k and v, which the store alone reads.

    It may be cut with the heads in front, and be turned back after that.
    """
    parts, turned = zip(*(_unturned(_unread_but_here(value, A.squeeze.dim)) for value in values), strict=True)
    if any(not is_op(part, operator.getitem) or len(part.users) != 1 for part in parts):
        return None
    cut = args_of(parts[0])[0]
    if not is_op(cut, A.chunk.default) or args_of(cut)[1:] not in ((3, -1), (3, 3)) or len(cut.users) != 3:
        return None
    viewed, heads_first = _unturned(args_of(cut)[0])
    dense = _unread_but_here(viewed, *RESHAPES) if viewed is not None else None
    if [args_of(part) for part in parts] != [(cut, i) for i in range(3)] or {*turned} != {heads_first}:
        return None
    if not is_op(dense, A.linear.default) or shape_of(viewed)[2:] != (layer.kv_heads, 3 * layer.head_dim):
        return None
    x = args_of(dense)[0]
    if not _has_one_batch(x, 3) or not _has_one_batch(viewed, 4):
        return None
    shape = (layer.kv_heads, 3, layer.head_dim)
    return x, [_Projection(dense=dense, shape=shape, part=part) for part in range(3)]


def _unturned(node: fx.Node | None) -> tuple[Any, bool]:
    """Return what is behind a transposition of heads and tokens, if it has one user, and whether there is one."""
    turned = node is not None and is_op(node, A.transpose.int) and args_of(node)[1:] in ((1, 2), (2, 1)) and len(node.users) == 1
    return (args_of(node)[0], True) if node is not None and turned else (node, False)


def _merge_router(graph: fx.Graph, moe: fx.Node) -> bool:
    """Move the router of a mixture of experts into the residual sum and norm before it.

    Form: moe_dispatch of the normed result of an add_rms_norm over [1, T, H]. Norm and sum may be read elsewhere, too.
    """
    x, router_weight, router_bias, *experts = args_of(moe)
    normed = through(x, *RESHAPES)
    both = normed.args[0] if is_op(normed, operator.getitem) and normed.args[1] == 0 else None
    if not is_op(both, OXFUSE.add_rms_norm.default):
        return False
    branch, residual, norm_weight, eps = args_of(both)
    of_one_batch = all(_has_one_batch(value, 3) and same_shape(value, normed) for value in (branch, residual))
    batched = is_tensor(moe) and _has_one_batch(moe, 3)
    if not of_one_batch or not (batched or len(shape_of(moe)) == 2) or shape_of(moe)[-1] != shape_of(normed)[-1]:
        return False
    if any(weight.op != "get_attr" for weight in (router_weight, router_bias)):
        return False
    with graph.inserting_before(both):
        flat = [_without_batch(graph, value) for value in (branch, residual)]
        router = [graph.node_copy(weight) for weight in (router_weight, router_bias)]  # they may stand further down
        merged = graph.call_function(OXFUSE.norm_router.default, (*flat, norm_weight, eps, *router))
        merged.meta = _place_of(both)
        flat_normed, flat_total, logits = (graph.call_function(operator.getitem, (merged, i)) for i in range(3))
        with_batch = [graph.call_function(A.unsqueeze.default, (value, 0)) for value in (flat_normed, flat_total)]
    for i, item in items_of(both).items():
        _replace(graph, item, with_batch[i])
    with graph.inserting_before(moe):
        out = graph.call_function(OXFUSE.moe_experts.default, (flat_normed, logits, *experts))
        out.meta = _place_of(moe)
        result = graph.call_function(A.unsqueeze.default, (out, 0)) if batched else out
    _replace(graph, moe, result)
    return True


def _replace_linear(graph: fx.Graph, dense: fx.Node) -> bool:
    """Replace a dense layer over [T, K] or [1, T, K]."""
    x, batched = args_of(dense)[0], _has_one_batch(dense, 3)
    if not batched and len(shape_of(dense)) != 2:
        return False
    with graph.inserting_before(dense):
        flat = _without_batch(graph, x) if batched else x
        rows = graph.call_function(OXFUSE.linear_rows.default, (flat, *_weight_and_bias(dense)))
        rows.meta = _place_of(dense)
        result = graph.call_function(A.unsqueeze.default, (rows, 0)) if batched else rows
    _replace(graph, dense, result)
    return True


def _merge_activation(graph: fx.Graph, activation: fx.Node) -> bool:
    """Let the dense layer that an activation is applied to apply it. Form: nothing else reads the layer's result."""
    name = "gelu_tanh" if activation.kwargs.get("approximate") == "tanh" else ACTIVATIONS[activation.target]
    rows = _unread_but_here(args_of(activation)[0], *RESHAPES)
    if not is_op(rows, OXFUSE.linear_rows.default) or len(args_of(rows)) != 3:
        return False
    rows.args = (*rows.args, name)
    activation.replace_all_uses_with(args_of(activation)[0])
    graph.erase_node(activation)
    return True


def _calls(graph: fx.Graph, *targets: Any) -> list[fx.Node]:
    return [node for node in graph.nodes if is_op(node, *targets)]


def _weight_and_bias(dense: fx.Node) -> tuple[Any, Any]:
    return args_of(dense)[1], args_of(dense)[2] if len(dense.args) > 2 else None


def _unread_but_here(node: fx.Node, *targets: Any) -> fx.Node | None:
    """Return what is behind `node`, seen through `targets`, if each of these nodes has one user; else None."""
    while len(node.users) == 1 and is_op(node, *targets):
        node = args_of(node)[0]
    return node if len(node.users) == 1 else None


def _has_one_batch(node: fx.Node, rank: int) -> bool:
    """Tell whether a tensor is of `rank` dims, the first of which is 1. The step's inputs, which have one dim, are unsqueezed."""
    if "val" not in node.meta:  # from the insertion of the cache
        unsqueezed = is_op(node, A.unsqueeze.default) and bool(node.args[1] == 0)
        return rank == 2 and unsqueezed and node.all_input_nodes[0].op == "placeholder"
    shape = shape_of(node)
    return len(shape) == rank and isinstance(shape[0], int) and shape[0] == 1


def _shape_without_batch(node: fx.Node) -> tuple[Any, ...]:
    """Return the shape of a tensor, or of what it is a squeeze of, less the dim of 1."""
    return shape_of(node) if "val" in node.meta else shape_of(args_of(node)[0])[1:]


def _without_batch(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """Return a node that yields [1, ...] as [...]."""
    if is_op(node, A.unsqueeze.default) and node.args[1] == 0:
        return node.all_input_nodes[0]
    return graph.call_function(A.squeeze.dim, (node, 0))


def _place_of(node: fx.Node) -> dict[str, Any]:
    return {name: node.meta[name] for name in ("nn_module_stack",) if name in node.meta}


def _replace(graph: fx.Graph, old: fx.Node, new: fx.Node) -> None:
    new.meta = dict(old.meta)
    old.replace_all_uses_with(new)
    graph.erase_node(old)
