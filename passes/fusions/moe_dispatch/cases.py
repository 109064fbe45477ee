"""Inputs for the contract tests of both ops, and their meaning once more, as a plain loop over tokens and their experts."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from oxfuse.passes.fusions.contract import OpCase
from oxfuse.passes.fusions.moe_dispatch.packed import PackedBlocks, PackedScales

DISPATCH, EXPERTS = "oxfuse::moe_dispatch", "oxfuse::moe_experts"
ALPHA, LIMIT = 1.702, 7.0


def _case(
    name: str,
    shape: tuple[int, ...],
    hidden: int,
    width: int,
    experts: int,
    top_k: int,
    *,
    mxfp4: bool = False,
    scales: tuple[int, int] = (119, 125),
    down_scales: tuple[int, int] = (119, 125),
    bias: Callable[[Tensor], Tensor] = lambda bias: bias,
    biases: float = 1.0,
    spread: float = 1.0,
    op: str = DISPATCH,
    columns: bool = False,
    packed: bool = False,
    int8: bool = False,
) -> OpCase:
    """`scales` bound the bytes of gate_up, `down_scales` of down; `bias` changes the router's, `biases` scales the experts'.

    With `columns` experts are views of their transposes; `packed` is a layout of MXFP4, whose activations may be `int8`.
    """

    def args(dtype: torch.dtype) -> tuple[Any, ...]:
        generator = torch.Generator().manual_seed(0)

        def random(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator)

        def weight(rows: int, length: int, scales: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
            if not mxfp4:
                dense = random(experts, rows, length).mul(length**-0.5).to(dtype)
                return dense.transpose(1, 2).contiguous().transpose(1, 2) if columns else dense, None
            blocks = torch.randint(0, 256, (experts, rows, length // 32, 16), dtype=torch.uint8, generator=generator)
            return blocks, torch.randint(*scales, (experts, rows, length // 32), dtype=torch.uint8, generator=generator)

        x, router, router_bias = random(*shape, hidden) * spread, random(experts, hidden), bias(random(experts))
        first, second = weight(2 * width, hidden, scales), weight(hidden, width, down_scales)
        if packed:
            first, second = (_packed(*bank, pairs) for bank, pairs in ((first, True), (second, False)))
        first_bias, second_bias = (random(experts, size).mul(biases).to(dtype) for size in (2 * width, hidden))
        rest = *first, first_bias, *second, second_bias, top_k, ALPHA, LIMIT, *(True,) * int8
        if op == EXPERTS:
            logits = x @ router.T + router_bias
            return x.to(dtype), logits.to(torch.promote_types(dtype, torch.float32)), *rest
        return x.to(dtype), router.to(dtype), router_bias.to(dtype), *rest

    kernels = ("cpu",) if packed else ("cuda",) if mxfp4 else ("cpu", "cuda")
    return OpCase(name=name, op=op, args=args, kernels=kernels, steps=int8)


def _packed(blocks: Tensor, scales: Tensor | None, pairs: bool) -> tuple[Tensor, Tensor]:
    assert scales is not None
    return PackedBlocks(pairs).apply(blocks).contiguous(), PackedScales(pairs).apply(scales).contiguous()


def _e2m1(code: int) -> float:
    sign, exponent, mantissa = code >> 3, code >> 1 & 3, code & 1
    return (-1.0) ** sign * (mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1))


def _unpacked(panels: Tensor, scales: Tensor, rows: int, pairs: bool) -> tuple[Tensor, Tensor]:
    """One expert's blocks [rows, K / 32, 16] and scales, nibble by nibble."""
    out = torch.zeros(rows, panels.shape[1], 16, dtype=torch.uint8)
    factors = torch.zeros(rows, panels.shape[1], dtype=torch.uint8)
    for row in range(rows):
        panel, lane = (2 * (row // 32) + row % 2, row % 32 // 2) if pairs else divmod(row, 16)
        factors[row] = scales[panel, :, lane]
        for k in range(32):
            place = (0, 4, 1, 5, 2, 6, 3, 7)[k % 8]  # of the eight nibbles of four bytes
            byte = panels[panel, :, k // 8 * 64 + lane * 4 + place // 2]
            out[row, :, k // 2] |= (byte >> 4 * (place % 2) & 15) << 4 * (k % 2)
    return out, factors


def _all_unpacked(panels: Tensor, scales: Tensor, rows: int, pairs: bool) -> tuple[Tensor, Tensor]:
    parts = [_unpacked(w, s, rows, pairs) for w, s in zip(panels, scales, strict=True)]
    return torch.stack([part[0] for part in parts]), torch.stack([part[1] for part in parts])


def _rows(weight: Tensor, scales: Tensor | None) -> Tensor:
    """One expert's matrix in float64, [rows, columns]; MXFP4 byte by byte."""
    if scales is None:
        return weight.to(torch.float64)
    rows = []
    for blocks, row_scales in zip(weight.tolist(), scales.tolist(), strict=True):
        row: list[float] = []
        for block, scale in zip(blocks, row_scales, strict=True):
            for byte in block:
                row += [math.ldexp(_e2m1(byte & 15), scale - 127), math.ldexp(_e2m1(byte >> 4), scale - 127)]
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64)


def _eight_bits(row: Tensor) -> Tensor:
    """Blocks of 32 in steps of 1/127 of their largest value."""
    out: list[float] = []
    for begin in range(0, len(row), 32):
        block = row[begin : begin + 32].tolist()
        step = max(map(abs, block)) / 127
        out += [round(value / step) * step for value in block]
    return torch.tensor(out, dtype=torch.float64)


def _naive_dispatch(x: Tensor, router_weight: Tensor, router_bias: Tensor, *rest: Any) -> Tensor:
    rows = x.reshape(-1, x.shape[-1]).double()
    logits = [[float(row @ token) for row in router_weight.double()] for token in rows]
    return _naive_experts(rows, torch.tensor(logits, dtype=torch.float64) + router_bias.double(), *rest).view(x.shape)


def _naive_experts(
    x: Tensor,
    router_logits: Tensor,
    gate_up: Tensor,
    gate_up_scales: Tensor | None,
    gate_up_bias: Tensor,
    down: Tensor,
    down_scales: Tensor | None,
    down_bias: Tensor,
    top_k: int,
    alpha: float,
    limit: float,
    int8: bool = False,
) -> Tensor:
    out = torch.zeros(x.shape, dtype=torch.float64)
    enter = _eight_bits if int8 else lambda row: row
    if gate_up_scales is not None and down_scales is not None and gate_up_scales.dim() == 4:
        gate_up, gate_up_scales = _all_unpacked(gate_up, gate_up_scales, gate_up_bias.shape[1], True)
        down, down_scales = _all_unpacked(down, down_scales, down_bias.shape[1], False)
    first, second = (
        [_rows(w[e], None if s is None else s[e]) for e in range(len(w))]
        for w, s in ((gate_up, gate_up_scales), (down, down_scales))
    )
    for token, logits, result in zip(x.double(), router_logits.tolist(), out, strict=True):
        chosen = sorted(range(len(logits)), key=lambda e: -logits[e])[:top_k]
        total = math.fsum(math.exp(logits[e]) for e in chosen)
        for e in chosen:
            pre = (first[e] @ enter(token) + gate_up_bias[e].double()).tolist()
            pairs = [(min(pre[2 * i], limit), max(-limit, min(pre[2 * i + 1], limit))) for i in range(len(pre) // 2)]
            hidden = [(up + 1) * gate / (1 + math.exp(-alpha * gate)) for gate, up in pairs]
            y = second[e] @ enter(torch.tensor(hidden, dtype=torch.float64)) + down_bias[e].double()
            result += math.exp(logits[e]) / total * y
    return out


def _one_expert(bias: Tensor) -> Tensor:
    return bias.index_fill(0, torch.tensor([1]), 100.0)


def _empty_expert(bias: Tensor) -> Tensor:
    return bias.index_fill(0, torch.tensor([0, 2]), -100.0)


CASES = (
    _case("one token", (1,), 48, 40, 6, 3),
    _case("odd sizes", (5,), 19, 11, 5, 2),
    _case("smaller than a vector", (3,), 3, 1, 2, 1),
    _case("all experts chosen", (4,), 16, 16, 3, 3),
    _case("one expert", (9,), 20, 8, 1, 1),
    _case("leading dims", (2, 3), 32, 24, 4, 2),
    _case("empty experts", (30,), 32, 24, 5, 2, bias=_empty_expert),
    _case("all tokens on one expert", (150,), 34, 18, 3, 1, bias=_one_expert),
    _case("clamped", (6,), 32, 32, 4, 2, spread=20.0),
    _case("longer than a chunk", (13,), 520, 10, 3, 2),
    _case("many tokens", (160,), 96, 64, 8, 4),
    _case("columns, one token", (1,), 48, 40, 6, 3, columns=True),
    _case("columns, odd sizes", (5,), 19, 11, 5, 2, columns=True),
    _case("columns, smaller than a vector", (3,), 3, 1, 2, 1, columns=True),
    _case("columns, longer than a panel is deep", (13,), 520, 70, 3, 2, columns=True),
    _case("columns, more than are streamed", (3,), 36, 1030, 2, 1, columns=True),
    _case("columns, all tokens on one expert", (150,), 34, 98, 3, 1, bias=_one_expert, columns=True),
    _case("mxfp4, one token", (1,), 64, 32, 4, 2, mxfp4=True),
    _case("mxfp4, two blocks", (7,), 32, 64, 5, 3, mxfp4=True),
    _case("mxfp4, longer than a chunk", (12,), 544, 32, 3, 2, mxfp4=True),
    _case("mxfp4, smallest scales", (5,), 32, 32, 3, 2, mxfp4=True, scales=(0, 4), biases=0.0),
    _case("mxfp4, all tokens on one expert", (140,), 32, 32, 3, 1, mxfp4=True, bias=_one_expert),
    _case("packed, one token", (1,), 64, 32, 4, 2, mxfp4=True, packed=True),
    _case("packed, two to an expert", (4,), 32, 64, 2, 1, mxfp4=True, packed=True),
    _case("packed, three to an expert", (3,), 32, 64, 3, 3, mxfp4=True, packed=True),
    _case("packed, more than are streamed", (9,), 64, 96, 2, 2, mxfp4=True, packed=True),
    _case("packed, longer than a chunk", (12,), 544, 32, 3, 2, mxfp4=True, packed=True),
    _case("packed, smallest scales", (15,), 32, 352, 3, 2, mxfp4=True, packed=True, down_scales=(0, 4), biases=0.0),
    _case("packed, smallest scales, streamed", (2,), 32, 32, 3, 2, mxfp4=True, packed=True, down_scales=(0, 4), biases=0.0),
    _case(
        "packed, largest scales", (15,), 32, 32, 3, 2, mxfp4=True, packed=True, down_scales=(244, 250), spread=1e-3, biases=0.0
    ),
    _case("packed, all tokens on one expert", (250,), 32, 32, 3, 1, mxfp4=True, packed=True, bias=_one_expert),
    _case("packed, empty experts", (30,), 96, 64, 5, 2, mxfp4=True, packed=True, bias=_empty_expert),
    _case("int8, one token", (1,), 64, 32, 4, 2, mxfp4=True, packed=True, int8=True),
    _case("int8, two to an expert", (4,), 32, 64, 2, 1, mxfp4=True, packed=True, int8=True),
    _case("int8, three to an expert", (3,), 32, 64, 3, 3, mxfp4=True, packed=True, int8=True),
    _case("int8, more than are streamed", (9,), 64, 96, 2, 2, mxfp4=True, packed=True, int8=True),
    _case("int8, longer than a chunk", (22,), 544, 32, 3, 2, mxfp4=True, packed=True, int8=True),
    _case("int8, all tokens on one expert", (250,), 32, 32, 3, 1, mxfp4=True, packed=True, bias=_one_expert, int8=True),
    _case("int8, empty experts", (30,), 96, 64, 5, 2, mxfp4=True, packed=True, bias=_empty_expert, int8=True),
    _case("logits given, one token", (1,), 48, 40, 6, 3, op=EXPERTS),
    _case("logits given, odd sizes", (5,), 19, 11, 5, 2, op=EXPERTS),
    _case("logits given, columns", (5,), 19, 11, 5, 2, op=EXPERTS, columns=True),
    _case("logits given, all tokens on one expert", (20,), 34, 18, 3, 1, bias=_one_expert, op=EXPERTS),
    _case("logits given, mxfp4, empty experts", (6,), 64, 32, 5, 2, mxfp4=True, bias=_empty_expert, op=EXPERTS),
)
NAIVE = {DISPATCH: _naive_dispatch, EXPERTS: _naive_experts}
