"""What an artifact says about itself: its manifest for the runtime, its report for people."""

from __future__ import annotations

import dataclasses
import hashlib
import platform
import re
import sys
from collections.abc import Mapping
from pathlib import Path

import torch

from oxfuse import __version__
from oxfuse.compiler.artifact import folder_bytes
from oxfuse.compiler.export import step_signature
from oxfuse.compiler.fuse import Fused, cache_spec
from oxfuse.compiler.golden import GOLDEN
from oxfuse.compiler.lowering.aoti import Lowered
from oxfuse.compiler.options import BLOCK_SIZE
from oxfuse.compiler.plan import Plan
from oxfuse.compiler.process_memory import MemoryWatch
from oxfuse.compiler.report import MemoryReport, Parity, ProgramReport, Report
from oxfuse.passes.fusions.build import OpsBuild
from oxfuse.runtime.manifest import (
    FORMAT_VERSION,
    GenerationSpec,
    Manifest,
    ModelSpec,
    OpsLibrary,
    PassRecord,
    ProgramSpec,
    Requirements,
    WeightFile,
)


def describe_artifact(
    plan: Plan, fused: Fused, lowered: Lowered, ops: OpsBuild, weights: WeightFile, constants: Mapping[str, str], folder: Path
) -> Manifest:
    """Return the manifest of the artifact in `folder`, all files written. `constants` maps constants to stored names."""
    inputs, outputs, dims = step_signature(
        fused.cache, block_size=BLOCK_SIZE, dtype=plan.dtype, width=fused.width, limits=plan.step_limits
    )
    dtype = _name(plan.dtype)
    program = ProgramSpec(
        name="step",
        target="cpu",
        kind="aoti",
        path=lowered.folder.relative_to(folder).as_posix(),
        library=lowered.library,
        inputs=inputs,
        outputs=outputs,
        dims=dims,
        constants=dict(constants),
        files={path.name: _sha256(path) for path in sorted(lowered.folder.iterdir())},
    )
    return Manifest(
        format_version=FORMAT_VERSION,
        name=plan.fingerprint["name"],
        created_by={"oxfuse": __version__, "torch": torch.__version__, "python": platform.python_version()},
        source=plan.fingerprint,
        model=ModelSpec(
            model_type=plan.contract.model_type,
            task=plan.task,
            dtype=dtype,
            vocab_size=plan.config.vocab_size,
            pooling="rightmost" if plan.contract.tasks[plan.task].pooled else "none",
            labels=_labels(plan),
            problem_type=plan.config.problem_type,
            config=plan.config.to_dict(),
        ),
        generation=_generation(plan),
        programs=(program,),
        ops_library=OpsLibrary(
            path=ops.path.relative_to(folder).as_posix(), probe=min(ops.names.values()), sha256=_sha256(ops.path)
        ),
        cache=cache_spec(fused.cache, plan.dtype),
        limits=plan.limits,
        requirements=Requirements(
            torch=".".join(torch.__version__.split(".")[:2]),
            platform=sys.platform,
            machine=platform.machine(),
            cpu_isa=plan.level,
            cpu_features=plan.features,
            glibc=_glibc_needed([ops.path, lowered.folder / lowered.library]),
        ),
        weights=(weights,),
        passes=tuple(PassRecord(name=p.name, count=p.count, checked=p.checked, max_error=p.max_error) for p in fused.passes),
        numerics={
            "activations": f"exact: {dtype}, float32 inside fused ops",
            "experts": "exact: the checkpoint's own values",
            "dense": f"exact: {dtype}",
            "cache": dtype,
        },
        tokenizer_files={path.name: _sha256(folder / path.name) for path in plan.tokenizer_files},
        golden=GOLDEN,
    )


def _labels(plan: Plan) -> tuple[str, ...]:
    """Return the names of what a classifier tells apart."""
    return tuple(plan.config.id2label.values()) if plan.task in ("text-classification", "token-classification") else ()


def _generation(plan: Plan) -> GenerationSpec:
    """Return the end-of-text tokens: those of generation_config.json before those of config.json."""

    def ids(name: str) -> tuple[int, ...]:
        value = plan.checkpoint.generation_config.get(name, getattr(plan.config, name, None))
        return () if value is None else (value,) if isinstance(value, int) else tuple(value)

    single = {name: next(iter(ids(name)), None) for name in ("bos_token_id", "pad_token_id")}
    return GenerationSpec(eos_token_ids=ids("eos_token_id"), **single)


def report_of(
    manifest: Manifest,
    folder: Path,
    calls: dict[str, int],
    seconds: dict[str, float],
    parity: Parity,
    watch: MemoryWatch,
    notes: tuple[str, ...] = (),
) -> Report:
    """Return the report of a finished artifact; `calls` counts the program's ops, `seconds` is wall time by phase."""
    (spec,) = manifest.programs
    code = folder_bytes(folder / "programs")
    weights = sum(w.bytes for w in manifest.weights)
    return Report(
        name=manifest.name,
        created_by=manifest.created_by,
        source=manifest.source,
        model=dataclasses.replace(manifest.model, config={}),
        limits=manifest.limits,
        programs=(ProgramReport(name=spec.name, target=spec.target, bytes=code, ops=calls),),
        sizes={"programs": code, "weights": weights, "other": folder_bytes(folder) - code - weights},
        passes=manifest.passes,
        seconds=seconds,
        memory=MemoryReport(anonymous_and_shared=watch.peak.unavoidable, file_backed=watch.peak_file) if watch.samples else None,
        parity=parity,
        numerics=manifest.numerics,
        requirements=manifest.requirements,
        notes=notes,
    )


def _glibc_needed(libraries: list[Path]) -> str:
    """Return the newest glibc whose symbols the libraries ask for, or "" if none does."""
    found = {tuple(map(int, v.split(b"."))) for path in libraries for v in re.findall(rb"GLIBC_(\d+\.\d+)", path.read_bytes())}
    return ".".join(map(str, max(found))) if found else ""


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
