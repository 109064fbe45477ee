"""Decodes as recorded graphs against the same decodes uncaptured, bit for bit: every batch size with a graph, with padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch

import oxfuse
from oxfuse.runtime.device import Best
from oxfuse.runtime.engine import Engine
from oxfuse.runtime.graphs import GraphDevice, bucket_sizes
from oxfuse.runtime.model import CompiledModel
from oxfuse.runtime.sequence import Feed, TokenSequence

from .artifacts import wait_for
from .document import Row
from .lab import Lab
from .native import JOINED, NATIVE
from .worker import Found, Item

LENGTHS = (1, 62, 63, 64, 126, 127, 128, 129, 200, 700, 3)
"""Of the sequences in turn: at the edges of blocks and of the window."""
STEPS = 3
"""Decodes before a check."""


def items() -> Sequence[Item]:
    """Return the section's items."""
    return (
        Item(name="shipped, every bucket", seconds=25, run=partial(buckets, name=JOINED, step="join")),
        Item(name="native, every bucket", seconds=25, run=partial(buckets, name=NATIVE, step="programs")),
        Item(name="decodes against prefills", seconds=10, run=decodes),
    )


def buckets(lab: Lab, name: str, step: str) -> Iterator[Found]:
    """Check a batch that fills each bucket, and one with a row less, which is padding."""
    wait_for(lab, step)
    model = oxfuse.load(lab.work / name, prefix_cache_bytes=0)
    engine = model.scheduler.engine
    device = engine.device
    assert isinstance(device, GraphDevice)
    most = max(1, min(engine.limits.max_batch, device._most))
    sizes = bucket_sizes(most)
    for live in sorted({*sizes, *(size - 1 for size in sizes if size > 1)}):
        sequences = grown(engine, live, model.vocab_size)
        check = device.check_replay(engine.caches)
        cells = {
            "artifact": name,
            "rows": live,
            "bucket": check.bucket,
            "logits": check.logits,
            "caches": check.caches,
            "numbers": check.finite,
        }
        fine = check.logits and check.caches and check.finite and check.rows == live
        yield Row(table="Replayed against uncaptured: same bits", cells=cells, bar="all yes", passed=fine)
        for sequence in sequences:
            engine.release(sequence)


def grown(engine: Engine, count: int, vocab: int) -> list[TokenSequence]:
    """Return sequences of several lengths that have been decoded for some steps in one batch."""
    generator = torch.Generator().manual_seed(count)
    sequences = []
    for n in range(count):
        sequence = engine.sequence()
        sequence.append(torch.randint(0, vocab, (LENGTHS[n % len(LENGTHS)],), generator=generator).tolist())
        advance(engine, [sequence])
        sequences.append(sequence)
    for _ in range(STEPS):
        advance(engine, sequences)
    return sequences


def advance(engine: Engine, sequences: Sequence[TokenSequence]) -> None:
    """Run what is pending of the sequences, in chunks, and append the most likely token to each."""
    waiting = [*sequences]
    while waiting:
        feeds = []
        for sequence in waiting:
            count = min(sequence.pending, engine.chunk)
            if not engine.secure(sequence, count):
                raise RuntimeError("The cache is full.")
            feeds.append(Feed(sequence=sequence, count=count, greedy=True))
        answers = engine.run(feeds)
        ready = [(s, answer[-1]) for s, answer in zip(waiting, answers, strict=True) if not s.pending]
        for sequence, best in ready:
            sequence.append([best.token if isinstance(best, Best) else int(best.argmax())])
        waiting = [sequence for sequence in waiting if sequence not in [s for s, _ in ready]]


def decodes(lab: Lab) -> Iterator[Found]:
    """Compare what the decode program says with what the step program says about the same tokens."""
    wait_for(lab, "join")
    model: CompiledModel = oxfuse.load(lab.work / JOINED, prefix_cache_bytes=0)
    ids = torch.randint(0, model.vocab_size, (200,), generator=torch.Generator().manual_seed(3)).tolist()
    whole = model.logits([ids])[0, 100:].double()
    with model.session() as session:
        session.prefill(ids[:100])
        single = torch.stack([session.decode(token) for token in ids[100:]]).double()
    share = (single - whole).square().mean().sqrt().item() / whole.square().mean().sqrt().item()
    agreed = (single.argmax(-1) == whole.argmax(-1)).double().mean().item()
    cells = {"tokens": len(single), "relative RMS": share, "top-1 equal": agreed, "numbers": bool(single.isfinite().all())}
    yield Row(table="Decode program against step program", cells=cells, bar="relative RMS ≤ 0.7", passed=share <= 0.7)
