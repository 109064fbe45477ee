"""What an artifact is made of, what it needs, and whether this machine has it: computed from the manifest, nothing is executed.

In: the manifest, and the sizes of the files it names. Out: figures for programs (`dataclasses.asdict`) and lines for a person.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oxfuse.runtime.cache_size import block_bytes, prefill_chunk, prefix_bound, sequence_blocks, size_cache
from oxfuse.runtime.errors import UserError
from oxfuse.runtime.gpus import find_gpus
from oxfuse.runtime.host import misfits, torch_version
from oxfuse.runtime.machine import Memory, memory
from oxfuse.runtime.manifest import ONNX, Manifest, ModelSpec
from oxfuse.runtime.units import count_text, item_bytes, size_text

CONTEXTS = (1024, 4096, 16384, 65536)
"""Lengths of the memory table, as far as the artifact reaches; its own limit is added."""

KINDS = (  # by words in a weight's name, the first that fits
    ("head", ("lm_head", "embed_out", "score", "classifier", "qa_outputs")),
    ("embedding", ("embed",)),
    ("experts", ("expert",)),
    ("router", ("router",)),
    ("norms", ("norm",)),
    ("attention", ("attn", "attention", "rotary")),
    ("feed-forward", ("mlp",)),
)
SHAPE = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_local_experts",
    "num_experts_per_tok",
)
"""Fields of a Hugging Face configuration that say how large a model is; kv heads and head sizes stand in the cache's spec."""

MOST_LABELS = 12
"""Labels that are named for a person; --json has all."""


@dataclass(frozen=True, kw_only=True)
class WeightKind:
    """All weights of one kind: `bytes` in the file, `dtypes` as they are stored."""

    kind: str
    tensors: int
    bytes: int
    dtypes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class MemoryNeed:
    """Bytes at a context length: the KV cache of one sequence in each group, of `batch` sequences, and together with the weights.

    It is the most that is held at any time: a sliding group keeps its window, what a rewind may need, and one prefill chunk.
    `prefix_cache` is the most that stays beside it of earlier sequences, for later ones that begin alike, as `oxfuse.load`
    bounds it by default; on a GPU that is part of what the cache claims anyway.
    """

    context: int
    batch: int
    sequence_groups: tuple[int, ...]
    sequence: int
    cache: int
    prefix_cache: int
    total: int


@dataclass(frozen=True, kw_only=True)
class HostFit:
    """This machine against the artifact. `misfits`: what it lacks, with the remedy; `short`: what it has too little of."""

    fits: bool
    misfits: tuple[str, ...]
    short: tuple[str, ...]
    memory: Memory | None


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The computed figures. `windows` counts layers by attention window, 0 for full attention; `missing` names absent files,
    `quantization` the method of the checkpoint's quantised weights."""

    layers: int
    windows: dict[int, int]
    shape: dict[str, int]
    quantization: str | None
    kv_heads: tuple[int, ...]
    head_dim: tuple[int, ...]
    weights: tuple[WeightKind, ...]
    weight_bytes: int
    program_bytes: int
    memory: tuple[MemoryNeed, ...]
    host: HostFit
    missing: tuple[str, ...]

    def lines(self, manifest: Manifest) -> list[str]:
        """Return it for a person."""
        blocks = (_head, _model, _weights, _memory, _programs, _passes, _needs, _verdict)
        return [line for block in blocks for line in ("", *block(self, manifest))][1:]


def summarize(folder: Path, manifest: Manifest, *, contexts: Sequence[int] = (), batch: int | None = None) -> Summary:
    """Compute the figures of the artifact in `folder`, its memory at each of `contexts` tokens for `batch` sequences at once.

    By default at CONTEXTS and at the longest, for as many sequences as a step has. Raises UserError for a length or a batch that
    the artifact does not take.
    """
    limits = manifest.limits
    for context in contexts:
        if not 1 <= context <= limits.max_context:
            raise UserError(f"The context is {context}; the artifact takes 1 to {limits.max_context} tokens.")
    if batch is not None and not 1 <= batch <= limits.max_batch:
        raise UserError(f"The batch is {batch}; the artifact runs 1 to {limits.max_batch} sequences at once.")
    lengths = contexts or [*(n for n in CONTEXTS if n < limits.max_context), limits.max_context]
    needs = tuple(_need(manifest, context, batch or limits.max_batch) for context in lengths)
    config, windows = manifest.model.config, dict[int, int]()
    quantized = config.get("quantization_config")
    for group in manifest.cache.groups:
        windows[group.window] = windows.get(group.window, 0) + len(group.layers)
    files = [program.path + "/" + name for program in manifest.programs for name in program.files]
    files += [manifest.ops_library.path] if manifest.ops_library else []
    sizes = {name: _size(folder / name) for name in (*files, *(w.path for w in manifest.weights), *manifest.tokenizer_files)}
    return Summary(
        layers=sum(windows.values()),
        windows=windows,
        shape={name: config[name] for name in SHAPE if isinstance(config.get(name), int)},
        quantization=str(quantized["quant_method"]) if isinstance(quantized, dict) and "quant_method" in quantized else None,
        kv_heads=tuple(sorted(set(manifest.cache.kv_heads))),
        head_dim=tuple(sorted(set(manifest.cache.head_dim))),
        weights=_kinds(manifest),
        weight_bytes=sum(file.bytes for file in manifest.weights),
        program_bytes=sum(sizes[name] or 0 for name in files),
        memory=needs,
        host=_fit(manifest, needs),
        missing=tuple(name for name, size in sizes.items() if size is None),
    )


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def _need(manifest: Manifest, context: int, batch: int) -> MemoryNeed:
    cache = manifest.cache
    chunk = prefill_chunk(manifest.limits)
    groups = tuple(
        block_bytes(cache, group) * sequence_blocks(group, context, block_size=cache.block_size, chunk=chunk, reserve=chunk)
        for group in cache.groups
    )
    weights = sum(file.bytes for file in manifest.weights)
    held, kept = batch * sum(groups), 0
    if not manifest.requirements.gpu_archs and all(program.kind != ONNX for program in manifest.programs):
        whole = size_cache(cache, manifest.limits, chunk=chunk, reserve=chunk)
        kept = max(0, min(prefix_bound(whole, claimed=False), whole.bytes - held))
    return MemoryNeed(
        context=context,
        batch=batch,
        sequence_groups=groups,
        sequence=sum(groups),
        cache=held,
        prefix_cache=kept,
        total=held + kept + weights,
    )


def _kinds(manifest: Manifest) -> tuple[WeightKind, ...]:
    found: dict[str, list[Any]] = {kind: [0, 0, set[str]()] for kind, _ in (*KINDS, ("other", ()))}
    for file in manifest.weights:
        for name, tensor in file.tensors.items():
            entry = found[kind_of(name)]
            entry[0] += 1
            entry[1] += math.prod(tensor.shape) * item_bytes(tensor.dtype)
            entry[2].add(tensor.dtype)
    kinds = [WeightKind(kind=k, tensors=n, bytes=size, dtypes=tuple(sorted(d))) for k, (n, size, d) in found.items() if n]
    return tuple(sorted(kinds, key=lambda kind: -kind.bytes))


def kind_of(name: str) -> str:
    """Return the kind of a weight by its name, "other" where no word tells."""
    return next((kind for kind, words in KINDS if any(word in name.lower() for word in words)), "other")


def _fit(manifest: Manifest, needs: Sequence[MemoryNeed]) -> HostFit:
    wrong, here, short = misfits(manifest.requirements), memory(), []
    if here is not None and not manifest.requirements.gpu_archs:  # a GPU's memory is looked at when it is loaded
        weights, least, most = sum(file.bytes for file in manifest.weights), min(needs, key=_tokens), max(needs, key=_tokens)
        has = f"{size_text(here.usable)} of memory{' (limit of its container)' if here.limit is not None else ''}"
        if weights > here.usable:
            short.append(f"{has} cannot hold the {size_text(weights)} of weights, so they are read from disk again and again")
        elif most.total > here.usable:
            what = f"{most.batch} sequences of {most.context:,} tokens need {size_text(most.total)}, weights included"
            short.append(f"{has}: {what}. Run fewer or shorter ones")
        if least.cache > here.usable:
            short.append(f"{has}: the cache of {least.batch} sequences of {least.context:,} tokens alone is larger")
    return HostFit(fits=not wrong, misfits=tuple(wrong), short=tuple(short), memory=here)


def _tokens(need: MemoryNeed) -> int:
    return need.context


def _row(name: str, text: str) -> str:
    return f"  {name:<13}{text}"


def _head(summary: Summary, manifest: Manifest) -> Iterator[str]:
    model, source = manifest.model, manifest.source.items()
    yield f"{manifest.name}: {model.model_type} for {model.task}, in {model.dtype}"
    yield _row("compiled by", ", ".join(f"{name} {version}" for name, version in manifest.created_by.items()))
    yield _row("from", ", ".join(f"{name} {value[:12]}…" if len(value) > 32 else f"{name} {value}" for name, value in source))


def _model(summary: Summary, manifest: Manifest) -> Iterator[str]:
    shape, limits = summary.shape, manifest.limits
    yield "Model"
    kinds = [f"{n} with {_window(window)}" for window, n in sorted(summary.windows.items())]
    yield _row("layers", f"{summary.layers}: {', '.join(kinds)}")
    heads = f"{count_text(shape['num_attention_heads'], 'query head')}, " if "num_attention_heads" in shape else ""
    yield _row("attention", f"{heads}{_numbers(summary.kv_heads)} key-value heads, of {_numbers(summary.head_dim)}")
    experts = "num_local_experts" in shape
    if experts:
        active = f", {shape['num_experts_per_tok']} for each token" if "num_experts_per_tok" in shape else ""
        width = f", {shape['intermediate_size']:,} wide" if "intermediate_size" in shape else ""
        stored = f", {summary.quantization}" if summary.quantization else ""
        yield _row("experts", f"{shape['num_local_experts']} in a layer{active}{width}{stored}")
    hidden = f"hidden {shape['hidden_size']:,}, " if "hidden_size" in shape else ""
    inner = f"feed-forward {shape['intermediate_size']:,}, " if "intermediate_size" in shape and not experts else ""
    yield _row("sizes", f"{hidden}{inner}vocabulary {manifest.model.vocab_size:,}")
    yield from outputs(manifest.model)
    yield _row(
        "limits",
        f"sequences of {limits.max_context:,} tokens; {limits.max_batch} sequences and "
        f"{limits.max_step_tokens:,} tokens in a step",
    )
    yield _row("tokenizer", ", ".join(manifest.tokenizer_files) or "none: prompts are token ids")


def outputs(model: ModelSpec) -> Iterator[str]:
    """Return lines that tell what a model with another head than the language model's gives, and of which tokens."""
    where = "of a text, from its rightmost token that is not padding" if model.pooling == "rightmost" else "of each token"
    pad = model.config.get("pad_token_id")
    if model.pooling == "rightmost":
        where += f" (id {pad})" if pad is not None else " (no token is)"
    if model.labels:
        kind = model.problem_type or ("regression" if len(model.labels) == 1 else "")
        count = count_text(len(model.labels), "label")
        how = {"regression": "a value for", "multi_label_classification": "any of"}.get(kind, "one of")
        yield _row("gives", f"{how} {count}, {where}")
        rest = len(model.labels) - MOST_LABELS
        yield _row("labels", ", ".join(model.labels[:MOST_LABELS]) + (f", and {rest:,} more" if rest > 0 else ""))
    elif model.task == "question-answering":
        yield _row("gives", f"start and end of the answer, {where}")
    elif model.task == "feature-extraction":
        yield _row("gives", f"the last hidden state, {where}")


def _window(window: int) -> str:
    return f"a window of {window:,}" if window else "full attention"


def _numbers(values: Sequence[int]) -> str:
    return " or ".join(map(str, values))


def _weights(summary: Summary, manifest: Manifest) -> Iterator[str]:
    tensors = sum(kind.tensors for kind in summary.weights)
    where = "copied to the GPU" if manifest.requirements.gpu_archs else "mapped and shared by processes"
    yield f"Weights: {size_text(summary.weight_bytes)} in {tensors:,} tensors, {where}"
    for kind in summary.weights:
        share = kind.bytes / max(1, summary.weight_bytes)
        yield _row(kind.kind, f"{size_text(kind.bytes):>9}  {share:4.0%}  {', '.join(kind.dtypes)}")


def _memory(summary: Summary, manifest: Manifest) -> Iterator[str]:
    cache = manifest.cache
    yield f"Memory: KV cache in {cache.dtype}, blocks of {cache.block_size} tokens; the most that is held as sequences grow"
    groups = ["full" if not group.window else f"window {group.window}" for group in cache.groups]
    head = ["tokens", *groups, "a sequence", f"{summary.memory[0].batch} of them", "kept", "with weights"]
    rows = [
        [
            f"{need.context:,}",
            *map(size_text, need.sequence_groups),
            *map(size_text, (need.sequence, need.cache, need.prefix_cache, need.total)),
        ]
        for need in summary.memory
    ]
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    for row in (head, *rows):
        yield "  " + "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
    if any(need.prefix_cache for need in summary.memory):
        yield "  kept: at most, of sequences that ended, for others that begin alike (prefix_cache_bytes of oxfuse.load)"


def _programs(summary: Summary, manifest: Manifest) -> Iterator[str]:
    yield f"Programs: {size_text(summary.program_bytes)}"
    for program in manifest.programs:
        yield _row(program.name, f"for {program.target}, {count_text(len(program.constants), 'weight')}, in {program.path}")
    for key, value in manifest.numerics.items():
        yield _row(key, value)


def _passes(summary: Summary, manifest: Manifest) -> Iterator[str]:
    yield "Passes"
    width = max((len(record.name) for record in manifest.passes), default=0)
    for record in manifest.passes:
        checked = (
            ""
            if record.max_error is None
            else f"; {count_text(record.checked, 'kind')} checked, largest error {record.max_error:.1e}"
        )
        yield f"  {record.name:<{width}}  {count_text(record.count, 'rewrite')}{checked}"


def _needs(summary: Summary, manifest: Manifest) -> Iterator[str]:
    need = manifest.requirements
    yield "Needs"
    if not need.torch:
        yield _row("runtime", "onnxruntime, or another runtime for ONNX, on any system")
        return
    yield _row("torch", f"{need.torch}; here {torch_version() or 'none'}")
    yield _row(
        "system",
        f"{need.platform} on {need.machine}{f', glibc {need.glibc}' if need.glibc else ''}; "
        f"here {platform.system().lower()} on {platform.machine()}, {' '.join(platform.libc_ver())}",
    )
    yield _row("processor", f"{need.cpu_isa}: {' '.join(need.cpu_features)}")
    if need.gpu_archs:
        yield _row("GPU", f"{' or '.join(need.gpu_archs)}; here {'; '.join(map(str, find_gpus().found)) or 'none'}")


def _verdict(summary: Summary, manifest: Manifest) -> Iterator[str]:
    host = summary.host
    for name in summary.missing:
        yield f"Incomplete: {name} is missing. Copy the artifact again."
    for wrong in host.misfits:
        yield f"Does not run here: {wrong}."
    for short in host.short:
        yield f"This machine's {short}."
    if host.fits and not summary.missing:
        has = ""
        if host.memory and not host.short and not manifest.requirements.gpu_archs:
            has = f", which has {size_text(host.memory.usable)} of memory"
        yield f"Runs on this machine{has}."
