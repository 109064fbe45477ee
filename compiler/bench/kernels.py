"""How fast the C++ ops are alone, at the shape of a gpt-oss-20b layer, beside what the machine can do.

    python -m oxfuse.compiler.bench.kernels [--threads N] [--rounds N] [--markdown FILE] [--json FILE]

One token is held against the read bandwidth, a prompt against the peak of the arithmetic that the op may use; both are probed in
the same run, the bandwidth in each round. Weights take turns, so that no cache holds what is read next. torch's own bfloat16
product is the peer of dense layers.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import cycle
from pathlib import Path

import click
import torch
from torch import Tensor

from oxfuse.compiler.backend import cpu_ops
from oxfuse.compiler.bench.probe import matmul_peak, read_bandwidth
from oxfuse.compiler.bench.speed import processor
from oxfuse.runtime.machine import processors

COLD = 1 << 30
"""Bytes of weights that take turns: several times what a last-level cache leaves to a guest."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a layer, and of its head."""

    hidden: int = 2880
    experts: int = 32
    top_k: int = 4
    heads: int = 64
    kv_heads: int = 8
    head_dim: int = 64
    vocabulary: int = 32000
    context: int = 4096
    prompt: int = 512


@dataclass(kw_only=True)
class Kernel:
    """An op at one number of tokens: `bytes` of weights or keys and values that a call reads, `operations` that it does.

    `calls` do the same with other weights; `samples` are seconds a call, `floor` is what they could be.
    """

    name: str
    tokens: int
    bytes: int
    operations: int
    calls: Sequence[Callable[[], object]]
    int8: bool = False
    samples: list[float] = field(default_factory=list)
    floor: float = float("nan")

    @property
    def seconds(self) -> float:
        """Return the median of the samples."""
        return statistics.median(self.samples)

    @property
    def line(self) -> str:
        """Return the row of the table."""
        rates = f"{self.bytes / self.seconds / 1e9:.1f} | {self.operations / self.seconds / 1e9:.0f}"
        times = f"{self.seconds * 1e3:.2f} | {self.floor * 1e3:.2f} | {self.floor / self.seconds:.0%}"
        return f"| {self.name} | {self.tokens} | {times} | {rates} |"


@dataclass(frozen=True, kw_only=True)
class KernelResult:
    """A run: `bandwidths` in bytes a second, one a round; `peak` and `int8_peak` in operations a second."""

    threads: int
    shape: Shape
    bandwidths: list[float]
    peak: float
    int8_peak: float
    kernels: list[Kernel]

    def to_json(self) -> str:
        """Return everything, samples included."""
        kernels = [{key: value for key, value in vars(kernel).items() if key != "calls"} for kernel in self.kernels]
        return (
            json.dumps({**vars(self), "processor": processor(), "shape": asdict(self.shape), "kernels": kernels}, indent=1) + "\n"
        )

    def to_markdown(self) -> str:
        """Return the figures as a table."""
        probes = self.bandwidths
        lines = [
            f"{processor()}, {self.threads} threads, medians of {len(probes)} rounds. Read bandwidth "
            f"{statistics.median(probes) / 1e9:.1f} GB/s ({min(probes) / 1e9:.1f} to {max(probes) / 1e9:.1f}), matmul peak "
            f"{self.peak / 1e9:.0f} GFLOP/s, in int8 {self.int8_peak / 1e9:.0f} GOP/s, of this run.",
            "",
            "| op | tokens | ms | floor | of the floor | GB/s | GFLOP/s |",
            "|---|---:|---:|---:|---:|---:|---:|",
            *(kernel.line for kernel in self.kernels),
            "",
            "Floor: bytes over the bandwidth, or operations over the peak (int8's for activations of 8 bits, else floating "
            "point's, which products of 16-bit numbers pass): what takes longer.",
        ]
        return "\n".join(lines) + "\n"


def measure_kernels(shape: Shape, *, threads: int, rounds: int, cold: int = COLD) -> KernelResult:
    """Time all kernels in turns."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        peak = matmul_peak(threads)
        int8_peak = max(peak, matmul_peak(threads, dtypes=(torch.int8,)))
        kernels, bandwidths = [*_kernels(shape, cold)], list[float]()
        turns = [(kernel, cycle(kernel.calls)) for kernel in kernels]
        for _, calls in turns:
            next(calls)()
        for _ in range(rounds):
            bandwidths.append(read_bandwidth(threads, rounds=2))
            for kernel, calls in turns:
                times = []
                for _ in kernel.calls if kernel.tokens == 1 else kernel.calls[:1]:
                    call, began = next(calls), time.perf_counter()
                    call()
                    times.append(time.perf_counter() - began)
                kernel.samples.append(statistics.median(times))
    finally:
        torch.set_num_threads(before)
    for kernel in kernels:
        by_operations = kernel.operations / (int8_peak if kernel.int8 else peak)
        kernel.floor = max(kernel.bytes / statistics.median(bandwidths), by_operations)
    return KernelResult(threads=threads, shape=shape, bandwidths=bandwidths, peak=peak, int8_peak=int8_peak, kernels=kernels)


def _kernels(shape: Shape, cold: int) -> Iterator[Kernel]:
    """Yield all kernels at one token and at a prompt."""
    ops = {name: getattr(torch.ops.oxfuse, own.removeprefix("oxfuse::")) for name, own in cpu_ops().names.items()}
    draw = torch.Generator().manual_seed(0)
    rows = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    for name, height, width in (
        ("q, k, v", rows, shape.hidden),
        ("output projection", shape.hidden, shape.heads * shape.head_dim),
        ("head", shape.vocabulary, shape.hidden),
    ):
        one = torch.randn(1, width, generator=draw).bfloat16()
        many = torch.randn(shape.prompt, width, generator=draw).bfloat16()
        count, size = height * width, -(-cold // (2 * height * width))
        dense = [torch.randn(height, width, generator=draw).bfloat16() for _ in range(size)]
        for x in (one, many) if name != "head" else (one,):
            for title, op in (
                (f"{name}, bfloat16", ops["aten::linear"]),
                (f"{name}, bfloat16, torch", torch.nn.functional.linear),
            ):
                calls = [partial(op, x, weight) for weight in dense]
                yield Kernel(name=title, tokens=len(x), bytes=2 * count, operations=2 * len(x) * count, calls=calls)
        panels, blocks = -(-height // 16), -(-width // 32)
        scales, packed = torch.ones(panels, blocks, 16).bfloat16(), (panels, blocks, 512)
        coded = [torch.randint(0, 256, packed, dtype=torch.uint8, generator=draw) for _ in range(2 * size)]
        for x in (one, many) if name != "head" else (one,):
            for int8 in (False, True):
                calls = [partial(ops["oxfuse::linear_int8"], x, weight, scales, None, height, int8) for weight in coded]
                title, read = f"{name}, int8" + (" and activations" if int8 else ""), panels * blocks * (512 + 32)
                yield Kernel(name=title, tokens=len(x), bytes=read, operations=2 * len(x) * count, calls=calls, int8=int8)
    yield from _experts(shape, cold, ops["oxfuse::moe_dispatch"], draw)
    yield from _attention(shape, cold, ops["oxfuse::sink_attention"], draw)


def _experts(shape: Shape, cold: int, op: Callable[..., Tensor], draw: torch.Generator) -> Iterator[Kernel]:
    hidden, experts, blocks = shape.hidden, shape.experts, shape.hidden // 32
    values = 3 * hidden * hidden
    copies = -(-cold * 32 // (experts * values * 17))
    sets = [
        tuple(
            torch.randint(low, high, (experts, rows // 16, blocks, size), dtype=torch.uint8, generator=draw)
            for rows in (2 * hidden, hidden)
            for low, high, size in ((0, 256, 256), (118, 123, 16))
        )
        for _ in range(copies)
    ]
    router = torch.randn(experts, hidden, generator=draw).bfloat16(), torch.zeros(experts).bfloat16()
    biases = torch.zeros(experts, 2 * hidden).bfloat16(), torch.zeros(experts, hidden).bfloat16()
    for tokens in (1, shape.prompt):
        read = experts if tokens * shape.top_k >= experts else tokens * shape.top_k
        for int8 in (False, True):
            calls: list[Callable[[], object]] = []
            for _ in range(8 if tokens == 1 else 1):
                for gate_up, gate_up_scales, down, down_scales in sets:
                    x = torch.randn(tokens, hidden, generator=draw).bfloat16()
                    weights = gate_up, gate_up_scales, biases[0], down, down_scales, biases[1]
                    calls.append(partial(op, x, *router, *weights, shape.top_k, 1.702, 7.0, int8))
            yield Kernel(
                name="MXFP4 experts" + (", int8 activations" if int8 else ""),
                tokens=tokens,
                bytes=read * values * 17 // 32,
                operations=2 * tokens * shape.top_k * values,
                calls=calls,
                int8=int8,
            )


def _attention(shape: Shape, cold: int, op: Callable[..., Tensor], draw: torch.Generator) -> Iterator[Kernel]:
    heads, kv, dim, block = shape.heads, shape.kv_heads, shape.head_dim, 16
    for tokens, length in ((1, shape.context), (shape.prompt, shape.prompt)):
        size = 4 * length * kv * dim
        blocks = -(-length // block)
        table = torch.randperm(blocks, generator=draw)[None] + 1
        position = torch.arange(length - tokens, length)
        slots = table[0][position // block] * block + position % block
        calls = []
        for _ in range(max(1, min(64, cold // size)) if tokens == 1 else 1):
            caches = [torch.randn(blocks + 1, kv, *tail, generator=draw).bfloat16() for tail in ((dim, block), (block, dim))]
            q, k, v = (torch.randn(tokens, n, dim, generator=draw).bfloat16() for n in (heads, kv, kv))
            places = torch.tensor([0, tokens]), torch.tensor([length]), slots, table
            calls.append(partial(op, q, k, v, torch.randn(heads, generator=draw), *caches, *places, 0, dim**-0.5))
        seen = sum(length - tokens + i + 1 for i in range(tokens))
        name = f"attention, {length} keys"
        yield Kernel(name=name, tokens=tokens, bytes=size, operations=4 * heads * dim * seen, calls=calls)


@click.command()
@click.option(
    "--threads", type=int, default=lambda: processors().threads, help="Of ops and probes; by default all that it may use."
)
@click.option("--rounds", default=9, show_default=True, help="Turns; the median counts.")
@click.option("--markdown", type=click.Path(path_type=Path, dir_okay=False), help="Write the table there.")
@click.option("--json", "json_file", type=click.Path(path_type=Path, dir_okay=False), help="Write the figures there.")
def main(threads: int, rounds: int, markdown: Path | None, json_file: Path | None) -> None:
    """Time the C++ ops at the shape of a gpt-oss-20b layer."""
    result = measure_kernels(Shape(), threads=threads, rounds=rounds)
    click.echo(result.to_markdown(), nl=False)
    if markdown:
        markdown.write_text(result.to_markdown())
    if json_file:
        json_file.write_text(result.to_json())


if __name__ == "__main__":
    main()
