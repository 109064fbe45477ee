"""`load`: an artifact's folder enters, a model that runs leaves.

Everything is checked before the first library is opened, since a program is trusted machine code and a wrong one ends the
process.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from oxfuse.runtime.engine import Engine
from oxfuse.runtime.errors import UserError, shown
from oxfuse.runtime.host import check_host
from oxfuse.runtime.manifest import CacheSpec, Manifest, ModelSpec, ProgramSpec, cache_shapes, read_manifest
from oxfuse.runtime.model import CompiledModel
from oxfuse.runtime.program import Program, load_ops_library
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
) -> CompiledModel:
    """Load the artifact in the folder `path`.

    `device` None means the one that the artifact was compiled for. `threads` is how many threads an operator may use while a step
    runs; None leaves torch's setting. `check` "quick" compares sizes, safetensors headers, the hashes of programs and tokenizer,
    and this machine with the manifest; "full" hashes the weights too. `cache_bytes` caps the KV cache. Weights are mapped, not
    read. Raises UserError naming what does not fit and the remedy.
    """
    if threads is not None and (type(threads) is not int or not 1 <= threads <= MOST_THREADS):
        raise UserError(f"threads is {threads!r}: give a whole number from 1 to {MOST_THREADS}, or None for torch's own setting.")
    if check not in ("quick", "full"):
        raise UserError(f"check is {check!r}: give 'quick' or 'full'.")
    if cache_bytes is not None and (type(cache_bytes) is not int or cache_bytes < 1):
        raise UserError(f"cache_bytes is {cache_bytes!r}: give a number of bytes, or None.")
    folder = Path(path)
    manifest = read_manifest(folder)
    program = choose_program(manifest, None if device is None else str(device).partition(":")[0])
    check_cache(program, manifest.cache)
    check_host(manifest.requirements)
    check_files(folder, manifest)
    if check == "full":
        check_weights(folder, manifest)
    if manifest.ops_library:
        load_ops_library(folder, manifest.ops_library)
    weights: dict[str, Tensor] = {}
    for file in manifest.weights:
        weights |= map_tensors(folder / file.path)
    step = Program(folder, program, weights)
    return CompiledModel(
        Engine(step, manifest.cache, manifest.limits, cache_bytes=cache_bytes, threads=threads),
        vocab_size=manifest.model.vocab_size,
        width=program_width(program, manifest.model),
        generation=manifest.generation,
        tokenizer=TextTokenizer.open([folder / name for name in manifest.tokenizer_files]),
        manifest=manifest,
        report=_read_report(folder),
    )


def program_width(program: ProgramSpec, model: ModelSpec) -> int:
    """Return how many values the program gives for a token. Raises UserError if its output is not what the task asks for."""
    shapes = [output.shape for output in program.outputs]
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


def choose_program(manifest: Manifest, device: str | None) -> ProgramSpec:
    """Return the program that runs on `device`, by default the first. Raises UserError where there is none for this runtime."""
    fits = [p for p in manifest.programs if device is None or p.target.partition(":")[0] == device]
    if not fits:
        targets = ", ".join(sorted({p.target for p in manifest.programs})) or "nothing"
        raise UserError(f"The artifact has no program for {device}, only for {targets}: compile with --target {device}.")
    if fits[0].target != "cpu":
        raise UserError(f"The artifact's program is for {fits[0].target}; this runtime runs cpu. Compile with --target cpu.")
    return fits[0]


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
