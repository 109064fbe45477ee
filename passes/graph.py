"""Questions and edits that every pass needs on a pre-dispatch ATen graph.

Nodes carry `meta["val"]`, a fake tensor (or SymInt) that tells shape and dtype; edits keep it right.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeGuard

import torch
from torch import fx

A = torch.ops.aten
OXFUSE = torch.ops.oxfuse


class Refusal(Exception):
    """A region looks like a fusion's but is not. Carries the reason; the pass manager turns it into an error or a report."""

    def __init__(self, reason: str, node: fx.Node | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.node = node


def require(condition: bool, reason: str, node: fx.Node | None = None) -> None:
    """Raise Refusal(reason) unless `condition`."""
    if not condition:
        raise Refusal(reason, node)


def is_op(node: Any, *targets: Any) -> TypeGuard[fx.Node]:
    """Tell whether `node` calls one of `targets` (operator overloads, or packets that match every overload)."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return False
    packet = getattr(node.target, "overloadpacket", None)
    return node.target in targets or (packet is not None and packet in targets)


def as_node(value: Any) -> fx.Node:
    """Return `value` if it is a node; refuse otherwise."""
    if not isinstance(value, fx.Node):
        raise Refusal(f"expected a tensor, found {value}")
    return value


def the_op(node: Any, what: str, *targets: Any) -> fx.Node:
    """Return `node` if it calls one of `targets`; refuse otherwise, saying that `what` was expected."""
    if not is_op(node, *targets):
        found = node.target if isinstance(node, fx.Node) else node
        raise Refusal(f"expected {what}, found {found}", node if isinstance(node, fx.Node) else None)
    return node


def args_of(node: fx.Node) -> tuple[Any, ...]:
    """Return the node's arguments without fx's union of everything an argument may be: patterns check what they find."""
    return node.args


def shape_of(node: fx.Node) -> tuple[Any, ...]:
    """Return the node's shape; dynamic sizes are SymInts."""
    return tuple(node.meta["val"].shape)


def dtype_of(node: fx.Node) -> torch.dtype:
    """Return the node's dtype."""
    dtype = node.meta["val"].dtype
    assert isinstance(dtype, torch.dtype)
    return dtype


def is_tensor(node: Any) -> TypeGuard[fx.Node]:
    """Tell whether `node` yields one tensor."""
    return isinstance(node, fx.Node) and isinstance(node.meta.get("val"), torch.Tensor)


def same_size(a: Any, b: Any) -> bool:
    """Tell whether two sizes are the same number or the same symbol, without guarding on either."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return str(a) == str(b)


def same_shape(a: fx.Node, b: fx.Node) -> bool:
    """Tell whether two tensors have the same shape, symbols compared by name."""
    x, y = shape_of(a), shape_of(b)
    return len(x) == len(y) and all(map(same_size, x, y))


def constant(value: Any, what: str, node: fx.Node | None = None) -> float:
    """Return a Python number of the graph as float; refuse anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Refusal(f"expected a constant for {what}, found {value}", node)
    return float(value)


def through(node: Any, *targets: Any) -> Any:
    """Return the node behind a chain of `targets`, each seen through its first argument."""
    while is_op(node, *targets):
        node = node.args[0]
    return node


CASTS = (A.to.dtype, A.to.dtype_layout, A.to.device, A._to_copy.default)


def uncast(node: Any) -> Any:
    """Return the node behind dtype conversions."""
    return through(node, *CASTS)


def unwidened(node: Any) -> Any:
    """Return the node behind conversions to a wider dtype: the same values. A rounding conversion stays."""
    while is_op(node, *CASTS) and dtype_of(node).itemsize >= dtype_of(args_of(node)[0]).itemsize:
        node = args_of(node)[0]
    return node


def users_through(node: fx.Node, *targets: Any) -> list[fx.Node]:
    """Return the node's users, a user among `targets` replaced by its own users."""
    return [v for user in node.users for v in (users_through(user, *targets) if is_op(user, *targets) else [user])]


def only(nodes: list[fx.Node], what: str, near: fx.Node) -> fx.Node:
    """Return the single node of a list; refuse otherwise."""
    if len(nodes) != 1:
        raise Refusal(f"expected one {what}, found {len(nodes)}", near)
    return nodes[0]


def after_casts(node: fx.Node) -> fx.Node:
    """Return the last node of the dtype conversions that follow `node`, if each has one user."""
    while len(node.users) == 1 and is_op(user := next(iter(node.users)), *CASTS):
        node = user
    return node


def ancestors(nodes: Iterable[fx.Node], stop: Iterable[fx.Node] = ()) -> set[fx.Node]:
    """Return `nodes` and all they are computed from; the nodes of `stop` are neither entered nor included."""
    border, seen, todo = set(stop), set[fx.Node](), list(nodes)
    while todo:
        node = todo.pop()
        if node not in seen and node not in border:
            seen.add(node)
            todo += node.all_input_nodes
    return seen


_CHOSEN = "oxfuse_chosen_by_the_caller"
_OF_SIZES = (A.sym_size.int, A.sym_numel.default, A.empty_like.default, A.zeros_like.default, A.ones_like.default)


def mark_chosen(node: fx.Node) -> None:
    """Mark an input of the program whose values its caller chooses freely: nothing may be assumed of them.

    Of inputs without the mark, passes assume that integers are consecutive positions, which a runtime of ours sees to.
    """
    node.meta[_CHOSEN] = True


def is_chosen(node: fx.Node) -> bool:
    """Tell whether the node is an input that `mark_chosen` marked."""
    return node.op == "placeholder" and _CHOSEN in node.meta


def values_behind(node: fx.Node) -> list[fx.Node]:
    """Return the inputs and weights whose values `node` is computed from; those of which it takes but sizes are left out."""
    measured = [each for each in node.graph.nodes if is_op(each, *_OF_SIZES)]
    return [each for each in in_order(node.graph, ancestors([node], measured)) if each.op in ("placeholder", "get_attr")]


def in_order(graph: fx.Graph, nodes: set[fx.Node]) -> list[fx.Node]:
    """Return `nodes` in the graph's order."""
    return [node for node in graph.nodes if node in nodes]


def is_mutable(node: fx.Node) -> bool:
    """Tell whether the node's op writes to an argument."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def layer_name(node: fx.Node) -> str:
    """Name the place of a node in the model: the innermost module it came from, or a weight it reads, or the node itself."""
    stack = node.meta.get("nn_module_stack")
    if stack:
        path = str(list(stack.values())[-1][0])
        return path.removeprefix("L['self'].").removeprefix("L__self__.") or node.name
    for source in node.all_input_nodes:
        if source.op == "get_attr":
            return str(source.target)
    return node.name


def call(graph: fx.Graph, target: Callable[..., Any], *args: Any, like: fx.Node | None = None) -> fx.Node:
    """Insert a call at the graph's insertion point, with its fake value, and with `like`'s place in the model."""
    node = graph.call_function(target, args)
    values = fx.node.map_arg(args, lambda n: n.meta["val"])
    tensors = [n.meta["val"] for n in node.all_input_nodes if isinstance(n.meta["val"], torch.Tensor)]
    mode = torch._guards.detect_fake_mode(tensors)
    if mode is None:
        node.meta["val"] = target(*values)
    else:
        with mode:
            node.meta["val"] = target(*values)
    if like is not None and "nn_module_stack" in like.meta:
        node.meta["nn_module_stack"] = like.meta["nn_module_stack"]
    return node


def remove_dead_code(graph: fx.Graph) -> int:
    """Erase what nothing uses; return how many nodes went.

    fx's own elimination keeps inactive dropout, metadata assertions and in-place ops on temporaries, hence whole dead regions.
    An op that writes to an input of the program or to a weight stays.
    """
    erased = 0
    for node in reversed(list(graph.nodes)):
        if not node.users and node.op not in ("placeholder", "output") and not writes_outside(node):
            graph.erase_node(node)
            erased += 1
    return erased


def writes_outside(node: fx.Node) -> bool:
    """Tell whether the node writes, perhaps through views, to an input of the program or to a weight."""
    return is_mutable(node) and any(
        base.op in ("placeholder", "get_attr") for written in _written(node) for base in _bases(written)
    )


def _written(node: fx.Node) -> Iterator[fx.Node]:
    assert isinstance(node.target, torch._ops.OpOverload)
    for argument, value in zip(node.target._schema.arguments, node.args, strict=False):
        if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, fx.Node):
            yield value


def _bases(node: fx.Node) -> Iterator[fx.Node]:
    """Yield what `node` may be a view of. An op's result may alias its first argument; a fresh tensor ends the walk."""
    fresh = is_op(node, A.clone, A.empty_like, A.zeros_like, A.mul, A.add, A.linear, A.matmul, A.bmm, A.index)
    first = node.args[0] if node.args else None
    if node.op != "call_function" or fresh or not isinstance(first, fx.Node):
        yield node
    else:
        yield from _bases(first)


def items_of(node: fx.Node) -> dict[int, fx.Node]:
    """Return the `getitem` nodes of a node with several outputs, by index."""
    return {int(str(user.args[1])): user for user in node.users if is_op(user, operator.getitem)}
