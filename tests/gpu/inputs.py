"""Random arguments of the kernels at the released models' shapes, on any device; on `meta` they are shapes alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
BLOCK = 64
ALPHA, LIMIT, EPS = 1.702, 7.0, 1e-5


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a model's layer. `rotated`: dims of a head that turn."""

    hidden: int = 2880
    inner: int = 2880
    heads: int = 64
    kv: int = 8
    dim: int = 64
    rotated: int = 64
    experts: int = 32
    top_k: int = 4
    window: int = 128
    vocab: int = 201088
    dtype: torch.dtype = BF16


OSS_20B, OSS_120B = Shape(), Shape(experts=128)
NEOX_20B = Shape(hidden=6144, inner=24576, heads=64, kv=64, dim=96, rotated=24, window=0, vocab=50432, dtype=FP16)


class Maker:
    """Makes random tensors on a device; the same ones from the same seed."""

    def __init__(self, device: torch.device | str, seed: int = 0) -> None:
        self.device = torch.device(device)
        self._on_device = None if self.meta else torch.Generator(self.device).manual_seed(seed)
        self.host = torch.Generator().manual_seed(seed)

    @property
    def meta(self) -> bool:
        """Tell whether tensors have no values."""
        return self.device.type == "meta"

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype = BF16) -> Tensor:
        """Return normal numbers."""
        if self.meta:
            return torch.empty(shape, dtype=dtype, device="meta")
        wide = FP32 if dtype != torch.float64 else dtype
        return torch.randn(shape, generator=self._on_device, device=self.device, dtype=wide).mul_(scale).to(dtype)

    def bytes(self, *shape: int, low: int = 0, high: int = 256) -> Tensor:
        """Return bytes from low to high - 1."""
        if self.meta:
            return torch.empty(shape, dtype=torch.uint8, device="meta")
        return torch.randint(low, high, shape, generator=self._on_device, device=self.device, dtype=torch.uint8)

    def values(self, numbers: Any, dtype: torch.dtype = torch.int64) -> Tensor:
        """Return given numbers, a list or a tensor of the host, on the device."""
        return torch.as_tensor(numbers, dtype=dtype).to(self.device)

    def filled(self, value: float, *shape: int, dtype: torch.dtype) -> Tensor:
        """Return a tensor of one value."""
        return torch.full(shape, value, dtype=dtype, device=self.device)


def inv_freq(make: Maker, shape: Shape) -> Tensor:
    """Return frequencies as GPT-OSS has them, but for YaRN's interpolation, float32."""
    return make.values(150000.0 ** (-torch.arange(shape.rotated // 2) * 2 / shape.rotated), FP32)


@dataclass(frozen=True, kw_only=True)
class Paged:
    """A step's tokens and the paged cache of one layer; `k`, `v` and `slots` are not yet stored."""

    q: Tensor
    k: Tensor
    v: Tensor
    sink: Tensor | None
    k_cache: Tensor
    v_cache: Tensor
    query_start: Tensor
    kv_lens: Tensor
    slots: Tensor
    table: Tensor


def paged(
    make: Maker,
    sequences: Sequence[tuple[int, int]],
    shape: Shape,
    *,
    window: int = 0,
    sink: bool = True,
    padding: int = 0,
    empty: Sequence[int] = (),
    block: int = BLOCK,
) -> Paged:
    """Return a step over `sequences`, the keys before it and the new tokens of each.

    Caches are NaN wherever no token may look. `padding` tokens belong to no sequence; the sequences `empty` become padding rows
    of a recorded decode: one token, kv_len 0, slot -1.
    """
    tokens = sum(new for _, new in sequences) + padding
    q, k, v = (make.normal(tokens, n, shape.dim, dtype=shape.dtype) for n in (shape.heads, shape.kv, shape.kv))
    columns = max(-(-(past + new) // block) for past, new in sequences) + 1
    numbers = (torch.randperm(len(sequences) * columns, generator=make.host) + 1).view(len(sequences), columns)
    table, slots, old = torch.zeros_like(numbers), list[Tensor](), list[Tensor]()
    for n, (past, new) in enumerate(sequences):
        oldest = max(0, past - window + 1) if window else 0
        used = slice(oldest // block, -(-(past + new) // block))
        table[n, used] = numbers[n, used]
        index = torch.arange(oldest, past + new)
        places = numbers[n, index // block] * block + index % block
        old.append(places[: past - oldest])
        slots.append(torch.full((new,), -1) if n in empty else places[past - oldest :])
    blocks = 1 + numbers.numel()
    caches = [
        make.filled(torch.nan, blocks, shape.kv, *tail, dtype=shape.dtype) for tail in ((shape.dim, block), (block, shape.dim))
    ]
    if not make.meta:
        before = torch.cat(old).to(make.device)
        for cache in (caches[0].permute(0, 3, 1, 2), caches[1].transpose(1, 2)):
            cache[before // block, before % block] = make.normal(len(before), shape.kv, shape.dim, dtype=shape.dtype)
    lengths = [0 if n in empty else past + new for n, (past, new) in enumerate(sequences)]
    return Paged(
        q=q,
        k=k,
        v=v,
        sink=make.normal(shape.heads, dtype=shape.dtype) if sink else None,
        k_cache=caches[0],
        v_cache=caches[1],
        query_start=make.values([0, *torch.tensor([new for _, new in sequences]).cumsum(0).tolist()]),
        kv_lens=make.values(lengths),
        slots=make.values(torch.cat([*slots, torch.full((padding,), -1)])),
        table=make.values(table),
    )


def attention(
    make: Maker, sequences: Sequence[tuple[int, int]], shape: Shape, window: int, decode: bool, **more: Any
) -> tuple[Any, ...]:
    """Return arguments of `sink_attention_cached`, the step's keys and values stored."""
    from oxfuse.passes.fusions.sink_attention.reference import store

    step = paged(make, sequences, shape, window=window, **more)
    if not make.meta:
        store(step.k, step.v, step.k_cache, step.v_cache, step.slots)
    over = step.k_cache, step.v_cache, step.query_start, step.kv_lens, step.table
    return step.q, step.sink, *over, window, shape.dim**-0.5, decode


def whole(make: Maker, batch: int, tokens: int, room: int, shape: Shape, sink: bool) -> tuple[Any, ...]:
    """Return queries, and keys and values as caches of models hold them, heads first; and a sink."""
    lying = ((shape.heads, tokens), (shape.kv, room), (shape.kv, room))
    q, k, v = (make.normal(batch, *sizes, shape.dim, dtype=shape.dtype).transpose(1, 2) for sizes in lying)
    return q, k, v, make.normal(shape.heads, dtype=shape.dtype) if sink else None


def masked(
    make: Maker,
    batch: int,
    tokens: int,
    room: int,
    past: int,
    shape: Shape,
    *,
    window: int = 0,
    added: bool = False,
    sink: bool = True,
) -> tuple[Any, ...]:
    """Return arguments of `masked_attention`: a cache with `room` keys, of which `past` are older than the tokens."""
    key, token = torch.arange(room), torch.arange(tokens)[:, None] + past
    visible = (key <= token) & (key > token - (window or room))
    mask = (
        make.values(torch.where(visible, 0.0, torch.finfo(shape.dtype).min), shape.dtype)
        if added
        else make.values(visible, torch.bool)
    )
    return *whole(make, batch, tokens, room, shape, sink), mask.expand(batch, 1, tokens, room).contiguous(), shape.dim**-0.5


def causal(make: Maker, batch: int, tokens: int, shape: Shape, *, window: int = 0, sink: bool = True) -> tuple[Any, ...]:
    """Return arguments of `sink_attention_dense`."""
    return *whole(make, batch, tokens, tokens, shape, sink), window, shape.dim**-0.5


def stored(make: Maker, sequences: Sequence[tuple[int, int]], shape: Shape) -> tuple[Any, ...]:
    """Return arguments of `store`."""
    step = paged(make, sequences, shape)
    return step.k, step.v, step.k_cache, step.v_cache, step.slots


def rotary(make: Maker, tokens: int, shape: Shape, start: int = 0) -> tuple[Any, ...]:
    """Return arguments of `rotary_embedding`."""
    q, k = (make.normal(tokens, n, shape.dim, dtype=shape.dtype) for n in (shape.heads, shape.kv))
    return q, k, make.values(torch.arange(start, start + tokens).flip(0)), inv_freq(make, shape), 1.3466


def rotary_store(make: Maker, sequences: Sequence[tuple[int, int]], shape: Shape, start: int = 0) -> tuple[Any, ...]:
    """Return arguments of `rotary_embedding_store`; q, k and v are slices of one projection."""
    step = paged(make, sequences, shape)
    tokens = step.slots.shape[0]
    projection = make.normal(tokens, shape.heads + 2 * shape.kv, shape.dim, dtype=shape.dtype)
    q, k, v = projection.split([shape.heads, shape.kv, shape.kv], 1)
    positions = make.values(torch.arange(start, start + tokens))
    return q, k, v, positions, inv_freq(make, shape), 1.3466, step.k_cache, step.v_cache, step.slots


def qkv(
    make: Maker, tokens: int, shape: Shape, *, bias: bool = True, one_matrix: bool = False, start: int = 100
) -> tuple[Any, ...]:
    """Return arguments of `qkv_rotary` for a token of each of `tokens` sequences; the last of several is a padding row.

    `one_matrix`: q, k and v of a head lie side by side, as GPT-NeoX has them.
    """
    empty = (tokens - 1,) if tokens > 1 else ()
    step = paged(make, [(start + 7 * n, 1) for n in range(tokens)], shape, window=1, empty=empty)
    weights: list[Tensor | None] = []
    for heads in (shape.heads, shape.kv, shape.kv):
        weights.append(make.normal(heads, shape.dim, shape.hidden, scale=shape.hidden**-0.5, dtype=shape.dtype))
        weights.append(make.normal(heads, shape.dim, dtype=shape.dtype) if bias else None)
    if one_matrix:
        joint = make.normal(shape.heads, 3, shape.dim, shape.hidden, scale=shape.hidden**-0.5, dtype=shape.dtype)
        offsets = make.normal(shape.heads, 3, shape.dim, dtype=shape.dtype)
        weights = [part[:, i] for i in range(3) for part in (joint, offsets)]
    x, positions = make.normal(tokens, shape.hidden, dtype=shape.dtype), make.values([start + 7 * n for n in range(tokens)])
    return x, *weights, positions, inv_freq(make, shape), 1.3466, step.k_cache, step.v_cache, step.slots


def linear(
    make: Maker,
    tokens: int,
    depth: int,
    outputs: int,
    *,
    bias: bool = True,
    activation: str = "none",
    dtype: torch.dtype = BF16,
) -> tuple[Any, ...]:
    """Return arguments of `linear_rows`."""
    weight = make.normal(outputs, depth, scale=depth**-0.5, dtype=dtype)
    return make.normal(tokens, depth, dtype=dtype), weight, make.normal(outputs, dtype=dtype) if bias else None, activation


def norm_router(make: Maker, tokens: int, shape: Shape) -> tuple[Any, ...]:
    """Return arguments of `norm_router`."""
    x, residual = (make.normal(tokens, shape.hidden, dtype=shape.dtype) for _ in range(2))
    router = make.normal(shape.experts, shape.hidden, scale=shape.hidden**-0.5, dtype=shape.dtype)
    return x, residual, make.normal(shape.hidden, dtype=shape.dtype), EPS, router, make.normal(shape.experts, dtype=shape.dtype)


def moe(
    make: Maker,
    tokens: int,
    shape: Shape,
    *,
    mxfp4: bool = True,
    columns: bool = False,
    only: Sequence[int] = (),
    given: bool = False,
) -> tuple[Any, ...]:
    """Return arguments of `moe_dispatch`, or, logits `given`, of `moe_experts`; `only`: experts that all tokens choose among.

    With `columns`, and without `mxfp4`, experts are views of their transposes.
    """
    experts, hidden, inner = shape.experts, shape.hidden, shape.inner

    def bank(rows: int, depth: int) -> tuple[Tensor, Tensor | None]:
        if not mxfp4:
            sizes = (depth, rows) if columns else (rows, depth)
            weight = make.normal(experts, *sizes, scale=depth**-0.5, dtype=shape.dtype)
            return weight.transpose(1, 2) if columns else weight, None
        return make.bytes(experts, rows, depth // 32, 16), make.bytes(experts, rows, depth // 32, low=117, high=121)

    x = make.normal(tokens, hidden, dtype=shape.dtype)
    router, bias = make.normal(experts, hidden, scale=hidden**-0.5, dtype=shape.dtype), make.normal(experts, dtype=shape.dtype)
    if only and not make.meta:
        bias[list(only)] += 100
    banks = *bank(2 * inner, hidden), make.normal(experts, 2 * inner, dtype=shape.dtype), *bank(hidden, inner)
    rest = *banks, make.normal(experts, hidden, dtype=shape.dtype), shape.top_k, ALPHA, LIMIT
    if not given:
        return x, router, bias, *rest
    logits = torch.nn.functional.linear(x.float(), router.float(), bias.float())
    return x, logits, *rest
