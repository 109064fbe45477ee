"""What one compile will do: every question that the options and the checkpoint leave open, answered before any work begins."""

from __future__ import annotations

import importlib.util
import math
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from oxfuse.compiler.export import StepLimits
from oxfuse.compiler.options import BLOCK_SIZES, DTYPES, MAX_STEP_TOKENS, CompileOptions
from oxfuse.errors import UserError
from oxfuse.models.checkpoint import Checkpoint, TensorSource, tokenizer_files
from oxfuse.models.contract import ModelContract, lookup
from oxfuse.passes.fusions.isa import resolve_isa
from oxfuse.passes.pack import Packing, Precision
from oxfuse.runtime.manifest import Limits

NEAREST = {
    torch.float64: (torch.float32, torch.float16, torch.bfloat16),
    torch.float32: (torch.float32, torch.float16, torch.bfloat16),
    torch.float16: (torch.float16, torch.bfloat16, torch.float32),
    torch.bfloat16: (torch.bfloat16, torch.float32),
}
"""A checkpoint's dtype -> what to compute in, the best first."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One compile. `level` is the x86-64 level of the code, `features` the CPU flags it needs.

    `tokenizer_json` is the text of the artifact's tokenizer.json where the model's contract builds it; then the path of that name
    among `tokenizer_files` need not exist.
    """

    options: CompileOptions
    checkpoint: Checkpoint
    fingerprint: dict[str, str]
    contract: ModelContract
    config: Any
    task: str
    dtype: torch.dtype
    limits: Limits
    sources: Mapping[str, TensorSource]
    tokenizer_files: tuple[Path, ...]
    tokenizer_json: str | None
    level: str
    features: tuple[str, ...]

    @property
    def step_limits(self) -> StepLimits:
        """Return the upper bounds of the step program's dims."""
        limits = self.limits
        return StepLimits(
            tokens=limits.max_step_tokens, sequences=limits.max_batch, table=-(-limits.max_context // self.block_size)
        )

    @property
    def pooled(self) -> bool:
        """Tell whether the model answers with one row a sequence."""
        return self.contract.tasks[self.task].pooled

    @property
    def packing(self) -> Packing | None:
        """Return how weights are packed for the target, None where it reads them as they are."""
        if self.options.device != "cpu":
            return None
        return Packing(dense=cast(Precision, self.options.dense), activations=cast(Precision, self.options.activations))

    @property
    def block_size(self) -> int:
        """Return the tokens of one block of the KV cache; that of an ONNX model lies in one piece."""
        return BLOCK_SIZES.get(self.options.device, self.limits.max_context)

    def expected_bytes(self) -> int:
        """Return the bytes that the artifact's weights will have."""
        return sum(
            math.prod(source.shape) * self.dtype.itemsize
            if source.encoding == "dense"
            else sum(math.prod(part.shape) for part in source.parts().values())
            for source in self.sources.values()
        )


def make_plan(
    checkpoint: Checkpoint, options: CompileOptions, fingerprint: dict[str, str], tokenizer: str | Path | None = None
) -> Plan:
    """Return the plan. Raises UserError where the checkpoint is damaged, or is not what the options ask for."""
    if options.device == "onnx" and importlib.util.find_spec("onnx") is None:
        raise UserError(f'Target {options.target} needs the package onnx: install it with pip install "oxfuse[onnx]".')
    contract = lookup(checkpoint.config["model_type"])
    if options.experts != "exact" and "moe_dispatch" not in contract.fusions:
        raise UserError(f"experts is {options.experts!r}, but {contract.model_type} has no experts: leave it at exact.")
    config = contract.parse_config(dict(checkpoint.config))
    task = options.task or contract.task_of(checkpoint.config)
    longest = config.longest_context
    if options.max_context is not None and options.max_context > longest:
        raise UserError(f"max_context is {options.max_context}, but the model reaches {longest} tokens. Choose that or less.")
    max_context = options.max_context or config.max_position_embeddings
    config = config.for_context(max_context)
    sources = contract.sources(checkpoint, config, task)
    level, features = resolve_isa(_host_isa(options))
    found = checkpoint.tokenizer_files if tokenizer is None else tokenizer_files(Path(tokenizer))
    tokenizer_json = contract.build_tokenizer(found)
    files = _artifact_files(found, tokenizer_json)
    if tokenizer is not None and not any(path.name == "tokenizer.json" for path in files):
        raise UserError(f"{tokenizer} holds no tokenizer.json. Name a folder that does, or leave the option away.")
    return Plan(
        options=options,
        checkpoint=checkpoint,
        fingerprint=fingerprint,
        contract=contract,
        config=config,
        task=task,
        dtype=_dtype(options, contract, checkpoint),
        limits=Limits(
            max_context=max_context,
            max_batch=options.max_batch,
            # An ONNX model without a cache takes a sequence whole.
            max_step_tokens=max(MAX_STEP_TOKENS, options.max_batch, max_context if options.device == "onnx" else 0),
        ),
        sources=sources,
        tokenizer_files=files,
        tokenizer_json=tokenizer_json,
        level=level,
        features=features,
    )


def _artifact_files(found: tuple[Path, ...], tokenizer_json: str | None) -> tuple[Path, ...]:
    """Return the artifact's tokenizer files: a tokenizer.json that was built joins them, what it is built from does not."""
    kept = [path for path in found if path.name not in ("vocab.json", "merges.txt")]
    if tokenizer_json is not None and not any(path.name == "tokenizer.json" for path in kept):
        kept.insert(0, found[0].parent / "tokenizer.json")
    return tuple(kept)


def _host_isa(options: CompileOptions) -> str:
    """Return the instruction set of the code that the CPU runs. What a GPU's host does takes none: it is to run on any host."""
    portable = options.archs and options.cpu_isa == "native" and platform.machine() == "x86_64"
    return "x86-64-v3" if portable else options.cpu_isa


def _dtype(options: CompileOptions, contract: ModelContract, checkpoint: Checkpoint) -> torch.dtype:
    """Return the dtype to compile in: the one asked for, or of those that fit device and model the checkpoint's nearest."""
    if options.dtype == "auto":
        fitting = {DTYPES[name] for name in options.dtypes} - contract.refused_dtypes.keys()
        return next(near for near in NEAREST.get(checkpoint.dtype, (torch.float32, torch.bfloat16)) if near in fitting)
    dtype: torch.dtype = DTYPES[options.dtype]
    if dtype in contract.refused_dtypes:
        raise UserError(f"{contract.model_type} cannot run in {dtype}: {contract.refused_dtypes[dtype]}.")
    return dtype
