"""A mixed load for any model: requests of very different lengths, many of which end before their time, from several threads.

Run by `test_load.py` on a model whose every token is a checksum of all the tokens before it, and on a compiled artifact.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import json
import random
import sys
import threading
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from oxfuse.runtime.engine import Engine
from oxfuse.runtime.errors import UserError
from oxfuse.runtime.manifest import CacheGroup, CacheSpec, GenerationSpec, Limits
from oxfuse.runtime.model import CompiledModel

VOCAB, WINDOW, BLOCK = 499, 21, 16
KV_HEADS, HEAD_DIM = 4, 64
ROUNDS = 4
ENDINGS = ("whole", "batch", "stream", "close", "drop", "raise", "async", "cancel", "session", "wrong")


@dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt, how many tokens are wanted, how it is asked, and after how many tokens it is given up where it is."""

    prompt: list[int]
    new: int
    ending: str
    after: int


def requests(count: int, longest: int, vocab: int, seed: int) -> list[Request]:
    """Lengths from 1 to `longest`, both of which occur, most of them short; every ending as often as the others."""
    choose = random.Random(seed)
    lengths = [1, longest, *(int(longest ** choose.random()) for _ in range(count - 2))]
    return [
        Request(
            prompt=[choose.randrange(vocab) for _ in range(length)],
            new=choose.randint(1, 12),
            ending=ENDINGS[n % len(ENDINGS)],
            after=choose.randint(0, 3),
        )
        for n, length in enumerate(lengths)
    ]


class _Enough(Exception):
    """What the consumer of a stream raises."""


def ask(model: CompiledModel, request: Request) -> list[int]:
    """Ask for one request in its way and return the tokens that came."""
    options = {"max_new_tokens": request.new, "stop_token_ids": []}
    prompt, ending, found = request.prompt, request.ending, list[int]()
    if ending in ("whole", "batch"):
        others = [prompt[: len(prompt) // 2 + 1], [7]] if ending == "batch" else []
        generations = model.generate([prompt, *others], **options)  # type: ignore[arg-type]
        return generations[0].token_ids
    if ending == "session":
        with model.session() as session:
            logits = session.prefill(prompt)
            for _ in range(request.after):
                found.append(int(logits.argmax()))
                logits = session.decode(found[-1])
        return found
    if ending == "wrong":
        for wrong in ([*prompt, model.vocab_size], [0] * (model.max_context + 1)):
            try:
                model.generate([prompt, wrong], **options)  # type: ignore[arg-type]
            except UserError:
                continue
            raise AssertionError("a wrong prompt was taken")
        return found
    if ending in ("async", "cancel"):
        return asyncio.run(_ask_async(model, request))
    stream = model.stream(prompt, **options)  # type: ignore[arg-type]
    try:
        for chunk in stream:
            found.append(chunk.token_id)
            if len(found) > request.after and ending != "stream":
                if ending == "raise":
                    raise _Enough
                break
    except _Enough:
        pass
    if ending == "close":
        stream.close()  # type: ignore[attr-defined]
        assert not list(stream)
    return found  # and the stream is dropped


async def _ask_async(model: CompiledModel, request: Request) -> list[int]:
    found: list[int] = []

    async def read() -> None:
        async for chunk in model.astream(request.prompt, max_new_tokens=request.new, stop_token_ids=[]):
            found.append(chunk.token_id)
            if request.ending == "cancel" and len(found) > request.after:
                reading.cancel()

    reading = asyncio.create_task(read())
    try:
        await reading
    except asyncio.CancelledError:
        assert request.ending == "cancel"
    return found


def run_load(model: CompiledModel, load: Sequence[Request], threads: int) -> list[list[int]]:
    """Run the load from several threads, each taking every so-manieth request; return what each request gave."""
    found: list[list[int]] = [[] for _ in load]
    errors: list[BaseException] = []

    def work(first: int) -> None:
        try:
            for n in range(first, len(load), threads):
                found[n] = ask(model, load[n])
        except BaseException as error:
            errors.append(error)

    workers = [threading.Thread(target=work, args=(n,)) for n in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if errors:
        raise errors[0]
    gc.collect()
    return found


def anonymous_memory() -> int:
    """Bytes of anonymous memory that this process has in RAM, after what malloc merely keeps has gone back to the system."""
    ctypes.CDLL(None).malloc_trim(0)
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))


class Checksum:
    """The step of a model whose next token is a checksum of the whole text, which it reads back from the caches.

    Keys and values are as large as those of a real model, so its memory is that of a real cache.
    """

    def step(self, inputs: list[Tensor]) -> Tensor:
        (tokens, _, query_start, kv_lens, slots, tables, rows), caches = inputs[:7], inputs[7:]
        # Each as [blocks, block_size, KV, D].
        caches = [cache.permute(0, 3, 1, 2) if i % 2 == 0 else cache.transpose(1, 2) for i, cache in enumerate(caches)]
        size = caches[0].shape[1]
        for layer, cache in enumerate(caches):
            cache[slots[layer // 2] // size, slots[layer // 2] % size] = tokens[:, None, None].float()
        logits = torch.zeros(len(rows), VOCAB)
        ends = dict(zip((query_start[1:] - 1).tolist(), range(len(kv_lens)), strict=True))
        for row, token in enumerate(rows.tolist()):
            if token not in ends:
                continue
            n, length = ends[token], int(kv_lens[ends[token]])
            texts = [cache[tables[layer // 2, n]][:, :, -1, -1].flatten()[:length].numpy() for layer, cache in enumerate(caches)]
            assert all(np.array_equal(text[-WINDOW:], texts[0][-WINDOW:]) for text in texts), "caches that do not agree"
            logits[row, checksum(texts[0].astype(np.int64))] = 1
        return logits


def checksum(text: np.ndarray) -> int:
    return zlib.crc32(text.tobytes()) % VOCAB


def check(load: Sequence[Request], found: Sequence[list[int]], expected: Callable[[Request, int], list[int]]) -> None:
    """Compare what came with what each request gives alone, and that as much came as was asked for."""
    for request, tokens in zip(load, found, strict=True):
        assert tokens == expected(request, len(tokens)), request.ending
        if request.ending in ("whole", "batch", "stream", "async"):
            assert len(tokens) == request.new
        elif request.ending == "session":
            assert len(tokens) == request.after
        elif request.ending == "wrong":
            assert not tokens
        else:
            assert min(request.new, request.after + 1) <= len(tokens) <= request.new


def alone(request: Request, count: int) -> list[int]:
    """The first `count` tokens of a request if nothing else is there."""
    text = list(request.prompt)
    for _ in range(count):
        text.append(checksum(np.array(text, np.int64)))
    return text[len(request.prompt) :]


def checksum_model(max_context: int) -> CompiledModel:
    groups = CacheGroup(window=0, layers=(0,)), CacheGroup(window=WINDOW, layers=(1,))
    cache = CacheSpec(block_size=BLOCK, dtype="float32", kv_heads=(KV_HEADS,) * 2, head_dim=(HEAD_DIM,) * 2, groups=groups)
    limits = Limits(max_context=max_context, max_batch=8, max_step_tokens=1024)
    generation = GenerationSpec(eos_token_ids=(), bos_token_id=None, pad_token_id=None)
    return CompiledModel(Engine(Checksum().step, cache, limits, chunk=256), vocab_size=VOCAB, generation=generation)


def main() -> None:
    """Run the load ROUNDS times on the artifact in the folder named, or on the checksum model; print memory and blocks."""
    if sys.argv[1:]:
        import oxfuse

        model, again = oxfuse.load(sys.argv[1]), oxfuse.load(sys.argv[1])

        known: dict[int, list[int]] = {}

        def expected(request: Request, count: int) -> list[int]:
            if len(known.get(id(request), [])) < count:
                known[id(request)] = again.generate(request.prompt, max_new_tokens=count, stop_token_ids=[])[0].token_ids
            return known.get(id(request), [])[:count]
    else:
        model, expected = checksum_model(2048), alone
    load = requests(200, 2000, model.vocab_size, seed=1)
    engine = model.scheduler.engine
    used, memory, steps = list[int](), list[int](), engine.steps
    for _ in range(ROUNDS):
        found = run_load(model, load, threads=6)
        used.append(engine.used_blocks)
        memory.append(anonymous_memory())
        check(load, found, expected)
    print(json.dumps({"used": used, "memory": memory, "steps": engine.steps - steps, "cache": engine.size.bytes}))


if __name__ == "__main__":
    main()
