"""`oxfuse.compile`: one checkpoint, one artifact.

The road of DESIGN: read the checkpoint's names, export the reference, fuse, insert the cache, lower, stream the weights, run the
oracle, write manifest and report, measure the result. Everything happens in a folder that becomes the artifact in one step.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import nn

from oxfuse.compiler.artifact import ArtifactWriter
from oxfuse.compiler.describe import describe_artifact, report_of
from oxfuse.compiler.export import export_step
from oxfuse.compiler.fuse import Fused, fuse
from oxfuse.compiler.golden import GOLDEN, write_golden
from oxfuse.compiler.lowering.aoti import lower, use_ops
from oxfuse.compiler.measure import measure
from oxfuse.compiler.options import BLOCK_SIZE, CompileOptions
from oxfuse.compiler.phases import Phases, Progress, silent
from oxfuse.compiler.plan import Plan, make_plan
from oxfuse.compiler.process_memory import MemoryWatch
from oxfuse.compiler.report import Parity, write_report
from oxfuse.compiler.source import open_source
from oxfuse.compiler.weight_file import entry_of, write_weights
from oxfuse.errors import UserError
from oxfuse.models.tensor_source import MemoryTensor
from oxfuse.models.virtual import virtual_model
from oxfuse.passes.dump import GraphDumps, op_counts
from oxfuse.passes.fusions.build import build_ops, cpu_kernels, load_ops
from oxfuse.runtime.manifest import MANIFEST, Manifest, WeightFile

PROGRAMS = "programs/cpu"
WEIGHTS = "weights.safetensors"


def compile(
    source: str | Path | nn.Module,
    output: str | Path,
    *,
    target: str = "cpu",
    dtype: str = "auto",
    task: str | None = None,
    max_context: int | None = None,
    max_batch: int = 8,
    tokenizer: str | Path | None = None,
    force: bool = False,
    dump_graphs: str | Path | None = None,
    progress: Progress = silent,
    **policy: Any,
) -> Path:
    """Compile a checkpoint into an artifact and return the artifact's folder.

    source: a folder or a hub id `org/name[@revision]`. output: the artifact's place; it may exist when empty, or with `force`.
    dtype: "float32", "bfloat16" or "auto" (the checkpoint's own; float16 becomes bfloat16) of activations, cache and
    unquantised weights. task: inferred from the checkpoint's architecture. max_context: longest sequence in tokens, the model's
    own by default. max_batch: most sequences in one step. tokenizer: a folder with tokenizer files, the source's by default.
    dump_graphs: a folder for the graph after every pass. policy: see `CompileOptions`.

    Raises UserError for anything the caller can put right; then nothing is left behind.
    """
    if unknown := sorted(set(policy) - {field.name for field in dataclasses.fields(CompileOptions)}):
        raise UserError(f"unknown option {', '.join(unknown)}; policies: experts, activations, dense, cpu_isa, provider.")
    options = CompileOptions(target=target, dtype=dtype, task=task, max_context=max_context, max_batch=max_batch, **policy)
    phases = Phases(progress=progress)
    with phases("read checkpoint"):
        checkpoint, fingerprint = open_source(source)
        plan = make_plan(checkpoint, options, fingerprint, tokenizer)
    writer = ArtifactWriter(Path(output), force=force, checkpoint=checkpoint.folder, expected_bytes=plan.expected_bytes())
    with writer as folder:
        dumps = _dumps(dump_graphs, Path(output), checkpoint.folder) if dump_graphs is not None else None
        with MemoryWatch() as watch:
            manifest, calls, parity = _build(plan, folder, phases, dumps)
        write_report(folder, report_of(manifest, folder, calls, phases.seconds, parity, watch))
    return writer.output


def _dumps(folder: str | Path, output: Path, checkpoint: Path | None) -> GraphDumps:
    """Return the writer of dumps. Raises UserError where `folder` lies in checkpoint or artifact, or cannot be made."""
    place = Path(folder).expanduser().resolve()
    for other, what in ((output, "the artifact, which is written whole or not at all"), (checkpoint, "the checkpoint")):
        if other is not None and place.is_relative_to(other.expanduser().resolve()):
            raise UserError(f"The graphs cannot be written to {folder}: it lies in {what}. Name another folder.")
    return GraphDumps(place)


def _build(plan: Plan, folder: Path, phases: Phases, dumps: GraphDumps | None) -> tuple[Manifest, dict[str, int], Parity]:
    """Fill the artifact's folder but for the report; return the manifest, how often the program calls each op, and its error."""
    programs = folder / PROGRAMS
    programs.mkdir(parents=True)
    with ThreadPoolExecutor(1) as pool:  # g++ works in a process of its own while this one exports
        building = pool.submit(build_ops, cpu_kernels(), plan.level, programs / "oxfuse_ops.so")
        with phases("export and fuse"):
            fused = _fuse(plan, dumps)
            program = export_step(fused.step, fused.cache, block_size=BLOCK_SIZE, dtype=plan.dtype, limits=plan.step_limits)
            if dumps is not None:
                dumps("step", program.module(check_guards=False))
        with phases("build C++ ops"):
            ops = building.result()
            load_ops(ops)
            calls = op_counts(program.graph)
            use_ops(program.graph_module, ops)
    with phases("compile program"):
        lowered = lower(program, programs / "step", plan.level)
    constants = {name: fused.stored_name(name) for name in lowered.constants}
    with phases("write weights") as report:
        weights = _write_weights(plan, fused, constants, folder / WEIGHTS, report)
    with phases("run oracle"):
        write_golden(
            folder / GOLDEN,
            contract=plan.contract,
            config=plan.config,
            task=plan.task,
            sources=plan.sources,
            max_context=plan.limits.max_context,
        )
    for path in plan.tokenizer_files:
        if path.name == "tokenizer.json" and plan.tokenizer_json is not None:
            (folder / path.name).write_text(plan.tokenizer_json, "utf-8")
        else:
            shutil.copyfile(path, folder / path.name)
    manifest = describe_artifact(plan, fused, lowered, ops, weights, constants, folder)
    (folder / MANIFEST).write_text(manifest.to_json(), "utf-8")
    with phases("measure artifact"):
        parity = measure(folder)
    return manifest, calls, parity


def _fuse(plan: Plan, dumps: GraphDumps | None) -> Fused:
    model = virtual_model(plan.contract, plan.config, plan.task, plan.dtype)
    encodings = {name: source.encoding for name, source in plan.sources.items()}
    return fuse(model, encodings, requested=plan.contract.fusions, observe=dumps)


def _write_weights(
    plan: Plan, fused: Fused, constants: dict[str, str], path: Path, report: Callable[[float], None]
) -> WeightFile:
    """Stream every weight that the program reads into the weight file; names of one tensor share it."""
    entries = {}
    for name, stored in constants.items():
        weight = fused.weights[name]
        if weight.computed:
            value = fused.step.get_buffer(name)
            entries[stored] = entry_of(weight, MemoryTensor(name=name, shape=tuple(value.shape), dtype=value.dtype, tensor=value))
        else:
            source = plan.sources[weight.source]
            entries[stored] = entry_of(weight, source if weight.part is None else source.parts()[weight.part])
    total, done = max(1, sum(entry.nbytes for entry in entries.values())), 0

    def progress(count: int) -> None:
        nonlocal done
        done += count
        report(done / total)

    return write_weights(path, entries, progress)
