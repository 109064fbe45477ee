"""Measures `torch.compile(model, backend="oxfuse")` on transformers' GPT-OSS at the 20b layer shape, beside the module as it is.

In: a number of layers. One model with random weights, in bfloat16, generates from a static cache, turn by turn as it is, in both
ways that it has for experts, through Inductor alone, and through oxfuse. Out: JSON and Markdown with medians of the time between
two tokens, the floor, and ratios.

    python -m oxfuse.compiler.bench.live --json live.json --markdown live.md
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oxfuse.compiler.bench.probe import ForeignLoad, read_bandwidth
from oxfuse.compiler.bench.random_checkpoint import SHAPE_20B
from oxfuse.compiler.bench.speed import machine_facts
from oxfuse.compiler.bench.worker_process import take_quietly
from oxfuse.runtime.machine import processors

BAR = 1.5
"""Decode through the backend over the module as it is."""


class Clock:
    """What `generate` hands its tokens to: seconds between two of them."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        """Take a token, or the prompt."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Do nothing."""

    @property
    def between(self) -> list[float]:
        """Return the seconds from token to token; the first came with the prompt."""
        return [b - a for a, b in zip(self.times[1:], self.times[2:], strict=False)]


def random_model(layers: int, vocabulary: int) -> Any:
    """Return transformers' model at the 20b layer shape with random weights, bfloat16."""
    from transformers import GptOssConfig, GptOssForCausalLM

    other = ("quantization_config", "torch_dtype", "architectures")
    known = {name: value for name, value in SHAPE_20B.items() if name not in other}
    sizes = {"num_hidden_layers": layers, "vocab_size": vocabulary, "eos_token_id": None, "pad_token_id": 0}
    config = GptOssConfig(**{**known, **sizes})
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = GptOssForCausalLM(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)
    for parameter in model.parameters():
        parameter.normal_(0, parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.02)
    model.generation_config.eos_token_id = None
    return model


def decode_bytes(model: Any) -> int:
    """Return the bytes of weights that one token reads: all but the embedding and the experts that were not chosen."""
    config, total = model.config, 0
    for name, parameter in model.named_parameters():
        share = config.num_experts_per_tok / config.num_local_experts if ".experts." in name else 1.0
        total += 0 if "embed_tokens" in name else int(parameter.numel() * parameter.element_size() * share)
    return total


def measure(options: dict[str, Any]) -> dict[str, Any]:
    """Return samples in seconds a token, by way; `options` as of `main`."""
    torch.set_num_threads(options["threads"])
    model = random_model(options["layers"], options["vocabulary"])
    ids = torch.randint(0, options["vocabulary"], (1, options["context"]), generator=torch.Generator().manual_seed(1))
    plain = model.forward
    model.set_experts_implementation("grouped_mm")

    def batched(*args: Any, **kwargs: Any) -> Any:
        """Run a token's experts by batched products; a prompt's would gather all its tokens' experts, some 20 GB."""
        if kwargs["input_ids"].shape[1] > 1:
            return plain(*args, **kwargs)
        model.set_experts_implementation("batched_mm")
        try:
            return plain(*args, **kwargs)
        finally:
            model.set_experts_implementation("grouped_mm")

    ways: dict[str, Callable[..., Any]] = {"as it is, grouped_mm": plain, "as it is, batched_mm": batched}
    ways |= {backend: torch.compile(plain, backend=backend) for backend in ("inductor", "oxfuse")}

    def run(way: str) -> tuple[float, list[int]]:
        model.forward, clock = ways[way], Clock()
        wanted = dict(max_new_tokens=options["tokens"], do_sample=False, cache_implementation="static", streamer=clock)
        out = model.generate(ids, **wanted)
        return statistics.median(clock.between), out[0].tolist()

    for way in ways:  # compiles
        run(way)
    load = ForeignLoad(patience=60.0, processes=(os.getpid(),))
    samples, disturbed, said = {way: list[float]() for way in ways}, 0, dict[str, list[int]]()
    for number in range(options["rounds"]):
        for way in list(ways)[:: 1 if number % 2 == 0 else -1]:

            def take(way: str = way) -> float:
                seconds, said[way] = run(way)
                return seconds

            value, again = take_quietly(take, load)
            samples[way].append(value)
            disturbed += again
    first = said[next(iter(ways))]
    alike = {way: sum(a == b for a, b in zip(ids, first, strict=True)) for way, ids in said.items()}
    bandwidth = read_bandwidth(options["threads"])
    return {
        "machine": machine_facts(),
        "options": options,
        "bandwidth": bandwidth,
        "floor": decode_bytes(model) / bandwidth,
        "samples": samples,
        "same_tokens_as_first": alike,
        "disturbed": disturbed,
    }


def to_markdown(result: dict[str, Any]) -> str:
    """Return a table of the medians and the bar."""
    options, machine = result["options"], result["machine"]
    medians = {way: statistics.median(values) for way, values in result["samples"].items()}
    best = min(value for way, value in medians.items() if way.startswith("as it is"))
    lines = [
        f"transformers' GptOssForCausalLM, {options['layers']} layers at the 20b shape, bfloat16, vocabulary "
        f"{options['vocabulary']}; `generate` with a static cache after {options['context']} tokens; {machine['processor']}, "
        f"{options['threads']} threads; read bandwidth {result['bandwidth'] / 1e9:.1f} GB/s. Medians of {options['rounds']} "
        f"interleaved turns of {options['tokens']} tokens; {result['disturbed']} disturbed turns taken again.",
        "",
        f"| way | decode (ms a token) | over the best as it is | of the floor, {1e3 * result['floor']:.1f} ms |",
        "|---|---:|---:|---:|",
    ]
    for way, value in medians.items():
        lines.append(f"| {way} | {1e3 * value:.1f} | {best / value:.2f}× | {result['floor'] / value:.0%} |")
    lines += ["", f"The bar for oxfuse is {BAR}×."]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="torch.compile's backends on transformers' GPT-OSS.")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--vocabulary", type=int, default=1008)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    given = parser.parse_args()
    names = ("layers", "vocabulary", "context", "tokens", "rounds")
    result = measure({name: getattr(given, name) for name in names} | {"threads": processors().threads})
    for path, text in ((given.json, json.dumps(result, indent=1) + "\n"), (given.markdown, to_markdown(result))):
        if path is not None:
            path.write_text(text, "utf-8")
    print(to_markdown(result), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
