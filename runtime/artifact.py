"""`load`: an artifact's folder enters, a model that runs leaves.

Everything is checked before the first library is opened, since a program is trusted machine code and a wrong one ends the
process.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from oxfuse.runtime.device_load import device_engine
from oxfuse.runtime.engine import Engine
from oxfuse.runtime.errors import InternalError, UserError, shown
from oxfuse.runtime.gpus import choose_gpu, find_gpus
from oxfuse.runtime.host import check_host
from oxfuse.runtime.manifest import (
    ONNX,
    ONNX_CUDA,
    CacheGroup,
    CacheSpec,
    Manifest,
    ModelSpec,
    ProgramSpec,
    cache_shapes,
    read_manifest,
)
from oxfuse.runtime.model import CompiledModel
from oxfuse.runtime.program import Program, load_ops_library, team_switch
from oxfuse.runtime.tokenizer import TextTokenizer
from oxfuse.runtime.weights import check_weight_file, damaged, damaged_weights, hash_weights, map_tensors

REPORT = "report.json"
MOST_THREADS = 1024


def load(
    path: str | Path,
    *,
    device: str | torch.device | None = None,
    threads: int | None = None,
    check: Literal["quick", "full"] = "quick",
    cache_bytes: int | None = None,
    prefix_cache_bytes: int | None = None,
    prepack: bool = True,
    progress: Callable[[float], object] | None = None,
) -> CompiledModel:
    """Load the artifact in the folder `path`.

    `device` None means the one that the artifact was compiled for; of several GPUs "cuda" takes torch's current one if it fits,
    else the first that does, and "cuda:1" names one. `threads` is how many threads an operator may use while a step runs; None
    leaves torch's setting. `check` "quick" compares sizes, safetensors headers, the hashes of programs and tokenizer, and this
    machine with the manifest; "full" hashes the weights too. `cache_bytes` caps the KV cache; on a GPU its memory is claimed at
    once, by default for `max_batch` sequences of `max_context` tokens, or what is left beside the weights.
    `prefix_cache_bytes` bounds the part of it that stays when no sequence holds it: keys and values of tokens that have run, for
    sequences that begin with the same ones and then need not run them. By default 1 GiB, on a GPU all of the cache; 0 runs every
    sequence from its first token. An ONNX model keeps none. On a CPU weights are mapped, not read; to a GPU they are copied, and
    `progress` gets the part of them that is read, 0 to 1. Of an ONNX model onnxruntime keeps copies of dense weights that it
    multiplies faster, unless `prepack` is False. Raises UserError naming what does not fit and the remedy.
    """
    if threads is not None and (type(threads) is not int or not 1 <= threads <= MOST_THREADS):
        raise UserError(f"threads is {threads!r}: give a whole number from 1 to {MOST_THREADS}, or None for torch's own setting.")
    if check not in ("quick", "full"):
        raise UserError(f"check is {check!r}: give 'quick' or 'full'.")
    if cache_bytes is not None and (type(cache_bytes) is not int or cache_bytes < 1):
        raise UserError(f"cache_bytes is {cache_bytes!r}: give a number of bytes, or None.")
    if prefix_cache_bytes is not None and (type(prefix_cache_bytes) is not int or prefix_cache_bytes < 0):
        raise UserError(f"prefix_cache_bytes is {prefix_cache_bytes!r}: give a number of bytes, 0 for none, or None.")
    folder = Path(path)
    manifest = read_manifest(folder)
    kind = check_targets(manifest, None if device is None else str(device))
    gpus = find_gpus() if kind == "cuda" else None
    check_host(manifest.requirements, gpus)
    target = "cpu"
    if gpus is not None:
        from oxfuse.runtime.cuda import Cuda, current_device

        gpu = choose_gpu(manifest.requirements.gpu_archs, None if device is None else str(device), gpus, current_device())
        target = f"cuda:{gpu.arch}"
    if kind == "onnx":
        target = manifest.programs[0].target
    programs = choose_programs(manifest, target)
    for program in programs.values() if kind != "onnx" else ():
        check_cache(program, manifest.cache)
    width = program_width(programs["step"], manifest.model)
    check_files(folder, manifest)
    if check == "full":
        check_weights(folder, manifest)
    if kind == "onnx":
        engine = _onnx_engine(folder, manifest, programs["step"], width, threads, cache_bytes, prepack, device)
    elif gpus is None:
        engine = _host_engine(folder, manifest, programs["step"], threads, cache_bytes, prefix_cache_bytes)
    else:
        engine = device_engine(
            folder,
            manifest,
            programs,
            Cuda(gpu),
            threads=threads,
            cache_bytes=cache_bytes,
            prefix_cache_bytes=prefix_cache_bytes,
            progress=progress,
        )
    return CompiledModel(
        engine,
        vocab_size=manifest.model.vocab_size,
        width=width,
        generation=manifest.generation,
        tokenizer=TextTokenizer.open([folder / name for name in manifest.tokenizer_files]),
        manifest=manifest,
        report=_read_report(folder),
    )


def _host_engine(
    folder: Path,
    manifest: Manifest,
    program: ProgramSpec,
    threads: int | None,
    cache_bytes: int | None,
    prefix_cache_bytes: int | None,
) -> Engine:
    team = None
    if manifest.ops_library:
        load_ops_library(folder, manifest.ops_library)
        if manifest.cache.dtype == "bfloat16":  # in float32 torch multiplies the dense layers, with its own threads
            team = team_switch(manifest.ops_library.probe)
    weights: dict[str, Tensor] = {}
    for file in manifest.weights:
        weights |= map_tensors(folder / file.path)
    step = Program(folder, program, weights)
    return Engine(
        step,
        manifest.cache,
        manifest.limits,
        cache_bytes=cache_bytes,
        prefix_cache_bytes=prefix_cache_bytes,
        threads=threads,
        team=team,
    )


def _onnx_engine(
    folder: Path,
    manifest: Manifest,
    program: ProgramSpec,
    width: int,
    threads: int | None,
    cache_bytes: int | None,
    prepack: bool,
    device: str | torch.device | None,
) -> Engine:
    from oxfuse.runtime.onnx import OnnxDevice, chunk_of  # onnxruntime is for such artifacts alone

    runner = OnnxDevice(folder, program, manifest.model, width, threads, prepack, None if device is None else str(device))
    everything = CacheGroup(window=0, layers=tuple(range(len(manifest.cache.kv_heads))))  # windows free nothing
    cache, chunk = dataclasses.replace(manifest.cache, groups=(everything,)), chunk_of(program, manifest.limits)
    return Engine(_no_step, cache, manifest.limits, chunk=chunk, cache_bytes=cache_bytes, threads=threads, device=runner)


def _no_step(inputs: list[Tensor]) -> Tensor:
    raise InternalError("An ONNX model runs on its device, not as a step.")


def program_width(program: ProgramSpec, model: ModelSpec) -> int:
    """Return how many values the program gives for a token. Raises UserError if its output is not what the task asks for."""
    shapes = [output.shape for output in program.outputs]
    if program.kind == ONNX:  # the rest of its outputs is what its cache has become
        shapes = [(size.shape[0], size.shape[-1]) for size in program.outputs[:1] if len(size.shape) in (2, 3)]
    if len(shapes) != 1 or len(shapes[0]) != 2 or not isinstance(shapes[0][1], int) or shapes[0][1] < 1:
        raise UserError(
            f"The program {program.name!s:.60} has outputs of shape {shown(shapes)}, expected one of rows by values: the "
            "manifest is damaged. Compile the checkpoint again."
        )
    width, labels = shapes[0][1], len(model.labels)
    expected = {
        "text-generation": model.vocab_size,
        "text-classification": labels,
        "token-classification": labels,
        "question-answering": 2,
    }.get(model.task, width)
    if width != expected:
        raise UserError(
            f"The program {program.name!s:.60} gives {width} values for a token, expected {expected} for {model.task!s:.60}: the "
            "manifest is damaged. Compile the checkpoint again."
        )
    return width


def check_targets(manifest: Manifest, device: str | None) -> Literal["cpu", "cuda", "onnx"]:
    """Return the kind of device that the artifact runs on.

    Raises UserError where `device` is of another kind, or the programs are not for what the manifest says the artifact is for.
    """
    if manifest.programs and all(program.kind == ONNX for program in manifest.programs):
        gpu = all(program.target == ONNX_CUDA for program in manifest.programs)
        if device not in (None, "cpu") and not (gpu and device.partition(":")[0] == "cuda"):
            remedy = "" if gpu else ": for a GPU, compile with --provider cuda"
            raise UserError(f"The artifact is an ONNX model for {'a GPU' if gpu else 'the CPU'}, not {shown(device)}{remedy}.")
        return "onnx"
    stated = {f"cuda:{arch}" for arch in manifest.requirements.gpu_archs} or {"cpu"}
    held = {program.target for program in manifest.programs}
    if held != stated:
        raise UserError(
            f"The manifest says that the artifact is for {shown(sorted(stated))}, its programs are for {shown(sorted(held))}: it "
            "is damaged. Compile the checkpoint again."
        )
    kind: Literal["cpu", "cuda"] = "cuda" if manifest.requirements.gpu_archs else "cpu"
    if device is not None and (asked := device.partition(":")[0]) != kind:
        remedy = "cuda:sm_90, or what arch your GPU has" if asked == "cuda" else shown(asked)
        there = ", ".join(sorted(held))
        raise UserError(f"The artifact has no program for {shown(device)}, only for {there}: compile with --target {remedy}.")
    return kind


def choose_programs(manifest: Manifest, target: str) -> dict[str, ProgramSpec]:
    """Return the programs for `target` by name: "step", and "decode" where there is one. Raises UserError without a step."""
    programs = {program.name: program for program in manifest.programs if program.target == target}
    if "step" not in programs:
        raise UserError(
            f"The artifact has the programs {shown(sorted(programs))} for {target}, expected a step program: the manifest is "
            "damaged. Compile the checkpoint again."
        )
    return programs


def check_cache(program: ProgramSpec, cache: CacheSpec) -> None:
    """Compare the caches that the program takes with those that the manifest describes. Raises UserError."""
    expected = [
        shape
        for heads, dim in zip(cache.kv_heads, cache.head_dim, strict=True)
        for shape in cache_shapes(heads, dim, cache.block_size)
    ]
    found = [spec.shape[1:] for spec in program.inputs[-len(expected) :]]
    if found != expected:
        raise UserError(
            f"The program {program.name!s:.60} takes caches of shape {shown(found, 200)}, the manifest's cache has "
            f"{shown(expected, 200)}: the manifest is damaged. Compile the checkpoint again."
        )


def check_files(folder: Path, manifest: Manifest) -> None:
    """Hash the programs, the ops library and the tokenizer; compare weight files' sizes and headers. Raises UserError."""
    hashes = {f"{p.path}/{name}": digest for p in manifest.programs for name, digest in p.files.items()}
    if manifest.ops_library:
        hashes[manifest.ops_library.path] = manifest.ops_library.sha256
    for name, expected in {**hashes, **manifest.tokenizer_files}.items():
        try:
            with (folder / name).open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except FileNotFoundError:
            raise damaged(folder / name, "does not exist") from None
        except OSError as error:
            raise UserError(f"{folder / name!s:.300} cannot be read: {error.strerror}.") from error
        if found != expected:
            raise damaged(folder / name, f"has sha256 {found}, the manifest says {expected:.64}")
    for weights in manifest.weights:
        check_weight_file(folder, weights)


def check_weights(folder: Path, manifest: Manifest, progress: Callable[[int], object] | None = None) -> None:
    """Hash every tensor of the weight files; `progress` gets the bytes hashed. Raises UserError naming those that differ."""
    for weights in manifest.weights:
        if wrong := list(damaged_weights(weights, hash_weights(folder, weights, progress))):
            raise damaged(folder / weights.path, f"has changed since it was compiled, in {len(wrong)} tensors such as {wrong[0]}")


def _read_report(folder: Path) -> dict[str, Any] | None:
    try:
        report = json.loads((folder / REPORT).read_text("utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise damaged(folder / REPORT, f"cannot be read ({error})") from error
    return report if isinstance(report, dict) else None
