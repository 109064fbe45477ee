"""The artifact that was compiled on a machine without a GPU, run on one: against one that was built here, and against the oracle.

`native.py` prepares beside the report what is compared: the weights out of the seed, the artifact built here, the golden logits.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import oxfuse
from oxfuse.compiler.golden import GOLDEN
from oxfuse.runtime.manifest import read_manifest
from oxfuse.runtime.model import CompiledModel
from oxfuse.runtime.verify import COARSE_TOLERANCE, compare_golden

from .checkout import kernel_sources
from .document import Row
from .lab import Lab
from .native import JOINED, NATIVE, State
from .ship import FEW, SHIPPED, folder_bytes, origin
from .worker import Found, Item, Note

SAME_LOGITS = 0.01
"""Largest RMS difference of the logits of two builds, relative to their RMS: a bfloat16 has 8 bits, and kernels are the same."""
TOKENS, NEW_TOKENS = 300, 48
PROMPTS = (5, 130, 1)
MOST_WAIT = 240.0
"""Seconds that an item waits for what is prepared beside the report."""


def items() -> Sequence[Item]:
    """Return the section's items."""
    return (
        Item(name="origin", seconds=1, run=about),
        Item(name="weights out of the seed", seconds=30, run=weights),
        Item(name="shipped against native", seconds=45, run=against_native),
        Item(name="shipped against the oracle", seconds=25, run=against_oracle),
        Item(name="native against the oracle", seconds=15, run=native_against_oracle),
    )


def wait_for(lab: Lab, step: str, seconds: float = MOST_WAIT) -> dict[str, Any]:
    """Return what a step of `native.py` found. Raises RuntimeError where it failed or cannot come, TimeoutError."""
    until = time.monotonic() + seconds
    while True:
        state = State.read(lab.work)
        if step in state.done:
            return state.done[step]
        if step in state.errors or state.ended:
            raise RuntimeError(
                state.errors.get(step) or f"{step} was not prepared: {'; '.join(state.errors) or 'nothing to do'} failed"
            )
        if time.monotonic() > until:
            raise TimeoutError(f"{step} is not ready after {seconds:.0f} s; done: {', '.join(state.done) or 'nothing'}")
        time.sleep(0.3)


def about(lab: Lab) -> Iterator[Found]:
    """Tell where the shipped programs come from."""
    shipped = origin()
    if shipped is None:
        raise RuntimeError(f"{SHIPPED} holds nothing: `python -m tests.gpu.ship` makes it, on a machine without a GPU.")
    here = torch.__version__
    for what, value in (
        ("made", f"{shipped.date} at {shipped.commit}"),
        ("with", f"torch {shipped.torch}, triton {shipped.triton}, Python {shipped.python}, {shipped.machine}"),
        ("torch here", here),
        ("layers", ", ".join(f"{name}: {count}" for name, count in shipped.layers.items())),
        ("bytes", f"{folder_bytes(SHIPPED):,}"),
    ):
        yield Row(table="", cells={"what": what, "found": value})
    same = shipped.sources == kernel_sources()
    yield Row(table="", cells={"what": "kernels are those of this checkout", "found": same}, bar="yes", passed=same)


def weights(lab: Lab) -> Iterator[Found]:
    """Tell whether this machine made the weights that the manifest states."""
    made = wait_for(lab, "weights")
    stated = read_manifest(SHIPPED / FEW).weights[0]
    cells = {
        "tensors": made["tensors"],
        "of which hashed": made["hashed"],
        "bytes": made["bytes"],
        "stated": stated.bytes,
        "same header": made["header"] == stated.header_sha256,
        "seconds": made["seconds"],
    }
    fine = made["bytes"] == stated.bytes and made["header"] == stated.header_sha256
    yield Row(table="Weights out of the seed", cells=cells, bar="all hashes equal", passed=fine)


def against_native(lab: Lab) -> Iterator[Found]:
    """Compare logits and greedy tokens of both artifacts."""
    wait_for(lab, "join")
    wait_for(lab, "programs")
    answers: dict[str, tuple[Tensor, list[tuple[int, ...]]]] = {}
    for name in (JOINED, NATIVE):
        model, found = loaded(lab.work / name, name)
        yield found
        answers[name] = answer(model)
        del model
        lab.tidy()
    (logits, tokens), (others, other_tokens) = answers[JOINED], answers[NATIVE]
    difference, size = (logits - others).double(), others.double().square().mean().sqrt().item()
    share = difference.square().mean().sqrt().item() / size
    cells = {
        "what": f"logits of {TOKENS} tokens",
        "relative RMS": share,
        "largest difference": difference.abs().max().item(),
        "RMS of the logits": size,
        "same bits": torch.equal(logits, others),
    }
    fine = share <= SAME_LOGITS and bool(logits.isfinite().all())
    yield Row(table="Shipped against native", cells=cells, bar=f"relative RMS ≤ {SAME_LOGITS}", passed=fine)
    equal = [sum(a == b for a, b in zip(x, y, strict=True)) for x, y in zip(tokens, other_tokens, strict=True)]
    told = {"what": f"greedy tokens, {len(PROMPTS)} prompts", "same bits": tokens == other_tokens}
    yield Row(table="Shipped against native", cells=told, bar="the same tokens", passed=tokens == other_tokens)
    yield Note(text=f"Tokens that are equal, of {NEW_TOKENS} for each prompt: {', '.join(map(str, equal))}.")


def loaded(folder: Path, name: str) -> tuple[CompiledModel, Row]:
    """Load an artifact and tell how long that took."""
    began = time.monotonic()
    model = oxfuse.load(folder, prefix_cache_bytes=0)
    seconds = time.monotonic() - began
    size = sum(file.bytes for file in model.manifest.weights)
    cells = {"artifact": name, "GB": size / 1e9, "seconds": seconds, "GB/s": size / 1e9 / seconds}
    return model, Row(table="Loading", cells=cells)


def answer(model: CompiledModel) -> tuple[Tensor, list[tuple[int, ...]]]:
    """Return the logits of a random text, float32 [T, V], and the greedy continuations of random prompts."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, model.vocab_size, (TOKENS,), generator=generator).tolist()
    prompts = [ids[:length] for length in PROMPTS]
    made = model.generate(prompts, max_new_tokens=NEW_TOKENS, stop_token_ids=[])
    return model.logits([ids])[0], [tuple(generation.token_ids) for generation in made]


def against_oracle(lab: Lab) -> Iterator[Found]:
    """Compare the shipped artifact with the float32 oracle, which ran on the CPU."""
    yield from _against_oracle(lab, JOINED, "join")


def native_against_oracle(lab: Lab) -> Iterator[Found]:
    """Compare the artifact that was built here with it."""
    yield from _against_oracle(lab, NATIVE, "programs")


def _against_oracle(lab: Lab, name: str, step: str) -> Iterator[Found]:
    wait_for(lab, step)
    wait_for(lab, "golden")
    model, _ = loaded(lab.work / name, name)
    error = compare_golden(model, lab.work / GOLDEN)
    cells = {
        "artifact": name,
        "rows": error.rows,
        "RMS error": error.rms_error,
        "RMS of the oracle": error.reference_rms,
        "share": error.rms_error / error.reference_rms,
        "largest error": error.max_error,
        "top-1 equal": error.top1_agreement,
    }
    rule = f"share ≤ {COARSE_TOLERANCE}"
    yield Row(table="Against the float32 oracle", cells=cells, bar=rule, passed=error.fits(model.manifest.model.dtype))
