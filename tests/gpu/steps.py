"""The 20b shape in full depth on the GPU: programs that were compiled elsewhere, weights made on the device, contexts made up.

The engine is the runtime's own (`device_engine`), but for the file of weights. Sequences of any length get their blocks as if
their tokens had been run; what lies in the caches are random numbers, since times do not depend on it.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from oxfuse.compiler.bench.cost import Cost, cost_of
from oxfuse.models.contract import lookup
from oxfuse.models.virtual import virtual_model
from oxfuse.runtime import device_load
from oxfuse.runtime.artifact import choose_programs
from oxfuse.runtime.cuda import Cuda
from oxfuse.runtime.engine import Engine
from oxfuse.runtime.gpus import choose_gpu, find_gpus
from oxfuse.runtime.graphs import GraphDevice
from oxfuse.runtime.host import check_host
from oxfuse.runtime.manifest import Manifest, read_manifest
from oxfuse.runtime.sequence import Feed, TokenSequence
from oxfuse.runtime.upload import WeightLayout

from .lab import Lab, median, times
from .made import build
from .seeded import seeded_checkpoint, shape_20b
from .ship import FULL, SHIPPED, origin, recipe_of

LAYERS = 24
BUILD_SECONDS = 200.0
"""What it is believed to take to compile all layers here, where no programs are shipped that fit."""


def shipped_fits() -> bool:
    """Tell whether programs of all layers lie in the tree that were built for the torch of this machine."""
    import importlib.metadata

    about = origin()
    if about is None or FULL not in about.layers:
        return False
    return about.torch.split(".")[:2] == importlib.metadata.version("torch").split(".")[:2]


def programs_of_all_layers(lab: Lab) -> Path:
    """Return the folder of manifest and programs in full depth: the shipped one, or one that is built here."""
    if shipped_fits():
        return SHIPPED / FULL
    folder = lab.work / FULL
    if not (folder / "manifest.json").exists():
        build(recipe_of(LAYERS, lab.arch), folder, weights=False, device="cuda")
    return folder


def device_weights(manifest: Manifest, device: torch.device) -> dict[str, Tensor]:
    """Return the weights that a manifest of a seeded checkpoint names, made on the device.

    Raises ValueError where one has a recipe: then it is not the checkpoint's tensor.
    """
    config = shape_20b(manifest.model.config["num_hidden_layers"])
    sources = seeded_checkpoint(config, int(manifest.source["seed"]), device, stay=True).tensors
    contract = lookup(manifest.model.model_type)
    parsed = contract.parse_config(dict(config)).for_context(manifest.limits.max_context)
    computed = dict(virtual_model(contract, parsed, manifest.model.task, torch.bfloat16).named_buffers())
    found = {}
    for name, tensor in manifest.weights[0].tensors.items():
        if tensor.layout:
            raise ValueError(f"{name} is made by {', '.join(tensor.layout)}: the report knows tensors as they are only.")
        source = sources.get(tensor.source)
        found[name] = source.read() if source is not None else computed[tensor.source].to(device)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return found


def made_engine(folder: Path, manifest: Manifest, weights: dict[str, Tensor], *, max_context: int, max_batch: int) -> Engine:
    """Return the runtime's engine for the programs in `folder` with weights that lie on the device, and smaller limits."""
    gpus = find_gpus()
    check_host(manifest.requirements, gpus)
    limits = dataclasses.replace(manifest.limits, max_context=max_context, max_batch=max_batch)
    gpu = choose_gpu(manifest.requirements.gpu_archs, None, gpus, torch.cuda.current_device())
    programs = choose_programs(manifest, f"cuda:{gpu.arch}")
    layout = WeightLayout(places={}, bytes=0)  # they are there: what is free is free of them
    with (
        mock.patch.object(device_load, "lay_out", lambda *args: layout),
        mock.patch.object(device_load, "upload_weights", lambda *args: weights),
    ):
        return device_load.device_engine(folder, dataclasses.replace(manifest, limits=limits), programs, Cuda(gpu))


@dataclass(frozen=True, kw_only=True)
class Full:
    """The model in full depth, ready to run."""

    folder: Path
    manifest: Manifest
    weights: dict[str, Tensor]
    engine: Engine
    cost: Cost

    @property
    def device(self) -> GraphDevice:
        """Return the engine's device."""
        assert isinstance(self.engine.device, GraphDevice)
        return self.engine.device

    def token_bytes(self, batch: int, context: int) -> float:
        """Return the bytes that a decode must read at the least: of the experts those that random choices hit."""
        hit = 1 - (1 - self.cost.share) ** batch
        return self.cost.dense_bytes + hit * self.cost.experts_bytes + batch * self.cost._cache_bytes(context)


def full_model(lab: Lab) -> Full:
    """Return the model in full depth, made once in a process, caches filled with random numbers."""
    if "full" not in lab.kept:
        folder = programs_of_all_layers(lab)
        manifest = read_manifest(folder)
        weights = device_weights(manifest, lab.device)
        limits = manifest.limits
        engine = made_engine(folder, manifest, weights, max_context=limits.max_context, max_batch=limits.max_batch)
        for cache in engine.caches:
            cache.normal_()
        torch.cuda.synchronize()
        lab.kept["full"] = Full(folder=folder, manifest=manifest, weights=weights, engine=engine, cost=cost_of(manifest))
    full: Full = lab.kept["full"]
    return full


def with_context(full: Full, batch: int, context: int) -> list[TokenSequence]:
    """Return sequences whose first `context` tokens count as run, and one more that is pending."""
    engine, generator = full.engine, torch.Generator().manual_seed(batch)
    sequences = []
    for _ in range(batch):
        sequence = engine.sequence()
        sequence.append(torch.randint(0, full.manifest.model.vocab_size, (context + 1,), generator=generator).tolist())
        while sequence.cached < context:
            count = min(engine.chunk, context - sequence.cached)
            if not engine.secure(sequence, count):
                raise RuntimeError(f"The caches do not hold {batch} sequences of {context} tokens.")
            sequence.cached += count
            engine._free_old(sequence)
        sequences.append(sequence)
    return sequences


def decode_step(full: Full, sequences: Sequence[TokenSequence]) -> float:
    """Run one greedy decode of all sequences as a generation does; return its seconds."""
    began = time.perf_counter()
    for sequence in sequences:
        if not full.engine.secure(sequence, 1):
            raise RuntimeError("The caches are full.")
    answers = full.engine.run([Feed(sequence=sequence, count=1, greedy=True) for sequence in sequences])
    for sequence, answer in zip(sequences, answers, strict=True):
        best = answer[-1]
        assert not isinstance(best, Tensor)
        sequence.append([best.token])
    return time.perf_counter() - began


def release(full: Full, sequences: Sequence[TokenSequence]) -> None:
    """Give the sequences' blocks back."""
    for sequence in sequences:
        full.engine.release(sequence)


@dataclass(frozen=True, kw_only=True)
class DecodeTime:
    """Seconds of a decode step: `wall` with all that the host does, `gpu` of the recorded graph alone."""

    wall: float
    gpu: float


def time_decode(full: Full, batch: int, context: int, steps: int = 20) -> DecodeTime:
    """Return the medians over `steps` decodes."""
    sequences = with_context(full, batch, context)
    try:
        for _ in range(4):
            decode_step(full, sequences)
        wall = median([decode_step(full, sequences) for _ in range(steps)])
        assert full.device._last is not None
        bucket, _ = full.device._last
        assert bucket.graph is not None
        with full.device.accelerator.active():
            gpu = median(times([bucket.graph.replay], rounds=12))
    finally:
        release(full, sequences)
    return DecodeTime(wall=wall, gpu=gpu)


def prefill_once(full: Full, tokens: int) -> float:
    """Run a prompt of so many tokens in chunks; return the seconds until its first token is known."""
    engine, sequence = full.engine, full.engine.sequence()
    ids = torch.randint(0, full.manifest.model.vocab_size, (tokens,), generator=torch.Generator().manual_seed(tokens))
    sequence.append(ids.tolist())
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    began = time.perf_counter()
    while sequence.pending:
        count = min(sequence.pending, engine.chunk)
        if not engine.secure(sequence, count):
            raise RuntimeError("The caches are full.")
        engine.run([Feed(sequence=sequence, count=count, greedy=True)])
    seconds = time.perf_counter() - began
    engine.release(sequence)
    return seconds


def time_prefill(full: Full, tokens: int, rounds: int = 5) -> float:
    """Return the median seconds of a prefill."""
    for _ in range(2):
        prefill_once(full, tokens)
    return median([prefill_once(full, tokens) for _ in range(rounds)])
