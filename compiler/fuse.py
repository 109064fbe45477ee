"""From a reference model to the step program's graph: export, passes, cache. No weight is read on the way.

The result is what every target lowers; tests run it eagerly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import fx, nn

from oxfuse.compiler.export import CACHE_FREE_INPUTS, export_reference
from oxfuse.models.reference import Reference
from oxfuse.passes.insert_cache import PagedCache, insert_paged_cache
from oxfuse.passes.manager import Observer, PassResult, Policy, run_passes
from oxfuse.passes.pack import Packing, pack_weights
from oxfuse.passes.weights import Encoding, WeightTable, table_of
from oxfuse.runtime.manifest import CacheGroup, CacheSpec


@dataclass(frozen=True, kw_only=True)
class Fused:
    """A step module with the table of its weights, its cache, and what the passes did. It gives `width` values for a token."""

    step: fx.GraphModule
    weights: WeightTable
    cache: PagedCache
    width: int
    passes: tuple[PassResult, ...]
    rounded: frozenset[str] = frozenset()
    """Names in the checkpoint of the weights that activations of 8 bits are multiplied with."""

    def stored_name(self, name: str) -> str:
        """Return the name under which the weight file holds a weight: for tied names, the one that the checkpoint has."""
        weight = self.weights[name]
        return weight.source if not weight.transforms and weight.part is None else name


def fuse(
    model: Reference,
    encodings: Mapping[str, Encoding],
    *,
    requested: tuple[str, ...],
    policy: Policy = "strict",
    packing: Packing | None = None,
    observe: Observer | None = None,
    export: Callable[[Reference], fx.GraphModule] = export_reference,
    insert: Callable[[fx.GraphModule, Mapping[str, str]], tuple[fx.GraphModule, PagedCache]] = insert_paged_cache,
) -> Fused:
    """Export `model`, run the passes, insert the cache, a paged one by default.

    `encodings` tells how the checkpoint stores a parameter ("dense" where it says nothing); `requested` names the fusions that
    the model must have; `packing` is what the kernels of a CPU read, None for other targets. Raises UserError where a fusion is
    refused (policy strict), and where nothing can be packed as asked.
    """
    module = export(model)
    weights = tied_table(model, encodings)
    results = run_passes(module, weights, requested=requested, policy=policy, observe=observe)
    rounded = frozenset[str]()
    if packing is not None:
        packed = pack_weights(module, weights, packing)
        results, rounded = [*results, *packed.results], packed.rounded
        if observe is not None:
            observe("pack_weights", module)
    (values,) = module.graph.output_node().all_input_nodes
    width = int(values.meta["val"].shape[-1])
    step, cache = insert(module, CACHE_FREE_INPUTS)
    results.append(PassResult(name="insert_cache", count=len(cache.layers)))
    if observe is not None:
        observe("insert_cache", step)
    return Fused(step=step, weights=weights, cache=cache, width=width, passes=tuple(results), rounded=rounded)


def tied_table(model: nn.Module, encodings: Mapping[str, Encoding]) -> WeightTable:
    """Return the table of a model's parameters and buffers; each name of a tied tensor gets the first name as its source."""
    tensors: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
    computed = dict(model.named_buffers(remove_duplicate=False))
    table = table_of({**tensors, **computed}, encodings, frozenset(computed))
    first: dict[int, str] = {}
    for name, tensor in tensors.items():
        owner = first.setdefault(id(tensor), name)
        if owner != name:
            table[name] = table[owner]
    return table


def cache_spec(cache: PagedCache, block_size: int, dtype: torch.dtype) -> CacheSpec:
    """Return the manifest's description of a cache."""
    groups = range(len(cache.windows))
    return CacheSpec(
        block_size=block_size,
        dtype=str(dtype).removeprefix("torch."),
        kv_heads=tuple(layer.kv_heads for layer in cache.layers),
        head_dim=tuple(layer.head_dim for layer in cache.layers),
        groups=tuple(
            CacheGroup(window=cache.windows[g], layers=tuple(i for i, layer in enumerate(cache.layers) if layer.group == g))
            for g in groups
        ),
    )
