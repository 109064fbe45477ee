"""Drop what computes nothing: casts to the dtype a tensor has, inactive dropout, metadata assertions, adding an integer zero.

It runs first, so that the patterns need not look through such nodes. A node goes only if its value is its input's, bit for bit.
"""

from __future__ import annotations

from torch import fx

from oxfuse.passes.graph import CASTS, A, args_of, dtype_of, is_op, is_tensor, remove_dead_code, same_shape


def drop_noops(module: fx.GraphModule) -> int:
    """Edit the graph in place; return how many nodes went."""
    graph, dropped = module.graph, 0
    for node in list(graph.nodes):
        if is_op(node, A._assert_tensor_metadata.default) or (node.op == "call_module" and node.target == "_guards_fn"):
            graph.erase_node(node)
            dropped += 1
        elif _is_noop(node):
            node.replace_all_uses_with(args_of(node)[0])
            graph.erase_node(node)
            dropped += 1
    return dropped + remove_dead_code(graph)


def _is_noop(node: fx.Node) -> bool:
    if not (is_tensor(node) and args_of(node) and is_tensor(args_of(node)[0])):
        return False
    before = args_of(node)[0]
    same = dtype_of(node) == dtype_of(before) and same_shape(node, before)
    if is_op(node, *CASTS):
        return same and node.kwargs.get("copy") is not True
    if is_op(node, A.dropout.default):
        return args_of(node)[1] == 0.0 or not args_of(node)[2]
    if is_op(node, A.add.Tensor, A.sub.Tensor):
        return same and args_of(node)[1:] == (0,) and not node.kwargs and not dtype_of(node).is_floating_point
    return is_op(node, A.detach.default, A.lift_fresh_copy.default, A.alias.default) and same
