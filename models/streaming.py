"""Runs a reference model that does not fit into memory: the oracle of every compiled artifact.

In: a contract, a configuration, the sources of its parameters, token ids. Out: what the reference says about some rows. A
module's own parameters exist only while it runs; experts run one by one on the tokens that chose them; large matrices come a
slice of rows at a time. So the peak is the activations and one expert, or one slice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from oxfuse.models.contract import ComputedBuffers, Experts, ModelContract
from oxfuse.models.reference import RowsOutput
from oxfuse.models.tensor_source import TensorSource
from oxfuse.models.virtual import meta_model

SLICE_BYTES = 64 << 20
"""A linear layer or an embedding larger than this is never whole in memory."""

Read = Callable[[str, slice | None], Tensor]
"""(name of one of a module's own parameters, rows) -> values in the oracle's dtype."""
Change = Callable[[Tensor], Tensor]


@torch.no_grad()
def stream_oracle(
    contract: ModelContract,
    config: Any,
    task: str,
    sources: Mapping[str, TensorSource],
    input_ids: Tensor,
    position_ids: Tensor,
    dtype: torch.dtype = torch.float32,
    rows: Tensor | None = None,
    entering: Mapping[str, Change] | None = None,
    **wanted: Any,
) -> RowsOutput:
    """Return what the reference says about the tokens `rows`, int64 [R] (default: all), of one sequence, computed on the CPU.

    input_ids and position_ids int64 [1, T]. `sources` is what the contract's `sources` returned. `wanted` goes to the model's
    `rows`.
    """
    model = meta_model(contract, config, task, dtype)
    names = {parameter: name for name, parameter in model.named_parameters()}
    for module in model.modules():
        own = {leaf: sources[names[parameter]] for leaf, parameter in module.named_parameters(recurse=False)}
        if own:
            read = partial(_read, own, dtype)
            module.forward = partial(_runner(module), module, read, module.forward)
            change = next(
                (entering[names[p]] for p in module.parameters(recurse=False) if entering and names[p] in entering), None
            )
            if change is not None:
                module.forward = partial(_run_changed, module, change, module.forward)
        if isinstance(module, ComputedBuffers):
            module.compute_buffers(torch.device("cpu"))
    rows = torch.arange(input_ids.shape[1]) if rows is None else rows
    return model.rows(input_ids, position_ids, rows, **wanted)


def _read(own: Mapping[str, TensorSource], dtype: torch.dtype, leaf: str, rows: slice | None) -> Tensor:
    return own[leaf].read(rows).to(dtype)


def _runner(module: nn.Module) -> Callable[..., Any]:
    if isinstance(module, Experts):
        return _run_experts
    large = any(math.prod(p.shape) * p.dtype.itemsize > SLICE_BYTES for p in module.parameters(recurse=False))
    if large and isinstance(module, nn.Linear):
        return _run_linear
    if large and isinstance(module, nn.Embedding):
        return _run_embedding
    return _run_whole


def _run_whole(
    module: nn.Module, read: Read, forward: Callable[..., Any], *args: Any, rows: slice | None = None, **kwargs: Any
) -> Any:
    """Run `forward` while the module holds its parameters, or `rows` of each."""
    absent = dict(module.named_parameters(recurse=False))
    for leaf in absent:
        module.register_parameter(leaf, nn.Parameter(read(leaf, rows), requires_grad=False))
    try:
        return forward(*args, **kwargs)
    finally:
        for leaf, parameter in absent.items():
            module.register_parameter(leaf, parameter)


def _run_linear(module: nn.Linear, read: Read, forward: Callable[..., Any], x: Tensor) -> Tensor:
    step = max(1, SLICE_BYTES // (module.in_features * module.weight.dtype.itemsize))
    slices = [slice(start, start + step) for start in range(0, module.out_features, step)]
    return torch.cat([F.linear(x, read("weight", s), read("bias", s) if module.bias is not None else None) for s in slices], -1)


def _run_changed(module: nn.Module, change: Change, forward: Callable[..., Any], x: Tensor, *args: Any) -> Any:
    if isinstance(module, nn.Linear):
        return forward(change(x), *args)
    with _ChangedProducts(change):
        return forward(x, *args)


class _ChangedProducts(TorchFunctionMode):
    """Changes what a matrix product multiplies with a parameter."""

    def __init__(self, change: Change) -> None:
        super().__init__()
        self._change = change

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (torch.matmul, F.linear) and isinstance(args[1], nn.Parameter):
            args = (self._change(args[0]), *args[1:])
        return func(*args, **(kwargs or {}))


def _run_embedding(module: nn.Embedding, read: Read, forward: Callable[..., Any], ids: Tensor) -> Tensor:
    unique, places = torch.unique(ids, return_inverse=True)
    return torch.cat([read("weight", slice(i, i + 1)) for i in unique.tolist()])[places]


def _run_experts(
    module: Experts, read: Read, forward: Callable[..., Tensor], x: Tensor, router_indices: Tensor, routing_weights: Tensor
) -> Tensor:
    total = torch.zeros_like(x)
    for expert in sorted(set(router_indices.flatten().tolist())):
        tokens = (router_indices == expert).any(-1).nonzero().squeeze(-1)
        chosen = x[tokens], router_indices[tokens], routing_weights[tokens], expert
        total[tokens] += _run_whole(module, read, forward, *chosen, rows=slice(expert, expert + 1))
    return total
