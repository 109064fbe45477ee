"""Every kernel against its reference on the GPU, at the released models' shapes and at their edges.

As in the tests under Triton's interpreter: in 16 bits the RMS error against float64 must not exceed 1.2 times that of the plain
op in the same dtype, in float32 the worst error 1e-5 of the largest result; the same call twice gives the same bits; what must
not be looked at is NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..fusions.triton_tolerances import FLOAT32_RELATIVE, RMS_RATIO, rms_error
from . import inputs
from .calls import OPS, Args, Call, Op, called, copied, sure_choices
from .document import Row
from .inputs import BF16, FP16, FP32, NEOX_20B, OSS_20B, OSS_120B, Maker, Shape
from .lab import Lab, same
from .precompile import Job
from .worker import Found, Item

SECONDS = 1.5
"""Of a call, its kernels compiled beforehand or quickly."""
MIX = ((0, 1), (37, 1), (5, 200), (1500, 100), (127, 1), (128, 1), (126, 60), (0, 33))
ONES = (0, 14, 62, 126, 127, 128, 4095, 32767)
NARROW = Shape(heads=8, kv=8, dim=64)


def items() -> Sequence[Item]:
    """Return an item for each call: one that ends the process takes no other with it."""
    found = [Item(name=f"{call.op}: {call.name}", seconds=SECONDS, run=partial(check, call=call)) for call in calls()]
    return [*found, Item(name="bodies of the ops", seconds=5, run=bodies)]


def calls() -> list[Call]:
    """Return all calls, those of the 20b model's decode and step programs first."""
    return [*_released(OSS_20B, "20b"), *_edges(), *_released(OSS_120B, "120b")[-6:], *_neox(), *_head_dims(), *_live()]


def jobs(arch: int) -> Iterator[Job]:
    """Yield what launches the kernels of each call, for `precompile`."""
    for call in calls():
        yield partial(launch, call, arch)


def launch(call: Call, arch: int, wrap: Callable[[Any], Any], device: str) -> object:
    """Launch a call's kernels on a device through `wrap`."""
    return OPS[call.op].launch(wrap, call.args(Maker(device)), arch)


def _ones(lengths: Sequence[int]) -> list[tuple[int, int]]:
    return [(length, 1) for length in lengths]


def _released(shape: Shape, name: str) -> list[Call]:
    """Return the calls of one model; the last six are those that depend on the number of experts."""
    found = []
    for tokens in (1, 8, 33):
        found.append(Call(op="qkv_rotary", name=f"{name}, {tokens} rows", args=lambda m, t=tokens: inputs.qkv(m, t, shape)))
        found.append(
            Call(op="linear_rows", name=f"{name} output, {tokens} rows", args=lambda m, t=tokens: inputs.linear(m, t, 4096, 2880))
        )
    head = partial(inputs.linear, tokens=8, depth=2880, outputs=shape.vocab, bias=False)
    found.append(Call(op="linear_rows", name=f"{name} head, 8 rows", args=lambda m: head(m)))
    for window in (0, shape.window):
        told = f"window {window}" if window else "full"
        for kind, sequences, more in (
            ("decode, up to 32k", _ones(ONES), {"empty": (1,)}),
            ("decode, 64 rows", _ones(range(1, 1025, 16)), {"empty": (60, 61, 62, 63)}),
        ):
            args = partial(inputs.attention, sequences=sequences, shape=shape, window=window, decode=True, **more)
            found.append(Call(op="attention", name=f"{name} {kind}, {told}", args=lambda m, a=args: a(m)))
        for kind, sequences in (("step of 2048", [(0, 2048)]), ("mixed step", MIX), ("chunk behind 3072", [(3072, 1024)])):
            args = partial(
                inputs.attention, sequences=sequences, shape=shape, window=window, decode=False, padding=5 * (kind[0] == "m")
            )
            found.append(Call(op="attention", name=f"{name} {kind}, {told}", args=lambda m, a=args: a(m)))
    found.append(Call(op="store", name=f"{name} mixed step", args=lambda m: inputs.stored(m, MIX, shape)))
    found.append(Call(op="rotary", name=f"{name}, 512 tokens", args=lambda m: inputs.rotary(m, 512, shape)))
    found.append(Call(op="rotary", name=f"{name}, the last positions", args=lambda m: inputs.rotary(m, 7, shape, 131065)))
    found.append(Call(op="rotary_store", name=f"{name} mixed step", args=lambda m: inputs.rotary_store(m, MIX, shape, 1000)))
    for tokens in (1, 8):
        found.append(
            Call(op="norm_router", name=f"{name}, {tokens} rows", args=lambda m, t=tokens: inputs.norm_router(m, t, shape))
        )
    for tokens in (1, 8):
        found.append(
            Call(op="moe_experts", name=f"{name}, {tokens} rows", args=lambda m, t=tokens: inputs.moe(m, t, shape, given=True))
        )
    for tokens in (7, 512):
        found.append(Call(op="moe_dispatch", name=f"{name}, {tokens} tokens", args=lambda m, t=tokens: inputs.moe(m, t, shape)))
    return found


def _edges() -> list[Call]:
    few = (3, 7, 11, 20)
    bf16_experts = partial(inputs.moe, shape=replace(OSS_20B, experts=8), mxfp4=False)
    found = [
        Call(op="moe_dispatch", name="20b, one token", args=lambda m: inputs.moe(m, 1, OSS_20B)),
        Call(op="moe_dispatch", name="20b, 2048 tokens", args=lambda m: inputs.moe(m, 2048, OSS_20B)),
        Call(op="moe_dispatch", name="20b, 300 tokens on four experts", args=lambda m: inputs.moe(m, 300, OSS_20B, only=few)),
        Call(op="moe_experts", name="20b, 33 rows", args=lambda m: inputs.moe(m, 33, OSS_20B, given=True)),
        Call(
            op="moe_experts", name="20b, 64 rows on four experts", args=lambda m: inputs.moe(m, 64, OSS_20B, only=few, given=True)
        ),
        Call(op="moe_dispatch", name="bf16 experts, 200 tokens", args=lambda m: bf16_experts(m, tokens=200)),
        Call(op="moe_experts", name="bf16 experts, 8 rows", args=lambda m: bf16_experts(m, tokens=8, given=True)),
        Call(
            op="moe_dispatch",
            name="float32, 40 tokens",
            args=lambda m: inputs.moe(m, 40, replace(OSS_20B, experts=6, dtype=FP32)),
        ),
        Call(op="linear_rows", name="odd sizes, 3 rows", args=lambda m: inputs.linear(m, 3, 1031, 77)),
        Call(op="linear_rows", name="tanh, 3 rows", args=lambda m: inputs.linear(m, 3, 1024, 4096, activation="gelu_tanh")),
        Call(op="linear_rows", name="SiLU, 3 rows", args=lambda m: inputs.linear(m, 3, 1024, 4096, activation="silu")),
        Call(op="linear_rows", name="float32, 5 rows", args=lambda m: inputs.linear(m, 5, 2880, 4096, dtype=FP32)),
        Call(op="norm_router", name="20b, 64 rows", args=lambda m: inputs.norm_router(m, 64, OSS_20B)),
        Call(op="norm_router", name="float32, 3 rows", args=lambda m: inputs.norm_router(m, 3, replace(OSS_20B, dtype=FP32))),
    ]
    for name, window, sequences, decode, shape in (
        ("one token alone", 0, [(0, 1)], True, OSS_20B),
        ("one token alone, step", 0, [(0, 1)], False, OSS_20B),
        ("one KV head", 0, _ones(ONES[:6]), True, replace(OSS_20B, heads=16, kv=1)),
        ("one KV head, step", 128, MIX, False, replace(OSS_20B, heads=16, kv=1)),
        ("a window of 1", 1, MIX, False, NARROW),
        ("a window of 600, decode", 600, _ones(ONES[:7]), True, NARROW),
        ("float32", 128, MIX, False, replace(NARROW, dtype=FP32)),
        ("float32, decode", 0, _ones(ONES[:7]), True, replace(NARROW, dtype=FP32)),
    ):
        args = partial(inputs.attention, sequences=sequences, shape=shape, window=window, decode=decode)
        found.append(Call(op="attention", name=name, args=lambda m, a=args: a(m)))
    no_sink = partial(inputs.attention, sequences=MIX, shape=NARROW, window=0, decode=False, sink=False)
    return [*found, Call(op="attention", name="no sink, step", args=lambda m: no_sink(m))]


def _neox() -> list[Call]:
    found = []
    for dtype in (FP16, BF16):
        shape, name = replace(NEOX_20B, dtype=dtype), f"NeoX 20b {str(dtype).removeprefix('torch.')}"
        for kind, sequences, decode in (("decode", _ones(ONES[:7]), True), ("step", MIX, False)):
            args = partial(inputs.attention, sequences=sequences, shape=shape, window=0, decode=decode, sink=False)
            found.append(Call(op="attention", name=f"{name} {kind}", args=lambda m, a=args: a(m)))
        found.append(
            Call(op="rotary_store", name=f"{name}, 24 dims turn", args=lambda m, s=shape: inputs.rotary_store(m, MIX, s))
        )
        rows = partial(inputs.linear, tokens=8, depth=6144, outputs=24576, activation="gelu", dtype=dtype)
        found.append(Call(op="linear_rows", name=f"{name}, 8 rows through GELU", args=lambda m, r=rows: r(m)))
        joint = partial(inputs.qkv, tokens=8, shape=shape, one_matrix=True)
        found.append(Call(op="qkv_rotary", name=f"{name}, one matrix, 8 rows", args=lambda m, j=joint: j(m)))
    return found


def _head_dims() -> list[Call]:
    found = []
    for dim in (32, 80, 128, 256):
        shape = Shape(heads=8, kv=8, dim=dim, rotated=dim // 4 // 2 * 2, dtype=FP16 if dim == 80 else BF16)
        for kind, sequences, decode in (("decode", _ones(ONES[:6]), True), ("step", MIX, False)):
            args = partial(inputs.attention, sequences=sequences, shape=shape, window=0, decode=decode, sink=False)
            found.append(Call(op="attention", name=f"head_dim {dim}, {kind}", args=lambda m, a=args: a(m)))
    return found


def _live() -> list[Call]:
    """Return the calls of models in memory: caches and masks of their own, experts as columns."""
    found = []
    for name, shape, sink in (
        ("20b", OSS_20B, True),
        ("NeoX 20b", NEOX_20B, False),
        ("head_dim 80", Shape(heads=8, kv=8, dim=80, dtype=FP16), False),
        ("head_dim 128", Shape(heads=8, kv=8, dim=128), False),
        ("head_dim 256", Shape(heads=8, kv=8, dim=256), False),
        ("float32", replace(OSS_20B, dtype=FP32), True),
        ("float32, head_dim 96", replace(NARROW, dim=96, dtype=FP32), False),
        ("float32, head_dim 256", replace(NARROW, dim=256, dtype=FP32), False),
    ):
        for added in (False, True) if shape.heads == 64 else (True,):
            of = partial(inputs.masked, batch=2, room=4096, shape=shape, sink=sink, added=added)
            told = f"{name}, mask {'added' if added else 'of bools'}"
            for kind, sizes in (("decode", (1, 2900)), ("step of 300", (300, 1500))):
                args = partial(of, tokens=sizes[0], past=sizes[1])
                found.append(Call(op="masked_attention", name=f"{told}, {kind}", args=lambda m, a=args: a(m)))
        whole = partial(inputs.causal, batch=2, tokens=1000, shape=shape, sink=sink)
        found.append(Call(op="causal_attention", name=name, args=lambda m, a=whole: a(m)))
    windowed = partial(inputs.masked, batch=3, tokens=1, room=1000, past=700, shape=OSS_20B, window=128, added=True)
    found.append(Call(op="masked_attention", name="20b, window 128, decode", args=lambda m: windowed(m)))
    found.append(
        Call(op="causal_attention", name="20b, window 128", args=lambda m: inputs.causal(m, 2, 1000, OSS_20B, window=128))
    )
    for name, dtype in (("bf16", BF16), ("float32", FP32)):
        experts = partial(inputs.moe, shape=replace(OSS_20B, experts=8, dtype=dtype), mxfp4=False, columns=True)
        for tokens in (1, 200):
            args = partial(experts, tokens=tokens)
            found.append(Call(op="moe_dispatch", name=f"{name} experts as columns, {tokens} tokens", args=lambda m, a=args: a(m)))
        args = partial(experts, tokens=8, given=True)
        found.append(Call(op="moe_experts", name=f"{name} experts as columns, 8 rows", args=lambda m, a=args: a(m)))
    return found


def check(lab: Lab, call: Call) -> Iterator[Found]:
    """Run a call's kernels twice and the plain op in its dtype and in float64, and compare."""
    op, args = OPS[call.op], call.args(Maker(lab.device))
    got = op.launch(same, copied(op, args), lab.arch)
    again = op.launch(same, copied(op, args), lab.arch)
    torch.cuda.synchronize()
    twice = all(torch.equal(a.nan_to_num(7.5), b.nan_to_num(7.5)) for a, b in zip(got, again, strict=True))
    del again
    yield compare(call, op, args, got, twice)


def bodies(lab: Lab) -> Iterator[Found]:
    """Compare what torch's ops give, whose bodies launch the kernels, with what the kernels gave, bit for bit."""
    for name, op in OPS.items():
        call = next(call for call in calls() if call.op == name)
        if op.torch_op:
            args = call.args(Maker(lab.device))
            pairs = zip(called(op, args), op.launch(same, copied(op, args), lab.arch), strict=True)
            equal = all(torch.equal(a.nan_to_num(7.5), b.nan_to_num(7.5)) for a, b in pairs)
            cells = {"op": f"oxfuse::{op.torch_op}", "case": call.name, "same bits": equal}
            yield Row(table="torch's ops against their kernels", cells=cells, bar="yes", passed=equal)


def compare(call: Call, op: Op, args: Args, got: Sequence[Tensor], twice: bool) -> Row:
    """Return the row of a call: its worst result against its bar."""
    plain, wide = op.plain(copied(op, args)), copied(op, args, torch.float64)
    exact = list(op.plain(wide))
    if call.op == "norm_router":  # its logits are those of the normed values as they were rounded
        exact[2] = torch.nn.functional.linear(got[0].double(), wide[4], wide[5])
    keep = _sure(call, wide)
    cells: dict[str, str | float | bool] = {"op": call.op, "case": call.name, "dtype": str(args[0].dtype).removeprefix("torch.")}
    share, same_nan, worst = -1.0, True, {}
    for mine, other, right in zip(got, plain, exact, strict=True):
        if keep is not None:
            mine, other, right = mine[keep], other[keep], right[keep]
        same_nan = same_nan and torch.equal(mine.isfinite(), right.isfinite())
        mine, other, right = (x.nan_to_num(0.0) for x in (mine, other, right))
        if op.bits:
            error, bar, floor = float(not torch.equal(mine, other)), 1.0, 0.0
            reached = error / 0.5
        elif mine.dtype == torch.float32:
            floor = (other.double() - right).abs().max().item()
            error, bar = (mine.double() - right).abs().max().item(), FLOAT32_RELATIVE * max(right.abs().max().item(), 1e-30)
            reached = error / bar
        else:
            error, floor = rms_error(mine, right), rms_error(other, right)
            bar = RMS_RATIO * floor + 1e-30
            reached = error / bar
        if reached > share:
            share, worst = reached, {"error": error, "plain op's": floor, "share of the bar": reached}
    cells |= {**worst, "same twice": twice, "same NaN": same_nan}
    if keep is not None and not bool(keep.all()):
        cells["tokens left out"] = int((~keep).sum())
    rule = (
        "same bits"
        if op.bits
        else f"{FLOAT32_RELATIVE:g} of the largest"
        if cells["dtype"] == "float32"
        else f"{RMS_RATIO} × plain"
    )
    return Row(table="", cells=cells, bar=rule, passed=share <= 1.0 and twice and same_nan)


def _sure(call: Call, wide: Args) -> Tensor | None:
    """Return which tokens count where experts are chosen: those whose choice does not hang on the last bits."""
    if call.op == "moe_experts":
        return sure_choices(wide[1], wide[-3])
    if call.op == "moe_dispatch":
        return sure_choices(torch.nn.functional.linear(wide[0], wide[1], wide[2]), wide[-3])
    return None
