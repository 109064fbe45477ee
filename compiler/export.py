"""Export: the reference becomes a cache-free graph, and, after the passes, the step module becomes a program again.

Everything here works on weights that were never read; what enters and leaves are graphs and names.
"""

from __future__ import annotations

import functools
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram, export

from oxfuse.models.reference import Reference
from oxfuse.passes.insert_cache import STEP_INPUTS, PagedCache
from oxfuse.runtime.manifest import DimRange, TensorSpec, cache_shapes

CACHE_FREE_INPUTS = {"token_ids": "input_ids", "positions": "position_ids", "rows": "logits_to_keep"}
"""The step program's inputs by the names that the reference gives them."""


@dataclass(frozen=True, kw_only=True)
class StepLimits:
    """Upper bounds of the step program's dims: tokens and sequences of a step, blocks of a sequence's table."""

    tokens: int
    sequences: int
    table: int


@torch.no_grad()  # or the rotation hides in a submodule under wrap_with_set_grad_enabled
def export_reference(model: Reference, max_tokens: int = 8192, *, batched: bool = False) -> fx.GraphModule:
    """Return the pre-dispatch ATen graph of ids [1, T], positions [1, T], logits_to_keep [R] -> values [1, R, ...].

    That is the model's `rows`; parameters keep their names. `batched`: of any number of sequences of equal lengths, [B, T].
    """
    tokens, rows = Dim("T", min=1, max=max_tokens), Dim("R", min=1, max=max_tokens)
    batch = {0: Dim("B", min=1, max=1 << 20)} if batched else {}
    ids = torch.zeros(2 if batched else 1, 5, dtype=torch.long)
    inputs = {
        "input_ids": ids,
        "position_ids": ids.clone(),
        "logits_to_keep": torch.zeros(2, dtype=torch.long),
    }
    dims = {"input_ids": {**batch, 1: tokens}, "position_ids": {**batch, 1: tokens}, "logits_to_keep": {0: rows}}
    _order_multiples()
    program = export(_Rows(model), (), inputs, dynamic_shapes=dims, strict=False)
    module = program.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    return module


@functools.cache
def _order_multiples() -> None:
    """Let torch know before 2.13 what it knows since: which of several multiples of one size is the least.

    Without it, to see two dims before a dynamic one as one ends in a guard such as min(64 T, 128 T) == 64 T, and the export is
    refused.
    """
    from torch.utils._sympy import functions

    base: Any = functions.MinMaxBase
    if hasattr(base, "_collapse_known_multiplicative_terms"):
        return
    find = base._find_localzeros.__func__

    def find_least(cls: Any, values: Any, /, **options: Any) -> Collection[Any]:
        found: Collection[Any] = find(cls, values, **options)
        parts = [value.as_coeff_Mul() for value in found]
        if cls is functions.Min and len({term for _, term in parts}) == 1 and parts[0][1].is_nonnegative:
            return {min(zip(parts, found, strict=True), key=lambda pair: pair[0][0])[1]}
        return found

    base._find_localzeros = classmethod(find_least)


class _Rows(nn.Module):
    """A model with `rows` for its forward. It shares the model's members, so that every parameter keeps its name."""

    def __init__(self, model: Reference) -> None:
        super().__init__()
        self.__dict__ |= {"_reference": model, "training": model.training}
        for members in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            self.__dict__[members] = model.__dict__[members]

    def forward(self, input_ids: Tensor, position_ids: Tensor, logits_to_keep: Tensor) -> Tensor:
        """Return [1, R, ...]."""
        model: Reference = self.__dict__["_reference"]
        return model.rows(input_ids, position_ids, logits_to_keep).values


@torch.no_grad()
def export_step(
    step: fx.GraphModule,
    cache: PagedCache,
    *,
    block_size: int,
    dtype: torch.dtype,
    limits: StepLimits,
    one_token: bool = False,
) -> ExportedProgram:
    """Return the step module as an exported program with dynamic dims, each of minimum 1 (N + 1: 2).

    With `one_token` every sequence adds one token, so that T is N.
    """
    sizes = {"T": limits.tokens, "N": limits.sequences, "N1": limits.sequences + 1, "M": limits.table, "R": limits.tokens}
    example = {"T": 3 if one_token else 5, "N": 3, "N1": 4, "M": 6, "R": 2}
    # The examples lie inside even where the limits are smaller; the runtime keeps to the limits.
    dims = {name: Dim(name, min=1 + (name == "N1"), max=max(size, example[name] + 1)) for name, size in sizes.items()}
    if one_token:
        dims["T"] = dims["N"]
    groups = len(cache.windows)
    args, shapes = [], []
    for name in STEP_INPUTS:
        symbols = _SHAPES[name]
        args.append(torch.zeros([groups if s == "G" else example[s] for s in symbols], dtype=torch.long))
        shapes.append({i: dims[s] for i, s in enumerate(symbols) if s != "G"})
    blocks = [Dim(f"B{group}", min=1, max=1 << 24) for group in range(groups)]
    for layer in cache.layers:
        for shape in cache_shapes(layer.kv_heads, layer.head_dim, block_size):
            args.append(torch.zeros(7 + layer.group, *shape, dtype=dtype))
            shapes.append({0: blocks[layer.group]})
    return export(step, tuple(args), dynamic_shapes=tuple(shapes), strict=False)


_SHAPES = {
    "token_ids": ("T",),
    "positions": ("T",),
    "query_start": ("N1",),
    "kv_lens": ("N",),
    "slots": ("G", "T"),
    "block_tables": ("G", "N", "M"),
    "rows": ("R",),
}


def step_signature(
    cache: PagedCache, *, block_size: int, dtype: torch.dtype, width: int, limits: StepLimits
) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...], dict[str, DimRange]]:
    """Return inputs, outputs and dims of the step program as the manifest states them; `width` values come for a token."""
    groups, name = len(cache.windows), str(dtype).removeprefix("torch.")
    inputs = [
        TensorSpec(name=n, dtype="int64", shape=tuple(groups if s == "G" else "N+1" if s == "N1" else s for s in _SHAPES[n]))
        for n in STEP_INPUTS
    ]
    inputs += [
        TensorSpec(name=f"{kv}_cache_{i}", dtype=name, shape=(f"B{layer.group}", *shape))
        for i, layer in enumerate(cache.layers)
        for kv, shape in zip("kv", cache_shapes(layer.kv_heads, layer.head_dim, block_size), strict=True)
    ]
    dims = {
        "T": DimRange(min=1, max=limits.tokens),
        "N": DimRange(min=1, max=limits.sequences),
        "M": DimRange(min=1, max=limits.table),
        "R": DimRange(min=1, max=limits.tokens),
        **{f"B{group}": DimRange(min=1, max=1 << 24) for group in range(groups)},
    }
    return tuple(inputs), (TensorSpec(name="logits", dtype=name, shape=("R", width)),), dims
