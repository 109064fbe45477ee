"""Random checkpoints of any size, streamed to disk: what the benchmarks compile when no real one is at hand.

In: how large, and what differs from the 20b layer shape, or a model of another kind. Out: a folder as the hub has it, experts in
MXFP4 and all else in bfloat16.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from oxfuse.compiler.weight_file import PIECE, WeightEntry, write_weights
from oxfuse.models.contract import Experts, lookup
from oxfuse.models.virtual import meta_model
from oxfuse.passes.weights import Weight

SHAPE_20B: dict[str, Any] = {
    "model_type": "gpt_oss",
    "architectures": ["GptOssForCausalLM"],
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "head_dim": 64,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "num_experts_per_tok": 4,
    "vocab_size": 201088,
    "sliding_window": 128,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "quantization_config": {"quant_method": "mxfp4"},
}
SCALES = {"gate_up_proj": (118, 123), "down_proj": (114, 119)}
"""e8m0 bytes. What layers add is a tenth of the embedding: where random layers outweigh it, one token routed otherwise in
bfloat16 changes all that follows, and comparing logits would mean nothing."""
ADDED = ("o_proj", "experts", "attention.dense.", "dense_4h_to_h")
"""Parts of the names of what is added to the stream."""


def layers_of(body_bytes: int, **config: Any) -> int:
    """Return how many layers have `body_bytes` together, at least two; `config` overrides the 20b shape."""
    layer = _body(_entries(2, 0, config)) - _body(_entries(1, 0, config))
    return max(2, math.ceil(body_bytes / layer))


def write_checkpoint(folder: Path, layers: int, seed: int = 0, **config: Any) -> int:
    """Stream a random checkpoint to `folder`, which is made; return the bytes of its layers, without embedding and head.

    `config` overrides the 20b shape, or is the whole config.json where it names another `model_type`. Never more
    than a piece of a tensor is in memory.
    """
    tensors = _entries(layers, seed, config)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(_full(layers, config), indent=1))
    write_weights(folder / "model.safetensors", tensors)
    return _body(tensors)


def _full(layers: int, config: dict[str, Any]) -> dict[str, Any]:
    kind = SHAPE_20B["model_type"]
    base = SHAPE_20B if config.get("model_type", kind) == kind else {"tie_word_embeddings": False, "torch_dtype": "bfloat16"}
    return {**base, **config, "num_hidden_layers": layers}


def _entries(layers: int, seed: int, config: dict[str, Any]) -> dict[str, WeightEntry]:
    full = _full(layers, config)
    contract = lookup(full["model_type"])
    model = meta_model(contract, contract.parse_config(full), contract.default_task, torch.bfloat16)
    quantised = {
        f"{path}.{leaf}"
        for path, module in model.named_modules()
        if isinstance(module, Experts)
        for leaf in ("gate_up_proj", "down_proj")
    }
    embeddings = {f"{path}.weight" for path, module in model.named_modules() if isinstance(module, nn.Embedding)}
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, parameter in model.named_parameters():
        if name in quantised:
            weight = Weight(shape=tuple(parameter.shape), dtype=torch.bfloat16, source=name, encoding="mxfp4")
            for part, stored in weight.parts().items():
                limits = (0, 256) if part == "blocks" else SCALES[name.rpartition(".")[2]]
                made[f"{name}_{part}"] = _random(stored.shape, torch.uint8, generator, limits=limits)
        else:
            scale = 1.0 if name in embeddings else parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.02
            scale *= 0.1 if any(part in name for part in ADDED) else 1.0
            mean = float("norm" in name and name.endswith("weight"))
            made[name] = _random(tuple(parameter.shape), torch.bfloat16, generator, scale=scale, mean=mean)
    return made


def _body(tensors: dict[str, WeightEntry]) -> int:
    return sum(entry.nbytes for name, entry in tensors.items() if ".layers." in name)


def _random(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    generator: torch.Generator,
    *,
    scale: float = 1.0,
    mean: float = 0.0,
    limits: tuple[int, int] = (0, 0),
) -> WeightEntry:
    """Return an entry that makes its rows up when it is written: bytes within `limits`, or normal numbers."""

    def chunks() -> Iterator[Tensor]:
        height = max(1, PIECE // (4 * math.prod(shape[1:])))
        for first in range(0, shape[0], height):
            rows = (min(height, shape[0] - first), *shape[1:])
            if dtype == torch.uint8:
                yield torch.empty(rows, dtype=dtype).random_(*limits, generator=generator)
            else:
                yield torch.randn(rows, generator=generator) * scale + mean

    return WeightEntry(shape=shape, dtype=dtype, source="random", layout=(), chunks=chunks)
