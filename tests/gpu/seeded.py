"""Checkpoints out of a seed: every value follows from its tensor's name and its place by whole-number arithmetic.

So any machine and any device, with any number of threads and any version of torch, makes the same bytes, and any rows of a tensor
can be made alone. Distributions are those of `compiler/bench/random_checkpoint.py`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from oxfuse.compiler.bench.random_checkpoint import ADDED, SCALES, SHAPE_20B
from oxfuse.models.checkpoint import Checkpoint, TensorSource
from oxfuse.models.contract import Experts, lookup
from oxfuse.models.virtual import meta_model
from oxfuse.passes.weights import Weight

STEP, FIRST, SECOND = -7046029254386353131, -4658895280553007687, -7723592293110705685
"""The constants of splitmix64 (Steele, Lea, Flood 2014), as signed numbers: products of int64 wrap on every device."""
PIECES = {"cpu": 1 << 16, "cuda": 1 << 23}
"""Words that are made at once: their temporaries stay in a processor's cache, or fill a GPU."""
UNIT = math.sqrt(4 * (256**2 - 1) / 12)
"""Standard deviation of the sum of four bytes."""


def words(seed: int, first: int, count: int, device: torch.device) -> Tensor:
    """Return `count` pseudo-random int64 of the stream `seed`, from number `first` on."""
    z = torch.arange(first + 1, first + 1 + count, dtype=torch.int64, device=device).mul_(STEP).add_(seed)
    for shift, factor in ((30, FIRST), (27, SECOND), (31, None)):
        # int64 shifts the sign in; the mask takes it out again.
        z.bitwise_xor_((z >> shift).bitwise_and_((1 << (64 - shift)) - 1))
        if factor is not None:
            z.mul_(factor)
    return z


def stream_of(seed: int, name: str) -> int:
    """Return the number of a tensor's stream, a signed int64."""
    return int.from_bytes(hashlib.sha256(f"{seed}\0{name}".encode()).digest()[:8], "little", signed=True)


@dataclass(frozen=True, kw_only=True)
class SeededTensor(TensorSource):
    """A tensor of bytes from low to high - 1, or of nearly normal numbers, sums of four bytes, times `scale`, plus `mean`."""

    seed: int
    scale: float = 1.0
    mean: float = 0.0
    low: int = 0
    high: int = 256
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    stay: bool = False

    def read(self, rows: slice | None = None) -> Tensor:
        """Make the values, or a run of rows, on the tensor's device, and leave them there or bring them to the CPU."""
        first, last, _ = (rows or slice(None)).indices(self.shape[0])
        width, last = math.prod(self.shape[1:]), max(first, last)
        begin, end = first * width, last * width
        out = torch.empty(end - begin, dtype=self.dtype, device=self.device)
        in_word = 8 if self.dtype == torch.uint8 else 2
        stream, piece, behind = stream_of(self.seed, self.name), PIECES[self.device.type], -(-end // in_word)
        for at in range(begin // in_word, behind, piece):
            made = words(stream, at, min(piece, behind - at), self.device)
            values = self._bytes(made.view(torch.uint8)) if self.dtype == torch.uint8 else self._normal(made.view(torch.int32))
            start = at * in_word
            left, right = max(begin, start), min(end, start + len(values))
            out[left - begin : right - begin] = values[left - start : right - start]
        out = out.view(last - first, *self.shape[1:])
        return out if self.stay else out.cpu()

    def _bytes(self, made: Tensor) -> Tensor:
        if (self.low, self.high) == (0, 256):
            return made
        return (made.to(torch.int32).mul_(self.high - self.low) >> 8).add_(self.low).to(torch.uint8)

    def _normal(self, made: Tensor) -> Tensor:
        pairs = (made & 0x00FF00FF) + ((made >> 8) & 0x00FF00FF)
        sums = (pairs & 0xFFFF) + (pairs >> 16)
        return sums.sub_(510).to(torch.float32).mul_(self.scale / UNIT).add_(self.mean).to(self.dtype)


def shape_20b(layers: int, **config: Any) -> dict[str, Any]:
    """Return the config.json of a model with the layers of GPT-OSS 20b; `config` overrides."""
    return {**SHAPE_20B, "num_hidden_layers": layers, **config}


def seeded_checkpoint(
    config: Mapping[str, Any], seed: int = 0, device: torch.device | str = "cpu", *, stay: bool = False
) -> Checkpoint:
    """Return a checkpoint of `config` whose tensors are made when they are read, experts in MXFP4 and all else in bfloat16.

    They are made on `device`, which costs a GPU nothing, and stay there where that is asked for.
    """
    contract = lookup(config["model_type"])
    model = meta_model(contract, contract.parse_config(dict(config)), contract.default_task, torch.bfloat16)
    quantised = {f"{path}.{leaf}" for path, m in model.named_modules() if isinstance(m, Experts) for leaf in SCALES}
    embeddings = {f"{path}.weight" for path, module in model.named_modules() if isinstance(module, nn.Embedding)}
    common: dict[str, Any] = {"seed": seed, "device": torch.device(device), "stay": stay}
    tensors = dict[str, TensorSource]()
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        if name in quantised:
            for part, stored in Weight(shape=shape, dtype=torch.bfloat16, source=name, encoding="mxfp4").parts().items():
                low, high = (0, 256) if part == "blocks" else SCALES[name.rpartition(".")[2]]
                bounds = {"name": f"{name}_{part}", "low": low, "high": high}
                tensors[f"{name}_{part}"] = SeededTensor(shape=stored.shape, dtype=torch.uint8, **bounds, **common)
            continue
        scale = 1.0 if name in embeddings else shape[-1] ** -0.5 if len(shape) > 1 else 0.02
        scale *= 0.1 if any(part in name for part in ADDED) else 1.0
        mean = float("norm" in name and name.endswith("weight"))
        tensors[name] = SeededTensor(name=name, shape=shape, dtype=torch.bfloat16, scale=scale, mean=mean, **common)
    return Checkpoint(config=dict(config), tensors=tensors)
