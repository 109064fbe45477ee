"""`oxfuse.explain`: what the passes make of a module's graph, layer by layer, and why they leave a region alone.

The module is exported as a compile exports its reference, and fused under policy `best_effort`; nothing of it is changed and
nothing is lowered.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, export

from oxfuse.compiler.fuse import tied_table
from oxfuse.errors import UserError
from oxfuse.passes.graph import mark_chosen
from oxfuse.passes.manager import PassResult, run_passes


@dataclass(frozen=True, kw_only=True)
class Left:
    """A region that stayed as it was: what the fusion is called that it looked like, the layer it stands in, and why."""

    fusion: str
    layer: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """What was fused. `fused` has for each layer, by its name in the module, how often each fusion was made in it.

    Printed, it is a table: a line a layer and a line for each region that was left alone.
    """

    module: str
    fused: Mapping[str, Mapping[str, int]]
    left: Sequence[Left]

    @property
    def counts(self) -> dict[str, int]:
        """Return how often each fusion was made."""
        total: Counter[str] = Counter()
        for made in self.fused.values():
            total.update(made)
        return dict(total)

    def __str__(self) -> str:
        counts = ", ".join(f"{count} {name}" for name, count in self.counts.items()) or "nothing"
        regions = {0: "no region was", 1: "1 region was"}.get(len(self.left), f"{len(self.left)} regions were")
        rows = [
            (layer, ", ".join(name if count == 1 else f"{name} ×{count}" for name, count in made.items()))
            for layer, made in self.fused.items()
        ]
        rows += [(left.layer, f"not {left.fusion}: {left.reason}") for left in self.left]
        width = max((len(layer) for layer, _ in rows), default=0)
        told = [f"  {layer:{width}}  {what}" for layer, what in sorted(rows, key=_place)]
        return "\n".join([f"{self.module}: {counts} fused; {regions} left alone.", *told])


def _place(row: tuple[str, str]) -> list[tuple[int, str]]:
    """Sort layers by number where their names have some."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in row[0].split(".")]


def explain(module: nn.Module, inputs: Tensor | Sequence[Any] | Mapping[str, Any]) -> Explanation:
    """Export `module` for `inputs` and tell what the passes fuse in it and what not.

    inputs: token ids [B, S], int64, or what the module is called with, by position or by name, masks [B, 1, S, L] for instance;
    S may be any length from 2 on, it stays dynamic. A module that takes positions and is called without is given consecutive
    ones, and a cache is not asked for: that is how `compile` exports. Of positions in `inputs` nothing is assumed, as where
    a module stays in memory. Works on any module, transformers' own included. Raises UserError where the module cannot be
    exported, with torch's reason and, where one is known, the setting to change.
    """
    args, kwargs, ours = _call(module, inputs)
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        graph = _exported(module, args, kwargs)
    finally:
        for part in training:
            part.training = True
    for node in graph.graph.nodes:
        if node.op == "placeholder" and node.name not in ours:
            mark_chosen(node)
    return explanation_of(type(module).__name__, run_passes(graph, tied_table(module, {}), policy="best_effort"))


def explanation_of(name: str, results: Sequence[PassResult]) -> Explanation:
    """Return what the results of passes over the graph of a module of class `name` say."""
    fused: dict[str, Counter[str]] = {}
    for result in results:
        for layer in result.layers:
            fused.setdefault(layer, Counter())[result.name] += 1
    left = [Left(fusion=r.name, layer=refused.layer, reason=refused.reason) for r in results for refused in r.refused]
    return Explanation(module=name, fused={layer: dict(made) for layer, made in fused.items()}, left=left)


def _call(
    module: nn.Module, inputs: Tensor | Sequence[Any] | Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any], set[str]]:
    """Return the arguments of a call without a cache, with positions, as `compile` gives them; and the names of those added."""
    named = dict(inputs) if isinstance(inputs, Mapping) else {}
    args = () if isinstance(inputs, Mapping) else (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    known = inspect.signature(module.forward).parameters
    ids, given = named.get("input_ids", args[0] if args else None), set(named)
    if "use_cache" in known:
        named.setdefault("use_cache", False)
    if "position_ids" in [*known][len(args) :] and isinstance(ids, Tensor):
        named.setdefault("position_ids", torch.arange(ids.shape[-1], device=ids.device).expand_as(ids).clone())
    return args, named, named.keys() - given


@torch.no_grad()
def _exported(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.GraphModule:
    """Return the pre-dispatch graph, lengths of sequences dynamic. Raises UserError."""
    known = dict(zip(inspect.signature(module.forward).parameters, args, strict=False)) | kwargs

    def dims(value: Any) -> dict[int, Any] | None:
        if not isinstance(value, Tensor):
            return None
        lengths = (2, 3) if value.dim() == 4 else (1,) if value.dim() == 2 and value.dtype == torch.int64 else ()  # masks; ids
        return dict.fromkeys(lengths, Dim.AUTO)

    dynamic = {name: dims(value) for name, value in known.items()}
    try:
        exported = export(module, args, kwargs, dynamic_shapes=dynamic, strict=False).module(check_guards=False)
    except Exception as error:  # torch's errors of an export have no common class
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{type(module).__name__} cannot be exported: {reason:.300}{_remedy(module)}") from error
    assert isinstance(exported, fx.GraphModule)
    return exported


def _remedy(module: nn.Module) -> str:
    """Return what to change where the module's settings are known to break graphs."""
    if getattr(getattr(module, "config", None), "_experts_implementation", None) == "eager":
        return (
            " Its experts run in a loop over those that were chosen, which breaks the graph: call set_experts_implementation("
            '"grouped_mm") first.'
        )
    return ""
