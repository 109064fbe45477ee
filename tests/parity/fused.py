"""The fused graph, run eagerly behind the real runtime: what every target lowers, without the 20 seconds of lowering it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, fx

from oxfuse.compiler.fuse import Fused, cache_spec, fuse
from oxfuse.compiler.lowering.aoti import use_ops
from oxfuse.compiler.options import CompileOptions
from oxfuse.compiler.plan import Plan, make_plan
from oxfuse.models.checkpoint import Checkpoint
from oxfuse.models.virtual import virtual_model
from oxfuse.passes.fusions.build import OpsBuild
from oxfuse.runtime import CompiledModel
from oxfuse.runtime.engine import Engine

Change = Callable[[fx.GraphModule, dict[str, Tensor]], None]
"""Alters the step graph or the values of its weights: a defect."""


def plan_of(folder: Path, **options: object) -> Plan:
    return make_plan(Checkpoint.open(folder), CompileOptions(**options), {"name": folder.name})


def weight_values(plan: Plan, fused: Fused) -> dict[str, Tensor]:
    """Return every weight of the graph as the artifact would store it."""
    values = {}
    for name, weight in fused.weights.items():
        if weight.computed:
            values[name] = fused.step.get_buffer(name)
            continue
        source = plan.sources[weight.source]
        value = (source if weight.part is None else source.parts()[weight.part]).read()
        for transform in weight.transforms:
            value = transform.apply(value)
        values[name] = value.to(weight.dtype).contiguous()
    return values


def bind(step: fx.GraphModule, values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        owner, _, leaf = name.rpartition(".")
        parent = step.get_submodule(owner)
        parent._parameters.pop(leaf, None)
        parent._buffers.pop(leaf, None)
        parent.register_buffer(leaf, value)


def fused_model(
    folder: Path,
    ops: OpsBuild | None = None,
    *,
    change: Change | None = None,
    wrap: Callable[[Callable[[list[Tensor]], Tensor]], Callable[[list[Tensor]], Tensor]] | None = None,
    **options: object,
) -> CompiledModel:
    """Fuse the checkpoint and run the step graph eagerly; with `ops`, through their C++ implementations."""
    plan = plan_of(folder, **options)
    model = virtual_model(plan.contract, plan.config, plan.task, plan.dtype)
    encodings = {name: source.encoding for name, source in plan.sources.items()}
    packing = None if ops is None else plan.packing
    fused = fuse(model, encodings, requested=plan.contract.fusions, packing=packing)
    values = weight_values(plan, fused)
    if change is not None:
        change(fused.step, values)
        fused.step.recompile()
    bind(fused.step, values)
    if ops is not None:
        use_ops(fused.step, ops)

    def step(inputs: list[Tensor]) -> Tensor:
        with torch.no_grad():
            return fused.step(*inputs)

    engine = Engine(wrap(step) if wrap else step, cache_spec(fused.cache, plan.block_size, plan.dtype), plan.limits)
    return CompiledModel(engine, vocab_size=plan.config.vocab_size)
