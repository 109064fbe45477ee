"""The engines that are compared, as data, and how each is made ready from one checkpoint.

In: a checkpoint and a folder for what is made from it. Out: a `Contender` for every engine that can run here, and for every other
the reason why it cannot: a package that is missing, an option that the compiler refuses.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from oxfuse.compiler.bench.cost import Cost, cost_of
from oxfuse.compiler.bench.engines import VARIANTS, EngineSpec
from oxfuse.compiler.bench.gguf_file import BYTES_PER_VALUE, write_gguf
from oxfuse.compiler.bench.llama import SCRIPT
from oxfuse.compiler.phases import Progress
from oxfuse.compiler.pipeline import compile as compile_checkpoint
from oxfuse.errors import UserError
from oxfuse.runtime.manifest import Manifest, read_manifest


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
