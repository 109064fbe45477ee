"""Artifacts of seeded checkpoints: made in parts, so that programs and weights may come from different machines.

`build` does what `oxfuse.compile` does, with the compiler's own plan, passes, lowering, writer and manifest, but for the golden
logits: weights are written, or only described. A program-only folder and a weight file of the same seed make an artifact where
the file's header has the hash that the manifest states.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oxfuse.compiler.describe import describe_artifact
from oxfuse.compiler.fuse import Fused, fuse
from oxfuse.compiler.options import CompileOptions
from oxfuse.compiler.phases import Phases
from oxfuse.compiler.plan import Plan, make_plan
from oxfuse.compiler.programs import build_programs
from oxfuse.compiler.weight_file import WeightEntry, _header, entry_of, write_weights
from oxfuse.models.tensor_source import MemoryTensor
from oxfuse.models.virtual import virtual_model
from oxfuse.runtime.manifest import MANIFEST, Manifest, WeightFile, WeightTensor, read_manifest

from .seeded import seeded_checkpoint

WEIGHTS = "weights.safetensors"
HASHED_BYTES = 1 << 22
"""Where weights are only described, tensors up to this size are hashed all the same: enough to tell one seed from another."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What an artifact is made of: the model's config.json, the seed of its weights, and the options of the compile."""

    config: Mapping[str, Any]
    target: str
    max_context: int
    max_batch: int
    seed: int = 0

    def plan(self, device: torch.device | str = "cpu") -> Plan:
        """Return the plan of the compile; weights are made on `device` and read on the CPU."""
        options = CompileOptions(target=self.target, max_context=self.max_context, max_batch=self.max_batch)
        source = {"kind": "seed", "name": f"seeded-{self.config['num_hidden_layers']}-layers", "seed": str(self.seed)}
        return make_plan(seeded_checkpoint(self.config, self.seed, device), options, source)


def fuse_plan(plan: Plan) -> Fused:
    """Return the fused step module, as the pipeline makes it."""
    model = virtual_model(plan.contract, plan.config, plan.task, plan.dtype)
    encodings = {name: source.encoding for name, source in plan.sources.items()}
    return fuse(model, encodings, requested=plan.contract.fusions, packing=plan.packing)


def weight_entries(plan: Plan, fused: Fused, constants: Mapping[str, str]) -> dict[str, WeightEntry]:
    """Return what the weight file holds for the programs' constants, a mapping to stored names."""
    entries = {}
    for name, stored in constants.items():
        weight = fused.weights[name]
        if weight.computed:
            value = fused.step.get_buffer(name)
            held = MemoryTensor(name=name, shape=tuple(value.shape), dtype=value.dtype, tensor=value)
            entries[stored] = entry_of(weight, held)
        else:
            source = plan.sources[weight.source]
            entries[stored] = entry_of(weight, source if weight.part is None else source.parts()[weight.part])
    return entries


def describe_weights(entries: Mapping[str, WeightEntry]) -> WeightFile:
    """Return what `write_weights` would, without a file; large tensors have no hash."""
    header, order = _header(entries)
    tensors = {}
    for name in order:
        entry, digest = entries[name], hashlib.sha256()
        if entry.nbytes <= HASHED_BYTES:
            for chunk in entry.chunks():
                digest.update(_bytes(chunk.to(entry.dtype)))
        tensors[name] = WeightTensor(
            dtype=str(entry.dtype).removeprefix("torch."),
            shape=entry.shape,
            source=entry.source,
            layout=entry.layout,
            sha256=digest.hexdigest() if entry.nbytes <= HASHED_BYTES else "",
        )
    total = len(header) + sum(entry.nbytes for entry in entries.values())
    return WeightFile(path=WEIGHTS, bytes=total, header_sha256=hashlib.sha256(header).hexdigest(), tensors=tensors)


def _bytes(tensor: Tensor) -> memoryview:
    data: memoryview = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
    return data


def build(recipe: Recipe, folder: Path, *, device: torch.device | str = "cpu", weights: bool = True) -> Manifest:
    """Make an artifact in `folder`, which is made, without golden logits; `weights`: whether its file is written."""
    plan = recipe.plan(device)
    folder.mkdir(parents=True)
    fused, built = build_programs(plan, lambda: fuse_plan(plan), folder / "programs", Phases(), None)
    constants = {name: fused.stored_name(name) for name in built.constants}
    entries = weight_entries(plan, fused, constants)
    file = write_weights(folder / WEIGHTS, entries) if weights else describe_weights(entries)
    manifest = dataclasses.replace(describe_artifact(plan, fused, built, file, constants, folder), golden=None)
    (folder / MANIFEST).write_text(manifest.to_json(), "utf-8")
    return manifest


def make_weights(recipe: Recipe, manifest: Manifest, path: Path, device: torch.device | str = "cpu") -> WeightFile:
    """Write the weight file of an artifact that was built elsewhere from `recipe`, through the same transforms.

    Raises ValueError where it is not the file that `manifest` describes.
    """
    plan = recipe.plan(device)
    constants = {name: stored for program in manifest.programs for name, stored in program.constants.items()}
    file = write_weights(path, weight_entries(plan, fuse_plan(plan), dict(sorted(constants.items()))))
    if problems := differences(manifest.weights[0], file):
        raise ValueError(f"{path} is not the file of the manifest: {'; '.join(problems[:5])}")
    return file


def differences(stated: WeightFile, made: WeightFile) -> list[str]:
    """Return what of a weight file is not as the manifest states it; tensors for which it has no hash are passed over."""
    found = []
    if made.header_sha256 != stated.header_sha256:
        found.append(f"header {made.header_sha256[:16]}, stated {stated.header_sha256[:16]}")
    found += [f"one of them lacks {name}" for name in sorted(made.tensors.keys() ^ stated.tensors.keys())]
    for name in sorted(made.tensors.keys() & stated.tensors.keys()):
        hashes = made.tensors[name].sha256, stated.tensors[name].sha256
        if all(hashes) and hashes[0] != hashes[1]:
            found.append(f"{name} {hashes[0][:16]}, stated {hashes[1][:16]}")
    return found


def join(programs: Path, weights: Path, folder: Path) -> Manifest:
    """Make an artifact in `folder` of a program-only folder and a weight file, which is linked; return its manifest."""
    for path in sorted(programs.rglob("*")):
        target = folder / path.relative_to(programs)
        if path.is_dir():
            target.mkdir(parents=True, exist_ok=True)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    try:
        os.link(weights, folder / WEIGHTS)
    except OSError:  # another file system
        (folder / WEIGHTS).symlink_to(weights)
    return read_manifest(folder)
