"""Tell what a mask lets a query see, by running the mask's own nodes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from oxfuse.passes.graph import Refusal, ancestors, in_order, is_chosen, require, shape_of, values_behind

_LONGEST = 1 << 20


def window_of(graph: fx.Graph, mask: fx.Node) -> int:
    """Return the sliding window of a causal mask, in tokens with the query itself; 0 if it sees everything before it.

    The mask's nodes run on one sequence longer than every constant in them, or of its length where that is fixed, and each entry
    is looked at. Inputs of the program are consecutive positions, and sizes follow from the length. Raises Refusal if the mask
    reads a weight, values that a caller chooses, or anything else that is not a position, or is neither causal nor a causal
    window.
    """
    read = values_behind(mask)
    for node in read:
        require(not is_chosen(node), f"the mask depends on the values of the input {node.name}, which a caller may choose", node)
    region = in_order(graph, ancestors([mask]))
    size = shape_of(mask)[-1]
    fixed = isinstance(size, int)
    length = size if fixed else 5 + max((a for n in region for a in _integers(n) if a < _LONGEST), default=1)
    env: dict[fx.Node, Any] = {}
    for node in region:
        if node.op == "get_attr":
            raise Refusal(f"the mask reads the tensor {node.target}", node)
        if node.op == "placeholder":
            value = node.meta.get("val")
            if not isinstance(value, Tensor):
                env[node] = _size_of(node, value, size, length)
            elif node not in read:
                env[node] = torch.zeros((), dtype=value.dtype).expand([_size_of(node, n, size, length) for n in value.shape])
            elif value.dtype == torch.bool or value.dtype.is_floating_point:
                raise Refusal(f"the mask does not follow from positions alone: it reads the input {node.name}", node)
            else:
                env[node] = torch.arange(length).expand([1] * (value.dim() - 1) + [length])
        else:
            assert callable(node.target)
            args, kwargs = fx.node.map_aggregate((node.args, dict(node.kwargs)), lambda argument: _value(argument, env))
            try:
                env[node] = node.target(*args, **kwargs)
            except (RuntimeError, IndexError, TypeError, ValueError) as error:  # an input is no positions, but padding, say
                reason = str(error).partition("\n")[0]
                raise Refusal(f"the mask does not follow from positions alone: {reason:.200}", node) from error
    value = env[mask]
    require(value.shape[-2:] == (length, length), f"the mask of {length} tokens has shape {tuple(value.shape)}", mask)
    planes = value.reshape(-1, length, length)
    require(bool((planes == planes[:1]).all()), "the mask differs between heads or sequences", mask)
    visible = planes[0] if value.dtype == torch.bool else planes[0] == 0
    hidden = planes[0][~visible]
    if value.dtype != torch.bool:
        require(bool((hidden <= torch.finfo(value.dtype).min / 2).all()), "the mask adds something other than 0 and -inf", mask)
    i, j = torch.arange(length)[:, None], torch.arange(length)
    window = int(visible[-1].sum())
    require(torch.equal(visible, (j <= i) & (j > i - window)), "the mask is neither causal nor a causal window", mask)
    return 0 if window == length else window


def _value(argument: Any, env: dict[fx.Node, Any]) -> Any:
    if isinstance(argument, fx.Node):
        return env[argument]
    return torch.device("cpu") if isinstance(argument, torch.device) else argument


def _size_of(node: fx.Node, value: Any, size: Any, length: int) -> int:
    """Return what `value`, a size that an input is or has, counts where `size`, the mask's, is `length`; batches count 1."""
    if isinstance(value, torch.SymInt):
        return length if isinstance(size, torch.SymInt) and value.node.expr == size.node.expr else 1
    if isinstance(value, int):
        return value
    raise Refusal(f"the mask reads the input {node.name}, which is no tensor", node)


def _integers(node: fx.Node) -> list[int]:
    return [a for a in [*node.args, *node.kwargs.values()] if type(a) is int]
