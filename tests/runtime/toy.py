"""A small attention language model with two ways to run it: whole sequences, densely, and the paged `step` of the runtime.

The dense way is what the runtime's results are compared with; it knows neither blocks nor steps. The step reads and writes the
caches only through slots and block tables, and refuses inputs that break the contract of the program.
"""

from __future__ import annotations

import torch
from torch import Tensor

from oxfuse.runtime.blocks import BlockPool
from oxfuse.runtime.engine import Engine
from oxfuse.runtime.manifest import CacheGroup, CacheSpec, GenerationSpec, Limits
from oxfuse.runtime.model import CompiledModel

VOCAB, HIDDEN, HEADS = 61, 32, 4
WINDOWS = (5, 0, 5, 0)
KV_HEADS, HEAD_DIM = (2, 1, 4, 2), (8, 6, 4, 8)


class ToyModel:
    """Four attention layers, two of them with a window; layers differ in KV heads and head size."""

    def __init__(self, seed: int = 3) -> None:
        make = torch.Generator().manual_seed(seed)

        def weight(*shape: int) -> Tensor:
            return torch.randn(shape, generator=make) * shape[-2] ** -0.5

        self.embedding = torch.randn(VOCAB, HIDDEN, generator=make)
        self.head = weight(HIDDEN, VOCAB) * 3
        self.layers = [
            (weight(HIDDEN, HEADS * d), weight(HIDDEN, kv * d), weight(HIDDEN, kv * d), weight(HEADS * d, HIDDEN) * 2)
            for kv, d in zip(KV_HEADS, HEAD_DIM, strict=True)
        ]
        self.steps: list[tuple[list[int], list[int]]] = []
        """Token counts and KV lengths of each step's sequences."""
        self.rows: list[int] = []

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        angles = positions[:, None] * torch.logspace(0.3, -1, HIDDEN // 2)
        return self.embedding[tokens] + 2 * torch.cat([angles.sin(), angles.cos()], -1)

    def attend(self, layer: int, x: Tensor, keys: Tensor, values: Tensor, seen: Tensor) -> Tensor:
        """x [T, H] against keys, values [S, KV, D] where seen [T, S]."""
        q = (x @ self.layers[layer][0]).view(len(x), HEADS, HEAD_DIM[layer])
        keys, values = (t.repeat_interleave(HEADS // KV_HEADS[layer], 1) for t in (keys, values))
        scores = torch.einsum("qhd,khd->hqk", q, keys) * HEAD_DIM[layer] ** -0.5 * 2
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        return torch.einsum("hqk,khd->qhd", weights, values).flatten(1) @ self.layers[layer][3]

    def project(self, layer: int, x: Tensor) -> tuple[Tensor, Tensor]:
        _, wk, wv, _ = self.layers[layer]
        return (x @ wk).view(len(x), -1, HEAD_DIM[layer]), (x @ wv).view(len(x), -1, HEAD_DIM[layer])

    @torch.no_grad()
    def dense(self, tokens: list[int], positions: list[int] | None = None) -> Tensor:
        """Logits [T, V] of one sequence."""
        index = torch.arange(len(tokens))
        x = self.embed(torch.tensor(tokens), index if positions is None else torch.tensor(positions))
        for layer, window in enumerate(WINDOWS):
            seen = (index <= index[:, None]) & (index > index[:, None] - (window or len(tokens)))
            x = torch.tanh(x + self.attend(layer, x, *self.project(layer, x), seen))
        return x @ self.head

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        tokens = list(prompt)
        for _ in range(count):
            tokens.append(int(self.dense(tokens)[-1].argmax()))
        return tokens[len(prompt) :]

    def step(self, inputs: list[Tensor]) -> Tensor:
        (tokens, positions, query_start, kv_lens, slots, tables, rows), caches = inputs[:7], inputs[7:]
        assert all(t.dtype == torch.int64 and t.is_contiguous() and t.numel() for t in inputs[:7])
        assert tokens.shape == positions.shape == slots.shape[1:] and len(query_start) == len(kv_lens) + 1 == tables.shape[1] + 1
        caches = [cache.permute(0, 3, 1, 2) if i % 2 == 0 else cache.transpose(1, 2) for i, cache in enumerate(caches)]
        size = caches[0].shape[1]  # each is [blocks, block_size, KV, D] now
        assert (slots >= size).all(), "a slot in block 0"
        assert all(len(group.unique()) == len(group) for group in slots), "a slot twice in one step"
        counts = query_start.diff()
        assert (counts > 0).all() and query_start[0] == 0 and query_start[-1] == len(tokens)
        self.steps.append((counts.tolist(), kv_lens.tolist()))
        self.rows.append(len(rows))
        x = self.embed(tokens, positions)
        for layer, window in enumerate(WINDOWS):
            group = 0 if window else 1
            k_cache, v_cache = caches[2 * layer : 2 * layer + 2]
            for cache, new in zip((k_cache, v_cache), self.project(layer, x), strict=True):
                cache[slots[group] // size, slots[group] % size] = new
            out = torch.empty_like(x)
            for n, length in enumerate(kv_lens.tolist()):
                part = slice(query_start[n], query_start[n + 1])
                past = length - int(counts[n])
                first = max(0, past - window + 1) // size if window else 0
                blocks = tables[group, n, first : -(-length // size)]
                assert (blocks > 0).all(), "block 0 or a freed block where the window reaches"
                i, j = torch.arange(past, length)[:, None], torch.arange(first * size, length)
                keys, values = (cache[blocks].flatten(0, 1)[: len(j)] for cache in (k_cache, v_cache))
                seen = (j <= i) & (j > i - (window or length))
                old = ~seen.any(0)  # may hold anything
                keys, values = keys.masked_fill(old[:, None, None], 0), values.masked_fill(old[:, None, None], 0)
                out[part] = self.attend(layer, x[part], keys, values, seen)
            x = torch.tanh(x + out)
        return x[rows] @ self.head


def toy_engine(
    toy: ToyModel, *, max_context: int = 96, max_batch: int = 4, max_step_tokens: int = 24, **options: object
) -> Engine:
    """An engine over `toy` whose caches hold NaN wherever no sequence has written, also in blocks that were given back."""
    cache = CacheSpec(
        block_size=4,
        dtype="float32",
        kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        groups=(CacheGroup(window=5, layers=(0, 2)), CacheGroup(window=0, layers=(1, 3))),
    )
    limits = Limits(max_context=max_context, max_batch=max_batch, max_step_tokens=max_step_tokens)
    engine = Engine(toy.step, cache, limits, **{"chunk": 8, "reserve": 8, **options})  # type: ignore[arg-type]
    for group, pool in enumerate(engine.pools):
        caches = [engine.caches[2 * layer + kv] for layer in cache.groups[group].layers for kv in (0, 1)]
        for each in caches:
            each.fill_(torch.nan)
        poison_when_freed(pool, caches)
    return engine


def poison_when_freed(pool: BlockPool, caches: list[Tensor]) -> None:
    drop, let_go = pool.drop, pool.let_go

    def poison(blocks: list[int]) -> None:
        for cache in caches:
            cache[blocks] = torch.nan

    def poisoning(blocks: list[int]) -> None:
        blocks = [block for block in blocks if block]
        last = [block for block in blocks if not pool.shared(block) and not pool.remembers(block)]
        drop(blocks)
        poison(last)

    def letting_go() -> None:
        block = next(iter(pool._kept))
        let_go()
        poison([block])

    pool.drop, pool.let_go = poisoning, letting_go  # type: ignore[method-assign,assignment]


def toy_model(toy: ToyModel, **options: object) -> CompiledModel:
    """`toy` behind the public surface."""
    generation = GenerationSpec(eos_token_ids=(), bos_token_id=None, pad_token_id=None)
    return CompiledModel(toy_engine(toy, **options), vocab_size=VOCAB, generation=generation)  # type: ignore[arg-type]


def tokens(count: int, seed: int = 0) -> list[int]:
    return torch.randint(0, VOCAB, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
