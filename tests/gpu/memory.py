"""What a context of 32k takes at the 20b shape in full depth: allocator's and driver's figures beside weights and caches."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from oxfuse.runtime.manifest import read_manifest
from oxfuse.runtime.sequence import Feed
from oxfuse.runtime.upload import WEIGHT_ALIGNMENT

from .document import Row
from .lab import Lab
from .steps import BUILD_SECONDS, device_weights, made_engine, programs_of_all_layers, shipped_fits
from .worker import Found, Item, Note

CONTEXT, DECODES = 32768, 16
BAR = 1.05
"""Issue 12: a 32k context within 1.05 times weights and caches."""


def items() -> Sequence[Item]:
    """Return the section's item."""
    return (Item(name="a sequence of 32k", seconds=20 if shipped_fits() else BUILD_SECONDS, run=long_context),)


def long_context(lab: Lab) -> Iterator[Found]:
    """Run a prompt of 32k tokens and some decodes, and look at what was taken."""
    before = _driver_bytes(lab)
    folder = programs_of_all_layers(lab)
    manifest = read_manifest(folder)
    weights = in_one_piece(device_weights(manifest, lab.device), lab)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    engine = made_engine(folder, manifest, weights, max_context=CONTEXT + 2 * DECODES, max_batch=1)
    sequence = engine.sequence()
    sequence.append(torch.randint(0, manifest.model.vocab_size, (CONTEXT,), generator=torch.Generator().manual_seed(0)).tolist())
    began, answer = time.monotonic(), None
    while sequence.pending:
        count = min(sequence.pending, engine.chunk)
        if not engine.secure(sequence, count):
            raise RuntimeError("The caches are full.")
        (answer,) = engine.run([Feed(sequence=sequence, count=count)])
    prompt = time.monotonic() - began
    finite = isinstance(answer, Tensor) and bool(answer.isfinite().all())
    for _ in range(DECODES):
        sequence.append([7])
        if not engine.secure(sequence, 1):
            raise RuntimeError("The caches are full.")
        engine.run([Feed(sequence=sequence, count=1, greedy=True)])
    held, cached = sum(tensor.nbytes for tensor in weights.values()), sum(cache.nbytes for cache in engine.caches)
    statistics = torch.cuda.memory_stats(lab.device)
    figures = {
        "weights": held,
        "caches": cached,
        "allocated at most": statistics["allocated_bytes.all.peak"],
        "reserved by torch at most": statistics["reserved_bytes.all.peak"],
        "driver, beyond the process's context": _driver_bytes(lab) - before,
        "the context itself, with others on the GPU": before,
    }
    for what, count in figures.items():
        judged = what.startswith(("reserved", "driver"))
        share = count / (held + cached)
        yield Row(
            table=f"One sequence of {CONTEXT} tokens",
            cells={"what": what, "bytes": count, "of weights and caches": share},
            bar=f"≤ {BAR}" if judged else "",
            passed=share <= BAR if judged else None,
        )
    cells = {"what": f"logits after {CONTEXT} tokens are numbers", "found": finite, "seconds of the prompt": prompt}
    yield Row(table="The run itself", cells=cells, bar="yes", passed=finite)
    yield Note(text="Caches are allocated for one sequence of the whole context; the workspace of a step is in the figures.")


def in_one_piece(weights: dict[str, Tensor], lab: Lab) -> dict[str, Tensor]:
    """Return the weights as views of one allocation, as the runtime's upload has them."""
    sizes = {name: -(-tensor.nbytes // WEIGHT_ALIGNMENT) * WEIGHT_ALIGNMENT for name, tensor in weights.items()}
    flat = torch.empty(sum(sizes.values()), dtype=torch.uint8, device=lab.device)
    made, begin = {}, 0
    for name, tensor in weights.items():
        made[name] = flat[begin : begin + tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)
        begin += sizes[name]
    torch.cuda.synchronize()
    return made


def _driver_bytes(lab: Lab) -> int:
    """Return what the driver says is taken, by whomever; what torch holds for nothing is given back first."""
    torch.zeros(1, device=lab.device)
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(lab.device)
    return int(total - free)
