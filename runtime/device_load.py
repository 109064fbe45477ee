"""From an artifact's folder to an engine on an accelerator: share out memory, copy the weights, run the largest step once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from oxfuse.runtime.accelerator import Accelerator
from oxfuse.runtime.cache_size import blocks_for, prefill_chunk
from oxfuse.runtime.engine import Engine
from oxfuse.runtime.graphs import GraphDevice
from oxfuse.runtime.manifest import Manifest, ProgramSpec
from oxfuse.runtime.memory_plan import plan_caches, step_limits, workspace_bytes
from oxfuse.runtime.program import DeviceProgram
from oxfuse.runtime.upload import lay_out, upload_weights


def device_engine(
    folder: Path,
    manifest: Manifest,
    programs: Mapping[str, ProgramSpec],
    accelerator: Accelerator,
    *,
    threads: int | None = None,
    cache_bytes: int | None = None,
    prefix_cache_bytes: int | None = None,
    progress: Callable[[float], object] | None = None,
) -> Engine:
    """Return an engine on `accelerator` that runs `programs`: "step", and "decode" where there is one.

    `progress` gets the part of the weights that is read, 0 to 1. Raises UserError that prints the bytes where memory is short:
    before anything is allocated, by the manifest's numbers, or where these were too small.
    """
    limits, cache = step_limits(manifest.limits), manifest.cache
    names = {name for program in programs.values() for name in program.constants.values()}
    layout = lay_out([folder / file.path for file in manifest.weights], names)
    chunk = prefill_chunk(limits)
    budget = plan_caches(
        cache,
        limits,
        chunk=chunk,
        reserve=chunk,
        weights=layout.bytes,
        workspace=workspace_bytes(programs["step"], limits),
        room=accelerator.room(),
        cache_bytes=cache_bytes,
    )
    done = 0

    def on_read(count: int) -> None:
        nonlocal done
        done += count
        if progress:
            progress(min(1.0, done / layout.bytes))

    weights = upload_weights(layout, accelerator, on_read)
    loaded = {name: DeviceProgram(folder, program, weights, accelerator) for name, program in programs.items()}
    decode = programs.get("decode")
    device = GraphDevice(
        accelerator,
        decode=loaded.get("decode"),
        most=min(limits.max_batch, decode.dims["N"].max) if decode else 0,
        table=blocks_for(limits.max_context, cache.block_size),
    )
    engine = Engine(
        loaded["step"],
        cache,
        limits,
        chunk=chunk,
        reserve=chunk,
        cache_bytes=budget,
        prefix_cache_bytes=prefix_cache_bytes,
        threads=threads,
        device=device,
    )
    device.prepare(engine.step, engine.caches, limits)
    return engine
