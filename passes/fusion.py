"""What a fusion is, and where fusions are found.

A fusion lives in `passes/fusions/<op>/pattern.py` as `FUSION`, which is None where the folder brings but a kernel. It names its
anchors in the graph, matches the region around an anchor or refuses with a reason, and emits the fused form. The pass manager
does the rest: checks, counts, replacement.
"""

from __future__ import annotations

import graphlib
import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from oxfuse.passes import fusions
from oxfuse.passes.graph import call
from oxfuse.passes.weights import Weight, WeightTable


@dataclass(frozen=True, kw_only=True)
class Match:
    """A region that a fusion understands.

    `inputs` are the activations that enter it, `outputs` the nodes whose values the fused form replaces, one for one.
    `emit` inserts the fused form and returns its outputs.
    """

    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    emit: Callable[[Emitter], tuple[fx.Node, ...]]


@dataclass(frozen=True, kw_only=True)
class Fusion:
    """One fusion. `after` names fusions that must run first; `anchors` and `match` are described in this module's docstring.

    A `live` one serves models that stay in memory, with a cache of their own: policy `strict`, which a compile has, skips it.
    """

    name: str
    anchors: Callable[[fx.Graph], list[fx.Node]]
    match: Callable[[fx.Node, WeightTable], Match]
    after: tuple[str, ...] = ()
    live: bool = False


@dataclass(kw_only=True)
class Emitter:
    """Inserts the nodes of a fused form at the graph's insertion point; `weight` adds entries to the table."""

    module: fx.GraphModule
    weights: WeightTable
    like: fx.Node
    added: list[fx.Node] = field(default_factory=list)

    def call(self, target: Callable[..., Any], *args: Any) -> fx.Node:
        """Insert a call and return its node."""
        node = call(self.module.graph, target, *args, like=self.like)
        self.added.append(node)
        return node

    def weight(self, name: str, weight: Weight) -> fx.Node:
        """Add a weight to the table and to the module (memory that nobody touches), and return a node that reads it."""
        self.weights[name] = weight
        owner, _, leaf = name.rpartition(".")
        parent = self.module.get_submodule(owner) if owner else self.module
        if not hasattr(parent, leaf):
            parent.register_parameter(leaf, nn.Parameter(torch.empty(weight.shape, dtype=weight.dtype), requires_grad=False))
        node = self.module.graph.get_attr(name)
        mode = torch._guards.detect_fake_mode([self.like.meta["val"]])
        value = getattr(parent, leaf)
        node.meta["val"] = mode.from_tensor(value, static_shapes=True) if mode is not None else value
        self.added.append(node)
        return node


def all_fusions() -> list[Fusion]:
    """Return the fusions of every folder under `passes/fusions`, each after those that it names in `after`."""
    found: dict[str, Fusion] = {}
    for info in pkgutil.iter_modules(fusions.__path__):
        if info.ispkg:
            fusion: Fusion | None = importlib.import_module(f"{fusions.__name__}.{info.name}.pattern").FUSION
            if fusion is not None:
                found[fusion.name] = fusion
    order = graphlib.TopologicalSorter({name: fusion.after for name, fusion in sorted(found.items())}).static_order()
    return [found[name] for name in order]
