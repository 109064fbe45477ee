"""Prepares, beside the report, what its artifact sections need: weights from the seed, an artifact built here, its golden logits.

    python tests/gpu native WORK

Steps are told one by one in WORK/native.json, so that what is ready can be used, and what failed is known.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .ship import FEW, SHIPPED, origin, recipe_of
from .worker import tail_of

if TYPE_CHECKING:
    from .made import Recipe

STATE = "native.json"
FEW_LAYERS = 4
"""Of an artifact where none is shipped."""
NATIVE, JOINED, WEIGHT_FILE = "native", "shipped", "made.safetensors"


@dataclass
class State:
    """What is done, by step: its seconds, and what it found; or its error. `ended` once nothing more comes."""

    done: dict[str, dict[str, Any]] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    ended: bool = False

    @classmethod
    def read(cls, work: Path) -> State:
        """Return the state in `work`, an empty one before the first step."""
        try:
            return cls(**json.loads((work / STATE).read_text("utf-8")))
        except FileNotFoundError:
            return cls()

    def write(self, work: Path) -> None:
        """Put the state in the place of the old one."""
        partial = work / f".{STATE}"
        partial.write_text(json.dumps(dataclasses.asdict(self)), "utf-8")
        partial.replace(work / STATE)


def main(arguments: Sequence[str]) -> int:
    """Do all steps that can be done."""
    work, state = Path(arguments[0]), State()

    def step(name: str, do: Callable[[], dict[str, Any]]) -> bool:
        began = time.monotonic()
        try:
            state.done[name] = {**do(), "seconds": time.monotonic() - began}
        except Exception as error:
            state.errors[name] = tail_of(error)
        state.write(work)
        return name in state.done

    shipped = origin()
    layers = shipped.layers[FEW] if shipped is not None else FEW_LAYERS
    recipe = recipe_of(layers, _arch(), shipped.seed if shipped is not None else 0)
    if shipped is not None and step("weights", lambda: _weights(recipe, work)):
        step("join", lambda: _join(work))
    if step("programs", lambda: _programs(recipe, work)):
        step("golden", lambda: _golden(recipe, work))
    state.ended = True
    state.write(work)
    return 0


def _arch() -> int:
    import torch

    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def _weights(recipe: Recipe, work: Path) -> dict[str, Any]:
    """Make the shipped artifact's weight file, and compare all that its manifest says of it."""
    from oxfuse.runtime.manifest import read_manifest

    from .made import make_weights

    manifest = read_manifest(SHIPPED / FEW)
    file = make_weights(recipe, manifest, work / WEIGHT_FILE, "cuda")
    hashed = sum(bool(tensor.sha256) for tensor in manifest.weights[0].tensors.values())
    return {"bytes": file.bytes, "tensors": len(file.tensors), "hashed": hashed, "header": file.header_sha256}


def _join(work: Path) -> dict[str, Any]:
    from .made import join

    manifest = join(SHIPPED / FEW, work / WEIGHT_FILE, work / JOINED)
    return {"torch": manifest.created_by["torch"]}


def _programs(recipe: Recipe, work: Path) -> dict[str, Any]:
    """Build the artifact here. Its weights are those made before, if there are any: same seed, same transforms."""
    from .made import WEIGHTS, build

    ready = (work / WEIGHT_FILE).exists()
    manifest = build(recipe, work / NATIVE, device="cuda", weights=not ready)
    if ready:
        os.link(work / WEIGHT_FILE, work / NATIVE / WEIGHTS)
    return {"torch": manifest.created_by["torch"], "header": manifest.weights[0].header_sha256}


def _golden(recipe: Recipe, work: Path) -> dict[str, Any]:
    """Run the float32 oracle on the CPU."""
    from oxfuse.compiler.golden import GOLDEN, write_golden

    plan = recipe.plan("cuda")
    write_golden(
        work / GOLDEN,
        contract=plan.contract,
        config=plan.config,
        task=plan.task,
        sources=plan.sources,
        max_context=plan.limits.max_context,
    )
    return {}
