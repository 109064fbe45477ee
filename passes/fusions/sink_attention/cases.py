"""Inputs for the contract tests of the attention ops, and their meaning once more, as plain loops.

Paged caches are NaN wherever no token of the step may look: unwritten slots, block 0, keys older than the window.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from oxfuse.passes.fusions.contract import OpCase
from oxfuse.passes.fusions.sink_attention import past as padded  # registers ops

DENSE, PAGED, CACHED = "oxfuse::sink_attention_dense", "oxfuse::sink_attention", "oxfuse::sink_attention_cached"
REGISTERED = padded
PAST, PLACES, LAST, FROM = "oxfuse::sink_attention_past", "oxfuse::new_places", "oxfuse::last_tokens", "oxfuse::tokens_from"


def _dense(
    name: str, batch: int, length: int, heads: int, kv: int, dim: int, window: int, *, sink: bool = True, strided: bool = False
) -> OpCase:
    def args(dtype: torch.dtype) -> tuple[Any, ...]:
        generator = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(batch, length, n, dim, generator=generator).to(dtype) for n in (heads, kv, kv))
        if strided:
            q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
        return q, k, v, torch.randn(heads, generator=generator).to(dtype) if sink else None, window, dim**-0.5

    return OpCase(name=name, op=DENSE, args=args)


def paged_case(
    name: str,
    sequences: Sequence[tuple[int, int]],
    heads: int,
    kv: int,
    dim: int,
    window: int,
    *,
    block_size: int = 4,
    sink: bool = True,
    padding: int = 0,
    strided: bool = False,
) -> OpCase:
    """`sequences`: keys before the step and new tokens of each; (0, 0) is an empty one. `padding` tokens belong to none."""

    def args(dtype: torch.dtype) -> tuple[Any, ...]:
        generator = torch.Generator().manual_seed(0)
        tokens = sum(new for _, new in sequences) + padding
        q, k, v = (torch.randn(tokens, n, dim, generator=generator).to(dtype) for n in (heads, kv, kv))
        if strided:
            q, k, v = (torch.cat([x, x], -1)[..., :dim] for x in (q, k, v))
        columns = max(-(-(past + new) // block_size) for past, new in sequences) + 1
        table = torch.zeros(len(sequences), columns, dtype=torch.int64)
        blocks = (torch.randperm(len(sequences) * columns, generator=generator) + 1).view_as(table)
        caches = [
            torch.full((1 + table.numel(), kv, *tail), torch.nan, dtype=dtype) for tail in ((dim, block_size), (block_size, dim))
        ]
        slots: list[int] = []
        for n, (past, new) in enumerate(sequences):
            oldest = max(0, past - window + 1) if window else 0
            for key in range(oldest, past + new):
                block, offset = int(blocks[n, key // block_size]), key % block_size
                table[n, key // block_size] = block
                if key >= past:
                    slots.append(block * block_size + offset)
                else:
                    for cache in _by_slot(*caches):
                        cache[block, offset] = torch.randn(kv, dim, generator=generator).to(dtype)
        starts = torch.tensor([0, *(new for _, new in sequences)]).cumsum(0)
        lengths = torch.tensor([past + new for past, new in sequences])
        weights = torch.randn(heads, generator=generator).to(dtype) if sink else None
        return q, k, v, weights, *caches, starts, lengths, torch.tensor(slots + [-1] * padding), table, window, dim**-0.5

    return OpCase(name=name, op=PAGED, args=args, mutated=(4, 5))


def cached_case(name: str, paged: OpCase, *, decode: bool = False) -> OpCase:
    """The same once the step's keys and values are in the caches."""

    def args(dtype: torch.dtype) -> tuple[Any, ...]:
        q, k, v, sink, k_cache, v_cache, starts, lengths, slots, table, window, scale = paged.args(dtype)
        _write(k, v, k_cache, v_cache, slots)
        return q, sink, k_cache, v_cache, starts, lengths, table, window, scale, decode

    return OpCase(name=name, op=CACHED, args=args)


def _past(name: str, rows: Sequence[str], new: int, heads: int, kv: int, dim: int, window: int, *, sink: bool = True) -> OpCase:
    """`rows` are the masks, "1101" for instance; `new` tokens of each are new, the rest is the past, None if there is no rest."""

    def args(dtype: torch.dtype) -> tuple[Any, ...]:
        generator, mask = torch.Generator().manual_seed(0), _mask(rows)

        def random(*shape: int) -> Tensor:
            return torch.randn(len(rows), *shape, generator=generator).to(dtype)

        q, k, v = (random(new, count, dim) for count in (heads, kv, kv))
        past = (
            (random(kv, mask.shape[1] - new, dim), random(kv, mask.shape[1] - new, dim)) if mask.shape[1] > new else (None, None)
        )
        return q, k, v, torch.randn(heads, generator=generator).to(dtype) if sink else None, *past, mask, window, dim**-0.5

    return OpCase(name=name, op=PAST, args=args)


def _places(name: str, rows: Sequence[str], new: int) -> OpCase:
    return OpCase(name=name, op=PLACES, args=lambda dtype: (_mask(rows), torch.zeros(len(rows), new, dtype=torch.int64)))


def _last(name: str, rows: Sequence[str]) -> OpCase:
    mask = _mask(rows)
    return OpCase(name=name, op=LAST, args=lambda dtype: (torch.arange(mask.numel() * 3).view(*mask.shape, 3).to(dtype), mask))


def _from(name: str, first: int) -> OpCase:
    return OpCase(name=name, op=FROM, args=lambda dtype: (torch.arange(24).view(2, 4, 3).to(dtype), torch.tensor([first])))


def _mask(rows: Sequence[str]) -> Tensor:
    return torch.tensor([[int(digit) for digit in row] for row in rows])


def _write(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    k_slots, v_slots = _by_slot(k_cache, v_cache)
    block_size = k_slots.shape[1]
    for t, slot in enumerate(slots.tolist()):
        if slot >= 0:
            k_slots[slot // block_size, slot % block_size] = k[t]
            v_slots[slot // block_size, slot % block_size] = v[t]


def _by_slot(k_cache: Tensor, v_cache: Tensor) -> tuple[Tensor, Tensor]:
    """Return both caches seen as [blocks, block_size, KV, D]."""
    return k_cache.permute(0, 3, 1, 2), v_cache.transpose(1, 2)


def attend_naively(
    query: list[float],
    keys: list[list[float]],
    values: list[list[float]],
    sink: float | None,
    scale: float,
    added: Sequence[float] | None = None,
) -> Tensor:
    """Return one head's result for one token, [D]; `added` is added to the scores."""
    scores = [math.fsum(a * b for a, b in zip(query, key, strict=True)) * scale for key in keys]
    scores = [score + more for score, more in zip(scores, added or [0.0] * len(keys), strict=True)]
    top = max(scores + ([] if sink is None else [sink]), default=0.0)
    weights = [math.exp(score - top) for score in scores]
    total = math.fsum(weights) + (0.0 if sink is None else math.exp(sink - top))
    columns = ([value[d] for value in values] for d in range(len(query)))
    result = [math.fsum(w * x for w, x in zip(weights, column, strict=True)) / (total or 1.0) for column in columns]
    return torch.tensor(result, dtype=torch.float64)


def _one(sink: Tensor | None, head: int) -> float | None:
    return None if sink is None else float(sink[head])


def _naive_dense(q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, window: int, scale: float) -> Tensor:
    out, group = torch.zeros(q.shape, dtype=torch.float64), q.shape[2] // k.shape[2]
    for b in range(q.shape[0]):
        for i in range(q.shape[1]):
            keys = [j for j in range(i + 1) if not window or j > i - window]
            for h in range(q.shape[2]):
                column, values = ([x[b, j, h // group].tolist() for j in keys] for x in (k, v))
                out[b, i, h] = attend_naively(
                    q[b, i, h].tolist(), column, values, None if sink is None else float(sink[h]), scale
                )
    return out


def _naive_paged(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    query_start: Tensor,
    kv_lens: Tensor,
    slots: Tensor,
    block_table: Tensor,
    window: int,
    scale: float,
) -> Tensor:
    _write(k, v, k_cache, v_cache, slots)
    return _naive_cached(q, sink, k_cache, v_cache, query_start, kv_lens, block_table, window, scale, False)


def _naive_cached(
    q: Tensor,
    sink: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    query_start: Tensor,
    kv_lens: Tensor,
    block_table: Tensor,
    window: int,
    scale: float,
    decode: bool,
) -> Tensor:
    k_cache, v_cache = _by_slot(k_cache, v_cache)
    block_size, group = k_cache.shape[1], q.shape[1] // k_cache.shape[2]
    out = torch.zeros(q.shape, dtype=torch.float64)
    for n, length in enumerate(kv_lens.tolist()):
        start, end = query_start[n : n + 2].tolist()
        for t in range(start, end):
            i = length - (end - t)
            keys = [j for j in range(i + 1) if not window or j > i - window]
            places = [(int(block_table[n, j // block_size]), j % block_size) for j in keys]
            for h in range(q.shape[1]):
                column, values = ([cache[(*place, h // group)].tolist() for place in places] for cache in (k_cache, v_cache))
                out[t, h] = attend_naively(q[t, h].tolist(), column, values, _one(sink, h), scale)
    return out


def _naive_past(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink: Tensor | None,
    past_k: Tensor | None,
    past_v: Tensor | None,
    mask: Tensor,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    keys, values = k.transpose(1, 2), v.transpose(1, 2)
    if past_k is not None and past_v is not None:
        keys, values = torch.cat([past_k, keys], 2), torch.cat([past_v, values], 2)
    out, group, past = torch.zeros(q.shape, dtype=torch.float64), q.shape[2] // k.shape[2], mask.shape[1] - q.shape[1]
    for b, row in enumerate(mask.tolist()):
        for i in range(q.shape[1]):
            seen = [j for j in range(mask.shape[1]) if row[j] and sum(row[:j]) <= sum(row[: past + i])]
            seen = [j for j in seen if not window or sum(row[:j]) > sum(row[: past + i]) - window]
            for h in range(q.shape[2]):
                column, rows = ([x[b, h // group, j].tolist() for j in seen] for x in (keys, values))
                out[b, i, h] = attend_naively(q[b, i, h].tolist(), column, rows, _one(sink, h), scale)
    return out, keys, values


def _naive_places(mask: Tensor, ids: Tensor) -> Tensor:
    return torch.tensor([[sum(row[:i]) for i in range(len(row) - ids.shape[1], len(row))] for row in mask.tolist()])


def _naive_last(x: Tensor, mask: Tensor) -> Tensor:
    ends = ["".join(map(str, row)).rfind("1") for row in mask.tolist()]
    return torch.stack([row[max(0, end)] for row, end in zip(x.double(), ends, strict=True)])[:, None]


def _naive_from(x: Tensor, first: Tensor) -> Tensor:
    return torch.stack([torch.stack([*row][int(first) :]) for row in x.double()])


CASES = (
    _dense("one token", 1, 1, 4, 2, 16, 0),
    _dense("full", 2, 9, 6, 2, 8, 0),
    _dense("window", 1, 13, 4, 1, 8, 5),
    _dense("window of one", 1, 4, 2, 2, 8, 1, sink=False),
    _dense("strided, no sink", 2, 7, 4, 4, 6, 3, sink=False, strided=True),
    paged_case("one token, nothing before", [(0, 1)], 4, 2, 16, 0),
    paged_case("decode", [(11, 1)], 4, 2, 16, 0),
    paged_case("decode in a window", [(11, 1)], 4, 2, 16, 5),
    paged_case("window of one", [(6, 3)], 4, 2, 8, 1),
    paged_case("prefill around the window", [(0, 6), (0, 7), (0, 8)], 2, 1, 8, 7),
    paged_case("keys around the window", [(5, 1), (6, 1), (7, 1), (8, 1), (20, 2)], 2, 1, 8, 7),
    paged_case("chunks around the window", [(5, 4), (7, 7), (13, 3)], 6, 2, 12, 7, sink=False),
    paged_case("odd sizes, no grouping", [(3, 5), (0, 2)], 3, 3, 5, 0, block_size=3),
    paged_case("group of five", [(9, 2), (1, 1)], 10, 2, 20, 0, block_size=1),
    paged_case("group of eight", [(70, 1), (3, 1)], 8, 1, 64, 0, block_size=16, sink=False),
    paged_case("an empty sequence and one without new tokens", [(4, 2), (0, 0), (9, 0), (2, 3)], 4, 2, 8, 4),
    paged_case("only an empty sequence", [(0, 0)], 4, 2, 8, 4, padding=2),
    paged_case("padding", [(4, 2), (0, 3)], 4, 2, 8, 0, padding=3),
    paged_case("strided", [(4, 2), (0, 3)], 4, 2, 8, 0, strided=True),
    paged_case("longer than a tile", [(118, 6), (59, 1), (60, 1), (61, 1)], 4, 2, 16, 0, block_size=8),
    paged_case("window longer than a tile", [(150, 4), (0, 90)], 4, 2, 16, 77, block_size=16),
    paged_case("longer than a segment", [(1030, 3), (5, 1)], 4, 2, 8, 0),
    paged_case("a long decode", [(1100, 1)], 8, 1, 64, 0, block_size=16),
    paged_case("a window across segments", [(510, 5), (506, 7)], 4, 1, 20, 5, sink=False),
    paged_case("strips of all heights", [(0, 1), (70, 2), (0, 3), (60, 4), (3, 5)], 5, 1, 16, 20, block_size=16),
    cached_case("any mix", paged_case("", [(4, 2), (0, 0), (9, 0), (2, 3)], 4, 2, 8, 4, padding=2)),
    cached_case("decode", paged_case("", [(11, 1), (0, 1), (7, 1)], 4, 2, 16, 5), decode=True),
    cached_case("decode of a padded batch", paged_case("", [(11, 1), (0, 0)], 6, 2, 16, 0, padding=1, sink=False), decode=True),
    _past("no past", ["111", "111"], 3, 4, 2, 8, 0),
    _past("no past, padded on both sides", ["11100", "00111", "01110"], 5, 4, 2, 8, 2),
    _past("one token", ["111111"], 1, 6, 2, 8, 0, sink=False),
    _past("a chunk around the window", ["1111111111"], 4, 4, 1, 8, 5),
    _past("a decode after prompts of several lengths", ["1111111", "1100001", "0001111", "0000001"], 1, 4, 2, 8, 3),
    _past("a row of padding alone", ["000", "111"], 2, 2, 2, 6, 0),
    _places("no past", ["1111", "0011", "1100"], 4),
    _places("past", ["111011", "000001"], 2),
    *(_from(f"from {first}", first) for first in (0, 3, -1, -3)),
    _last("padding on any side", ["11100", "00111", "01010", "11111", "00000"]),
)
NAIVE = {
    DENSE: _naive_dense,
    PAGED: _naive_paged,
    CACHED: _naive_cached,
    PAST: _naive_past,
    PLACES: _naive_places,
    LAST: _naive_last,
    FROM: _naive_from,
}
