"""`oxfuse.compile`: one checkpoint, one artifact.

The road of DESIGN: read the checkpoint's names, export the reference, fuse, insert the cache, lower, stream the weights, run the
oracle, write manifest and report, measure the result. Everything happens in a folder that becomes the artifact in one step.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn

from oxfuse.compiler.artifact import ArtifactWriter
from oxfuse.compiler.describe import describe_artifact, generation_of, report_of
from oxfuse.compiler.example import check_example, write_example
from oxfuse.compiler.export import export_reference
from oxfuse.compiler.fuse import Fused, fuse
from oxfuse.compiler.golden import GOLDEN, write_golden
from oxfuse.compiler.live import check_module, open_module
from oxfuse.compiler.measure import measure
from oxfuse.compiler.options import CompileOptions
from oxfuse.compiler.phases import Phases, Progress, silent
from oxfuse.compiler.plan import Plan, make_plan
from oxfuse.compiler.process_memory import MemoryWatch
from oxfuse.compiler.programs import BuiltPrograms, build_programs
from oxfuse.compiler.quantised import Quantised
from oxfuse.compiler.report import Parity, write_report
from oxfuse.compiler.source import open_source
from oxfuse.compiler.weight_file import WeightEntry, entry_of, write_weights
from oxfuse.errors import UserError
from oxfuse.models.tensor_source import MemoryTensor, TensorSource
from oxfuse.models.virtual import virtual_model
from oxfuse.passes.dump import GraphDumps
from oxfuse.passes.insert_past import insert_past
from oxfuse.passes.quantise import Lossy
from oxfuse.passes.weights import Weight
from oxfuse.runtime.manifest import MANIFEST, Manifest, WeightFile

if TYPE_CHECKING:
    from oxfuse.compiler.lowering.onnx import OnnxModel

WEIGHTS = "weights.safetensors"


class Tokenizer(Protocol):
    """A tokenizer that lives in memory, such as transformers'."""

    def save_pretrained(self, folder: str) -> object:
        """Write its files into a folder."""


def compile(
    source: str | Path | nn.Module,
    output: str | Path,
    *,
    target: str = "cpu",
    dtype: str = "auto",
    task: str | None = None,
    max_context: int | None = None,
    max_batch: int = 8,
    tokenizer: str | Path | Tokenizer | None = None,
    force: bool = False,
    dump_graphs: str | Path | None = None,
    emit_example: str | None = None,
    progress: Progress = silent,
    **policy: Any,
) -> Path:
    """Compile a checkpoint into an artifact and return the artifact's folder.

    source: a folder, a hub id `org/name[@revision]`, or a module in memory, oxfuse's own or transformers', whose forward must
    agree with the reference. output: the artifact's place; it may exist when empty, or with `force`. target: "cpu", or GPU archs
    as "cuda:sm_90" or "cuda:sm_80,sm_90", whether or not this machine has one, "onnx" or "onnx-portable". dtype: "float32",
    "bfloat16", "float16" (GPUs alone) or "auto" (the checkpoint's own, or the nearest that the target computes in) of
    activations, cache and unquantised weights. task: inferred from the checkpoint's architecture. max_context: longest sequence
    in tokens, the model's own by default. max_batch: most sequences in one step. tokenizer: a folder with tokenizer files, the
    source's by default, or an object that writes them with `save_pretrained(folder)`. dump_graphs: a folder for the graph after
    every pass. emit_example: "cpp" adds a folder with a C++ program that runs the artifact. policy: see `CompileOptions`.

    Raises UserError for anything the caller can put right; then nothing is left behind.
    """
    if unknown := sorted(set(policy) - {field.name for field in dataclasses.fields(CompileOptions)}):
        raise UserError(f"unknown option {', '.join(unknown)}; policies: experts, activations, dense, cpu_isa, provider.")
    options = CompileOptions(target=target, dtype=dtype, task=task, max_context=max_context, max_batch=max_batch, **policy)
    check_example(emit_example, options, task)
    phases = Phases(progress=progress)
    module = source if isinstance(source, nn.Module) else None
    with _folder_of(tokenizer) as texts:
        with phases("read checkpoint"):
            checkpoint, fingerprint = open_module(source) if isinstance(source, nn.Module) else open_source(source)
            plan = make_plan(checkpoint, options, fingerprint, texts)
            check_example(emit_example, options, plan.task)
        writer = ArtifactWriter(Path(output), force=force, checkpoint=checkpoint.folder, expected_bytes=plan.expected_bytes())
        with writer as folder:
            dumps = _dumps(dump_graphs, Path(output), checkpoint.folder) if dump_graphs is not None else None
            with MemoryWatch() as watch:
                manifest, built, parity = _build(plan, folder, phases, dumps, module)
            if emit_example is not None:
                write_example(folder, manifest.requirements.torch)
            write_report(folder, report_of(manifest, folder, built, phases.seconds, parity, watch))
    return writer.output


@contextlib.contextmanager
def _folder_of(tokenizer: str | Path | Tokenizer | None) -> Iterator[str | Path | None]:
    """Yield the folder of a tokenizer; of one that lives, a temporary one."""
    if tokenizer is None or isinstance(tokenizer, str | Path):
        yield tokenizer
        return
    if not hasattr(tokenizer, "save_pretrained"):
        raise UserError(f"The tokenizer is a {type(tokenizer).__name__}: give its folder, or one that has save_pretrained.")
    with tempfile.TemporaryDirectory(prefix="oxfuse-tokenizer-") as folder:
        tokenizer.save_pretrained(folder)
        yield folder


def _dumps(folder: str | Path, output: Path, checkpoint: Path | None) -> GraphDumps:
    """Return the writer of dumps. Raises UserError where `folder` lies in checkpoint or artifact, or cannot be made."""
    place = Path(folder).expanduser().resolve()
    for other, what in ((output, "the artifact, which is written whole or not at all"), (checkpoint, "the checkpoint")):
        if other is not None and place.is_relative_to(other.expanduser().resolve()):
            raise UserError(f"The graphs cannot be written to {folder}: it lies in {what}. Name another folder.")
    return GraphDumps(place)


def _build(
    plan: Plan, folder: Path, phases: Phases, dumps: GraphDumps | None, module: nn.Module | None
) -> tuple[Manifest, BuiltPrograms, Parity]:
    """Fill the artifact's folder but for the report; return the manifest, the programs and the error.

    `module`: what the checkpoint was taken from, if it lives.
    """
    fused, built = build_programs(plan, lambda: _fuse(plan, dumps), folder / "programs", phases, dumps)
    constants = {name: fused.stored_name(name) for name in built.constants}
    with phases("write weights") as report:
        weights = _write_weights(plan, fused, constants, folder / WEIGHTS, report, built.tables)
    if built.onnx is not None:
        _finish_onnx(plan, fused, built.onnx, constants, folder)
    with phases("run oracle"):
        golden = write_golden(
            folder / GOLDEN,
            contract=plan.contract,
            config=plan.config,
            task=plan.task,
            sources=plan.sources,
            max_context=plan.limits.max_context,
            own=_own_weights(plan, fused),
            rounded=fused.rounded,
        )
    if module is not None:
        with phases("run the module"):
            check_module(module, plan, golden)
    for path in plan.tokenizer_files:
        if path.name == "tokenizer.json" and plan.tokenizer_json is not None:
            (folder / path.name).write_text(plan.tokenizer_json, "utf-8")
        else:
            shutil.copyfile(path, folder / path.name)
    manifest = describe_artifact(plan, fused, built, weights, constants, folder)
    (folder / MANIFEST).write_text(manifest.to_json(), "utf-8")
    with phases("measure artifact"):
        parity = measure(folder)
    return manifest, built, parity


def _fuse(plan: Plan, dumps: GraphDumps | None) -> Fused:
    model = virtual_model(plan.contract, plan.config, plan.task, plan.dtype)
    encodings = {name: source.encoding for name, source in plan.sources.items()}
    if plan.options.device == "onnx":
        insert = partial(insert_past, cached=plan.task == "text-generation", pooled=plan.pooled)
        export = partial(export_reference, batched=True)
        # But for int8, which holds all values of MXFP4, and GPUs, which take it as it is, experts enter dense: dequantised on
        # their way into the weight file.
        known = encodings if plan.options.experts == "int8" or plan.options.provider == "cuda" else {}
        return fuse(model, known, requested=plan.contract.fusions, observe=dumps, export=export, insert=insert)
    return fuse(model, encodings, requested=plan.contract.fusions, packing=plan.packing, observe=dumps)


def _finish_onnx(plan: Plan, fused: Fused, model: OnnxModel, constants: dict[str, str], folder: Path) -> None:
    """Write what needs the weights' places, and what onnxruntime-genai reads."""
    from oxfuse.compiler.lowering.genai import CONFIG, genai_config
    from oxfuse.compiler.lowering.onnx import MODEL, write_model

    stored = {**constants, **{name: name for name in model.tables}}
    write_model(model, folder / MODEL, folder / WEIGHTS, stored)
    if plan.task == "text-generation" and plan.options.target == "onnx":
        config = genai_config(plan, fused, generation_of(plan))
        (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n", "utf-8")


def _write_weights(
    plan: Plan,
    fused: Fused,
    constants: dict[str, str],
    path: Path,
    report: Callable[[float], None],
    tables: Mapping[str, Tensor],
) -> WeightFile:
    """Stream every weight that the program reads into the weight file, and its tables; names of one tensor share it."""
    entries = {name: _computed(name, table) for name, table in tables.items()}
    for name, stored in constants.items():
        weight = fused.weights[name]
        if weight.computed:
            entries[stored] = _computed(name, fused.step.get_buffer(name))
        else:
            source = plan.sources[weight.source]
            entries[stored] = entry_of(weight, source if weight.part is None else source.parts()[weight.part])
    total, done = max(1, sum(entry.nbytes for entry in entries.values())), 0

    def progress(count: int) -> None:
        nonlocal done
        done += count
        report(done / total)

    return write_weights(path, entries, progress)


def _own_weights(plan: Plan, fused: Fused) -> dict[str, TensorSource] | None:
    """Return what the artifact's weights are where some were quantised, None where none was."""
    found = [(weight.source, step) for weight in fused.weights.values() for step in weight.transforms if isinstance(step, Lossy)]
    return {**plan.sources, **{name: Quantised.of(plan.sources[name], step) for name, step in found}} if found else None


def _computed(name: str, value: Tensor) -> WeightEntry:
    """Return the entry of a tensor that the configuration determines."""
    weight = Weight(shape=tuple(value.shape), dtype=value.dtype, source=name, computed=True)
    return entry_of(weight, MemoryTensor(name=name, shape=weight.shape, dtype=value.dtype, tensor=value))
