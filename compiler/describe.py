"""What an artifact says about itself: its manifest for the runtime, its report for people."""

from __future__ import annotations

import dataclasses
import hashlib
import platform
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from oxfuse import __version__
from oxfuse.compiler.artifact import folder_bytes
from oxfuse.compiler.export import StepLimits, step_signature
from oxfuse.compiler.fuse import Fused, cache_spec
from oxfuse.compiler.golden import GOLDEN
from oxfuse.compiler.plan import Plan
from oxfuse.compiler.process_memory import MemoryWatch
from oxfuse.compiler.programs import BuiltProgram, BuiltPrograms
from oxfuse.compiler.report import MemoryReport, Parity, ProgramReport, Report
from oxfuse.runtime.manifest import (
    FORMAT_VERSION,
    ONNX,
    DimRange,
    GenerationSpec,
    Limits,
    Manifest,
    ModelSpec,
    OpsLibrary,
    PassRecord,
    ProgramSpec,
    Requirements,
    TensorSpec,
    WeightFile,
)

if TYPE_CHECKING:
    from oxfuse.compiler.lowering.onnx import OnnxModel

EXPERTS = {
    "exact": "exact: the checkpoint's own values",
    "int8": "int8: weights of 8 bits in blocks of 32, which hold MXFP4 exactly; their inputs rounded to 8 bits in blocks",
    "int4": "int4: weights of 4 bits in blocks of 32, not exact; their inputs rounded to 8 bits in blocks",
}
DENSE_INT8 = {
    "onnx": "int8: embeddings and head of 8 bits in blocks of 32, the head's inputs rounded to 8 bits; all else exact",
    "cpu": "int8: weights of dense layers and untied heads of 8 bits in blocks of 32; embeddings, norms and router exact",
}
ACTIVATIONS_INT8 = "int8: what is multiplied with weights of 8 bits or fewer rounded to 8 bits in blocks of 32; all else {}"


def describe_artifact(
    plan: Plan, fused: Fused, built: BuiltPrograms, weights: WeightFile, constants: Mapping[str, str], folder: Path
) -> Manifest:
    """Return the manifest of the artifact in `folder`, all files written. `constants` maps constants to stored names."""
    dtype, ops = _name(plan.dtype), built.ops
    native = [program for program in built.programs if program.onnx is None]
    libraries = [program.lowered.folder / program.lowered.library for program in native]
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
            pooling="rightmost" if plan.pooled else "none",
            labels=_labels(plan),
            problem_type=plan.config.problem_type,
            config=plan.config.to_dict(),
        ),
        generation=generation_of(plan),
        programs=tuple(_program_spec(program, plan, fused, constants, folder) for program in built.programs),
        ops_library=None
        if ops is None
        else OpsLibrary(path=ops.path.relative_to(folder).as_posix(), probe=min(ops.names.values()), sha256=_sha256(ops.path)),
        cache=cache_spec(fused.cache, plan.block_size, plan.dtype),
        limits=plan.limits,
        requirements=Requirements(
            torch=".".join(torch.__version__.split(".")[:2]) if native else "",
            platform=sys.platform if native else "",
            machine=platform.machine() if native else "",
            cpu_isa=plan.level if native else "",
            cpu_features=plan.features if native else (),
            glibc=_glibc_needed([*libraries, *([] if ops is None else [ops.path])]),
            gpu_archs=tuple(f"sm_{arch}" for arch in plan.options.archs),
        ),
        weights=(weights,),
        passes=tuple(PassRecord(name=p.name, count=p.count, checked=p.checked, max_error=p.max_error) for p in fused.passes),
        numerics={
            "activations": _activations(plan, dtype, bool(native)),
            "experts": EXPERTS[plan.options.experts],
            "dense": f"exact: {dtype}" if plan.options.dense == "exact" else DENSE_INT8[plan.options.device],
            "cache": dtype,
        },
        tokenizer_files={path.name: _sha256(folder / path.name) for path in plan.tokenizer_files},
        golden=GOLDEN,
    )


def _activations(plan: Plan, dtype: str, native: bool) -> str:
    if plan.options.activations == "int8":
        return ACTIVATIONS_INT8.format(dtype)
    return f"exact: {dtype}, float32 inside fused ops" if native else f"exact: {dtype}"


def _program_spec(built: BuiltProgram, plan: Plan, fused: Fused, constants: Mapping[str, str], folder: Path) -> ProgramSpec:
    lowered = built.lowered
    if built.onnx is not None:
        inputs, outputs, dims = onnx_signature(built.onnx, built.limits, plan.limits)
    else:
        inputs, outputs, dims = step_signature(
            fused.cache, block_size=plan.block_size, dtype=plan.dtype, width=fused.width, limits=built.limits
        )
    return ProgramSpec(
        name=built.name,
        target=built.target,
        kind="aoti" if built.onnx is None else ONNX,
        path=lowered.folder.relative_to(folder).as_posix(),
        library=lowered.library,
        inputs=inputs,
        outputs=outputs,
        dims=dims,
        constants={name: constants[name] for name in lowered.constants},
        files={path.name: _sha256(path) for path in built.files},
    )


def onnx_signature(
    model: OnnxModel, limits: StepLimits, bounds: Limits
) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...], dict[str, DimRange]]:
    """Return inputs, outputs and dims of an ONNX model as the manifest states them."""
    from oxfuse.passes.onnx_graph import DTYPES  # onnx is for its targets alone

    names = {onnx_type: _name(dtype) for dtype, onnx_type in DTYPES.items()}

    def spec(value: Any) -> TensorSpec:
        tensor = value.type.tensor_type
        return TensorSpec(
            name=value.name,
            dtype=names[tensor.elem_type],
            shape=tuple(dim.dim_param or dim.dim_value for dim in tensor.shape.dim),
        )

    inputs, outputs = (tuple(spec(value) for value in values) for values in (model.inputs, model.outputs))
    used = {size for value in (*inputs, *outputs) for size in value.shape if isinstance(size, str)}
    most = {"batch_size": limits.sequences, "past_sequence_length": bounds.max_context - 1}
    least = {"past_sequence_length": 0}
    dims = {name: DimRange(min=least.get(name, 1), max=most.get(name, bounds.max_context)) for name in sorted(used)}
    return inputs, outputs, dims


def _labels(plan: Plan) -> tuple[str, ...]:
    """Return the names of what a classifier tells apart."""
    return tuple(plan.config.id2label.values()) if plan.task in ("text-classification", "token-classification") else ()


def generation_of(plan: Plan) -> GenerationSpec:
    """Return the end-of-text tokens: those of generation_config.json before those of config.json."""

    def ids(name: str) -> tuple[int, ...]:
        value = plan.checkpoint.generation_config.get(name, getattr(plan.config, name, None))
        return () if value is None else (value,) if isinstance(value, int) else tuple(value)

    single = {name: next(iter(ids(name)), None) for name in ("bos_token_id", "pad_token_id")}
    return GenerationSpec(eos_token_ids=ids("eos_token_id"), **single)


def report_of(
    manifest: Manifest,
    folder: Path,
    built: BuiltPrograms,
    seconds: dict[str, float],
    parity: Parity,
    watch: MemoryWatch,
    notes: tuple[str, ...] = (),
) -> Report:
    """Return the report of a finished artifact; `seconds` is wall time by phase."""
    code = sum(path.stat().st_size for program in built.programs for path in program.files if program.onnx is not None)
    code += folder_bytes(folder / "programs")
    weights = sum(w.bytes for w in manifest.weights)
    return Report(
        name=manifest.name,
        created_by=manifest.created_by,
        source=manifest.source,
        model=dataclasses.replace(manifest.model, config={}),
        limits=manifest.limits,
        programs=tuple(
            ProgramReport(
                name=program.name,
                target=program.target,
                bytes=sum(path.stat().st_size for path in program.files),
                ops=program.calls,
                anatomy=None if program.anatomy is None else program.anatomy.to_json(),
            )
            for program in built.programs
        ),
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
