"""Times on the GPU: the 20b shape in full depth, and each kernel against the least that its bytes or operations can take here.

Kernels are timed inside a CUDA graph, so that Python's launches do not count, over copies of their inputs that together exceed
the L2 cache, as the layers of a model do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from . import inputs, peers
from .calls import OPS, Args, distinct_choices
from .document import Row
from .inputs import OSS_20B, Maker
from .lab import Lab, captured_times, copies_for, median, same
from .precompile import Job
from .steps import BUILD_SECONDS, full_model, shipped_fits, time_decode, time_prefill
from .worker import Found, Item, Note

NOMINAL = {"H200": 4.8e12, "H100": 3.35e12, "A100": 2.04e12, "B200": 8.0e12}
"""Bytes a second by the vendor's data sheets: the project's bar for decode is told in these."""
DECODE_BAR, ATTENTION_BAR = 0.6, 0.6
"""Shares of issue 12: decode of batch 1 of the weight-bandwidth ceiling, prefill attention of the measured bf16 product."""
BATCHES, CONTEXTS, PREFILLS = (1, 8, 32), (128, 4096, 32768), (512, 4096)


def items() -> Sequence[Item]:
    """Return the section's items, those with bars first."""
    start = 20 if shipped_fits() else BUILD_SECONDS
    return [
        Item(name="decode, batch 1", seconds=start + 5, run=partial(decode, batches=(1,))),
        Item(name="prefill attention", seconds=6, run=partial(kernels, cases=[case for case in cases() if case.bar])),
        Item(name="decode, larger batches", seconds=12, run=partial(decode, batches=BATCHES[1:])),
        Item(name="prefill", seconds=6, run=prefill),
        Item(name="kernels of a decode", seconds=25, run=partial(kernels, cases=[c for c in cases() if c.decode])),
        Item(
            name="kernels of a step", seconds=15, run=partial(kernels, cases=[c for c in cases() if not c.decode and not c.bar])
        ),
        *peers.items(),
    ]


def decode(lab: Lab, batches: Sequence[int]) -> Iterator[Found]:
    """Time decodes in full depth, with the host's work and without."""
    full = full_model(lab)
    name = torch.cuda.get_device_name(lab.device)
    nominal = next((rate for known, rate in NOMINAL.items() if known in name), lab.bandwidth)
    weights = full.token_bytes(1, 0)
    for batch in batches:
        for context in CONTEXTS:
            found = time_decode(full, batch, context)
            floor = full.token_bytes(batch, context) / lab.bandwidth
            cells = {
                "batch": batch,
                "context": context,
                "ms a step": 1e3 * found.wall,
                "tok/s": batch / found.wall,
                "GPU ms": 1e3 * found.gpu,
                "floor ms": 1e3 * floor,
                "share of bandwidth": floor / found.wall,
            }
            ceiling = nominal / weights
            judged = batch == 1 and context == CONTEXTS[0]
            bar = f"≥ {DECODE_BAR:.0%} of {ceiling:,.0f} tok/s" if judged else ""
            passed = 1 / found.wall >= DECODE_BAR * ceiling if judged else None
            yield Row(table="Decode, 24 layers, MXFP4 experts", cells=cells, bar=bar, passed=passed)
    yield Note(
        text=f"A token of batch 1 reads {weights / 1e9:.2f} GB of weights. The ceiling is that at {nominal / 1e12:.2f} TB/s; the "
        f"floor is that and the cache at the measured {lab.bandwidth / 1e12:.2f} TB/s. A step is timed with all that the host "
        "does; GPU ms is the recorded graph alone."
    )


def prefill(lab: Lab) -> Iterator[Found]:
    """Time prefills of one sequence in full depth."""
    full = full_model(lab)
    for tokens in PREFILLS:
        seconds = time_prefill(full, tokens)
        floor = full.cost.prefill_operations(tokens) / lab.matmul
        cells = {
            "tokens": tokens,
            "ms": 1e3 * seconds,
            "tok/s": tokens / seconds,
            "floor ms": 1e3 * floor,
            "share of matmul": floor / seconds,
        }
        yield Row(table=f"Prefill, 24 layers, chunks of {full.engine.chunk}", cells=cells)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One timed call. `cost(args)` returns the bytes that it must move and the operations that it must do."""

    op: str
    name: str
    args: Callable[[Maker], Args]
    cost: Callable[[Args], tuple[float, float]]
    decode: bool = True
    bar: float = 0.0


def cases() -> list[Case]:
    """Return what is timed, at the 20b shape."""
    shape, found = OSS_20B, []
    for rows in BATCHES:
        told = f"{rows} rows"
        found.append(Case(op="qkv_rotary", name=told, args=lambda m, n=rows: inputs.qkv(m, n, shape), cost=_weights_read))
        found.append(
            Case(
                op="linear_rows",
                name=f"output, {told}",
                args=lambda m, n=rows: inputs.linear(m, n, 4096, 2880),
                cost=_weights_read,
            )
        )
        head = partial(inputs.linear, tokens=rows, depth=2880, outputs=shape.vocab, bias=False)
        found.append(Case(op="linear_rows", name=f"head, {told}", args=lambda m, h=head: h(m), cost=_weights_read))
        found.append(Case(op="norm_router", name=told, args=lambda m, n=rows: inputs.norm_router(m, n, shape), cost=_norm))
        found.append(
            Case(op="moe_experts", name=told, args=lambda m, n=rows: inputs.moe(m, n, shape, given=True), cost=_experts_read)
        )
        for context, window in ((4095, 128), (4095, 0), (32767, 0)):
            args = partial(inputs.attention, sequences=[(context, 1)] * rows, shape=shape, window=window, decode=True)
            name = f"decode, {told}, {context + 1} keys{', window 128' * bool(window)}"
            found.append(Case(op="attention", name=name, args=lambda m, a=args: a(m), cost=_attention))
    for sequences, window, bar in (([(0, 4096)], 0, ATTENTION_BAR), ([(0, 4096)], 128, 0.0), ([(31744, 1024)], 0, ATTENTION_BAR)):
        args = partial(inputs.attention, sequences=sequences, shape=shape, window=window, decode=False)
        ((past, new),) = sequences
        name = f"prefill, {new} tokens{f' behind {past}' * bool(past)}{', window 128' * bool(window)}"
        found.append(Case(op="attention", name=name, args=lambda m, a=args: a(m), cost=_attention, decode=False, bar=bar))
    for tokens in (64, 512, 1024, 2048):
        args = partial(inputs.moe, tokens=tokens, shape=shape)
        found.append(Case(op="moe_dispatch", name=f"{tokens} tokens", args=lambda m, a=args: a(m), cost=_mixture, decode=False))
    turned = partial(inputs.rotary_store, sequences=[(0, 1024)], shape=shape)
    found.append(Case(op="rotary_store", name="1024 tokens", args=lambda m: turned(m), cost=_moved, decode=False))
    return found


def jobs(arch: int) -> Iterator[Job]:
    """Yield what launches the kernels of each case, for `precompile`."""
    for case in cases():
        yield partial(launch, case, arch)


def launch(case: Case, arch: int, wrap: Callable[[Any], Any], device: str) -> object:
    """Launch a case's kernels on a device through `wrap`."""
    return OPS[case.op].launch(wrap, case.args(Maker(device)), arch)


def kernels(lab: Lab, cases: Sequence[Case]) -> Iterator[Found]:
    """Time cases; one that fails is told, and the others go on while the GPU answers."""
    for case in cases:
        try:
            yield timed(lab, case)
        except Exception as error:
            if not lab.healthy():
                raise
            yield Row(
                table="Kernels",
                cells={"op": case.op, "case": case.name, "µs": None, "remark": f"{type(error).__name__}: {str(error)[:150]}"},
                bar="runs",
                passed=False,
            )
        lab.tidy()


def timed(lab: Lab, case: Case) -> Row:
    """Return a case's time beside its floor."""
    seconds, recorded, (bytes_, operations) = seconds_of(lab, case)
    by_bytes, by_operations = bytes_ / lab.bandwidth, operations / lab.matmul
    bound = "matmul" if by_operations > by_bytes else "bandwidth"
    floor = max(by_bytes, by_operations)
    cells: dict[str, Any] = {
        "op": case.op,
        "case": case.name,
        "µs": 1e6 * seconds,
        "floor µs": 1e6 * floor,
        "bound by": bound,
        "share": floor / seconds,
        "TB/s": bytes_ / seconds / 1e12,
        "TFLOP/s": operations / seconds / 1e12,
    }
    if not recorded:
        cells["remark"] = "not recorded: with Python's launches"
    if not case.bar:
        return Row(table="Kernels", cells=cells)
    share = by_operations / seconds
    return Row(table="Kernels", cells=cells, bar=f"≥ {case.bar:.0%} of the matmul rate", passed=share >= case.bar)


def seconds_of(lab: Lab, case: Case, rounds: int = 12) -> tuple[float, bool, tuple[float, float]]:
    """Return the median seconds of a call, whether it was recorded, and its bytes and operations."""
    first = case.args(Maker(lab.device))
    cost = case.cost(first)
    variants = [first, *(case.args(Maker(lab.device, seed)) for seed in range(1, copies_for(cost[0])))]
    run = OPS[case.op].launch
    seconds, recorded = captured_times([partial(run, same, args, lab.arch) for args in variants], rounds)
    return median(seconds), recorded, cost


def _weights_read(args: Args) -> tuple[float, float]:
    """Cost of products of few rows: all matrices behind the first argument are read once."""
    weights = [value for value in args[1:] if isinstance(value, torch.Tensor) and value.dim() >= 2]
    return sum(weight.nbytes for weight in weights), 2.0 * args[0].shape[0] * sum(weight.numel() for weight in weights)


def _norm(args: Args) -> tuple[float, float]:
    """Cost of `norm_router`: two inputs, two results of their size, the router."""
    return 4.0 * args[0].nbytes + args[4].nbytes, 2.0 * args[0].shape[0] * args[4].numel()


def _banks(args: Args) -> tuple[float, float, int]:
    """Return the bytes of one expert, the multiplications of one token and expert, and how many experts there are."""
    gate_up, gate_up_scales, _, down, down_scales, _ = args[-9:-3]
    experts = gate_up.shape[0]
    held = sum(part.nbytes for part in (gate_up, gate_up_scales, down, down_scales) if part is not None)
    outputs, depth, inner = gate_up.shape[1], args[0].shape[1], gate_up.shape[1] // 2
    return held / experts, outputs * depth + inner * depth, experts


def _experts_read(args: Args) -> tuple[float, float]:
    """Cost of `moe_experts`: the experts that some row chose are read once."""
    bytes_, numbers, _ = _banks(args)
    top_k = args[-3]
    return bytes_ * distinct_choices(args[1], top_k), 2.0 * args[0].shape[0] * top_k * numbers


def _mixture(args: Args) -> tuple[float, float]:
    """Cost of `moe_dispatch`."""
    bytes_, numbers, _ = _banks(args)
    top_k = args[-3]
    logits = torch.nn.functional.linear(args[0].float(), args[1].float(), args[2].float())
    tokens = args[0].nbytes * (1 + top_k)
    return bytes_ * distinct_choices(logits, top_k) + tokens, 2.0 * args[0].shape[0] * top_k * numbers


def _attention(args: Args) -> tuple[float, float]:
    """Cost of attention: keys and values that some token sees are read once; only pairs that see each other are multiplied."""
    q, _, k_cache, _, query_start, kv_lens, _, window, _, _ = args
    heads, dim, kv = q.shape[1], q.shape[2], k_cache.shape[1]
    keys = pairs = 0
    counts = (query_start[1:] - query_start[:-1]).tolist()
    for count, length in zip(counts, kv_lens.tolist(), strict=True):
        for place in range(length - count, length):
            pairs += min(place + 1, window) if window else place + 1
        keys += min(length, count + window - 1) if window else length
    return 2.0 * keys * kv * dim * k_cache.itemsize + 2 * q.nbytes, 4.0 * pairs * heads * dim


def _moved(args: Args) -> tuple[float, float]:
    """Cost of a rotation with its store: queries, keys and values are read and written."""
    return 2.0 * sum(value.numel() * value.itemsize for value in args[:3]), 0.0
