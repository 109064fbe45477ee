"""The engines that are compared, as data, and how each is made ready from one checkpoint.

In: a checkpoint and a folder for what is made from it. Out: a `Contender` for every engine that can run here, and for every other
the reason why it cannot: a package that is missing, an option that the compiler refuses.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from oxfuse.compiler.bench.cost import Cost, cost_of
from oxfuse.compiler.bench.gguf_file import BYTES_PER_VALUE, Dense, write_gguf
from oxfuse.compiler.bench.llama import SCRIPT
from oxfuse.compiler.phases import Progress
from oxfuse.compiler.pipeline import compile as compile_checkpoint
from oxfuse.errors import UserError
from oxfuse.runtime.manifest import Manifest, read_manifest

OURS, PEER = "oxfuse", "transformers"
LLAMA_BF16, LLAMA_Q8 = "llama-bf16", "llama-q8"
INT8, INT8_DENSE = "oxfuse-int8", "oxfuse-int8-dense"


@dataclass(frozen=True, kw_only=True)
class EngineSpec:
    """An engine by name. `policy`: options of `oxfuse.compile`; `dense`: what llama.cpp's file holds dense matrices in.

    `rival`: which of llama.cpp's rows holds the same weights. `int8`: whether it may multiply in int8, which sets its floor.
    """

    key: str
    title: str
    kind: Literal["oxfuse", "transformers", "llama"]
    policy: Mapping[str, str] = field(default_factory=dict)
    dense: Dense = "bf16"
    rival: str | None = None
    int8: bool = False


VARIANTS = (
    EngineSpec(key=OURS, title="oxfuse exact", kind="oxfuse", rival=LLAMA_BF16),
    EngineSpec(
        key=INT8, title="oxfuse int8 activations", kind="oxfuse", policy={"activations": "int8"}, rival=LLAMA_BF16, int8=True
    ),
    EngineSpec(
        key=INT8_DENSE,
        title="oxfuse int8 activations, dense",
        kind="oxfuse",
        policy={"activations": "int8", "dense": "int8"},
        rival=LLAMA_Q8,
        int8=True,
    ),
)
PEERS = (
    EngineSpec(key=LLAMA_BF16, title="llama.cpp, dense bf16", kind="llama", dense="bf16", int8=True),
    EngineSpec(key=LLAMA_Q8, title="llama.cpp, dense q8_0", kind="llama", dense="q8_0", int8=True),
    EngineSpec(key=PEER, title="transformers bf16", kind="transformers"),
)


@dataclass(frozen=True, kw_only=True)
class Contender:
    """An engine that is ready: what its worker is given, and what one of its tokens must read.

    `decode_bytes` takes the tokens before. `weights`: bytes of the file that it maps them from, None where it maps none.
    `arguments` of its worker come after the threads; `program` is the command of a worker in another interpreter. `required`:
    whether a run without it makes no sense.
    """

    spec: EngineSpec
    path: Path
    decode_bytes: Callable[[int], float]
    weights: int | None = None
    arguments: tuple[str, ...] = ()
    program: tuple[str, ...] | None = None
    required: bool = False


def chosen(specs: Collection[EngineSpec], only: Collection[str], skip: Collection[str]) -> tuple[EngineSpec, ...]:
    """Return the engines in `only`, or all, but for those in `skip`. Raises UserError for unknown names, and if none of ours stays."""
    keys = {spec.key for spec in specs}
    if unknown := sorted({*only, *skip} - keys):
        raise UserError(f"{unknown[0]} is no engine here: choose among {', '.join(sorted(keys))}.")
    kept = tuple(spec for spec in specs if (not only or spec.key in only) and spec.key not in skip)
    if not any(spec.kind == "oxfuse" for spec in kept):
        raise UserError("--only and --skip leave no engine of oxfuse, whose artifact says what a token costs: keep one.")
    return kept


def compile_variants(
    checkpoint: Path,
    place: Path,
    specs: Collection[EngineSpec],
    max_context: int,
    progress: Progress,
    *,
    again: bool = True,
) -> tuple[dict[str, Path], dict[str, str]]:
    """Compile the oxfuse engines among `specs` into `place`; return artifacts by key, and reasons of those that are refused.

    With `again`, those of an earlier run as well: they may be of another compiler. Raises UserError if all are refused.
    """
    made, missing = dict[str, Path](), dict[str, str]()
    for spec in specs:
        if spec.kind != "oxfuse":
            continue
        artifact = place / f"{checkpoint.name}-{spec.key}"
        try:
            if again or not artifact.exists() or read_manifest(artifact).limits.max_context < max_context:
                compile_checkpoint(
                    checkpoint,
                    artifact,
                    max_context=max_context,
                    force=True,
                    progress=lambda phase, done, title=spec.title: progress(f"{title}: {phase}", done),  # type: ignore[misc]
                    **spec.policy,
                )
        except UserError as error:
            missing[spec.key] = str(error)
        else:
            made[spec.key] = artifact
    if not made:
        raise UserError(f"{checkpoint} could not be compiled: {next(iter(missing.values()))}")
    return made, missing


def of_artifact(spec: EngineSpec, artifact: Path, *, required: bool = False) -> Contender:
    """Return the contender of an artifact."""
    manifest = read_manifest(artifact)
    cost, weights = cost_of(manifest), sum(file.bytes for file in manifest.weights)
    return Contender(spec=spec, path=artifact, decode_bytes=cost.decode_bytes, weights=weights, required=required)


def of_transformers(spec: EngineSpec, checkpoint: Path, cost: Cost) -> Contender:
    """Return the contender that runs the checkpoint in transformers, all weights in bfloat16."""
    return Contender(spec=spec, path=checkpoint, decode_bytes=functools.partial(cost.decode_bytes, bfloat16=True))


def of_llama(
    spec: EngineSpec, checkpoint: Path, place: Path, python: Path, cost: Cost, longest: int, progress: Progress
) -> Contender:
    """Return the contender that runs the checkpoint in llama.cpp, from a GGUF file in `place`, which is made if it is not there.

    Raises UserError for a checkpoint that cannot be written as GGUF.
    """
    path = place / f"{checkpoint.name}-{spec.dense}.gguf"
    if not path.exists():
        progress(f"writing {path.name}", None)
        place.mkdir(parents=True, exist_ok=True)
        write_gguf(checkpoint, path, spec.dense)
    read = functools.partial(cost.decode_bytes_held, dense=BYTES_PER_VALUE[spec.dense], experts=BYTES_PER_VALUE["mxfp4"])
    return Contender(
        spec=spec,
        path=path,
        decode_bytes=read,
        weights=path.stat().st_size,
        arguments=(str(longest),),
        program=(str(python), str(SCRIPT)),
    )


def spec_of(manifest: Manifest) -> EngineSpec:
    """Return the engine that an artifact is: exact, or one of the lossy ones, whose rivals differ."""
    lossy = {name for name in ("activations", "dense") if not manifest.numerics.get(name, "exact").startswith("exact")}
    return next((spec for spec in VARIANTS if set(spec.policy) == lossy), VARIANTS[0])
