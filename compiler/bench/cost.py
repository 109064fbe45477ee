"""The least that a token can cost: bytes that must be read and multiplications that must be made, from an artifact's manifest.

In: the manifest. Out: bytes of one decoded token and operations of a prefill, for the artifact's weights and for the same model
with all weights in bfloat16, as a peer holds them. Norms and biases are left out: they are less than a thousandth.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from oxfuse.models.contract import Experts, ModelContract, lookup
from oxfuse.models.virtual import meta_model
from oxfuse.runtime.manifest import CacheSpec, Manifest

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "uint8": 1, "int8": 1}


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Counts for one model. `share` is the part of the experts that a token is sent to; `head` is the last layer's."""

    dense: int
    head: int
    experts: int
    share: float
    dense_bytes: int
    experts_bytes: int
    query_heads: int
    cache: CacheSpec

    def decode_bytes(self, context: int, *, bfloat16: bool = False, batch: int = 1) -> float:
        """Return the bytes read for one token after `context` others in each of `batch` sequences.

        With `bfloat16`, if all weights were held so. Sequences that are sent to the same experts share them: that is the least.
        """
        if bfloat16:
            return self.decode_bytes_held(context, dense=BYTES["bfloat16"], experts=BYTES["bfloat16"], batch=batch)
        return self.dense_bytes + self.share * self.experts_bytes + batch * self.cache_bytes(context)

    def decode_bytes_held(self, context: int, *, dense: float, experts: float, batch: int = 1) -> float:
        """Return the same where a weight that every token meets takes `dense` bytes, and one of an expert `experts`."""
        return dense * (self.dense + self.head) + self.share * experts * self.experts + batch * self.cache_bytes(context)

    def prefill_operations(self, tokens: int) -> float:
        """Return the floating-point operations for `tokens` tokens of one sequence and the logits of the last."""
        per_token = 2 * (self.dense + self.share * self.experts)
        attention = 0.0
        for group in self.cache.groups:
            pairs = _pairs(tokens, group.window)
            attention += sum(4 * self.query_heads * self.cache.head_dim[layer] * pairs for layer in group.layers)
        return tokens * per_token + 2 * self.head + attention

    def cache_bytes(self, context: int) -> int:
        """Return the bytes of keys and values of `context` tokens of one sequence; layers with a window hold no more than it."""
        total = 0
        for group in self.cache.groups:
            seen = min(group.window, context) if group.window else context
            per_token = sum(2 * self.cache.kv_heads[layer] * self.cache.head_dim[layer] for layer in group.layers)
            total += seen * per_token * BYTES[self.cache.dtype]
        return total


def _pairs(tokens: int, window: int | None) -> float:
    """Return how many pairs of a token and one that it sees there are: all up to itself, no more than the window."""
    seen = min(window, tokens) if window else tokens
    return seen * (seen + 1) / 2 + (tokens - seen) * seen


def _sorted_matrices(model: nn.Module) -> tuple[dict[str, nn.Parameter], set[str], set[str], str]:
    """Return all matrices by name; the names of those that every token meets; those of experts; the last layer's."""
    banks = {name for name, module in model.named_modules() if isinstance(module, Experts)}
    embeddings = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    matrices = {name: p for name, p in model.named_parameters(remove_duplicate=False) if p.dim() > 1}
    expert_names = {name for name in matrices if name.rpartition(".")[0] in banks}
    last = next((name for name in reversed(matrices) if name not in expert_names), "")
    return matrices, set(matrices) - expert_names - (embeddings - {last}), expert_names, last


def cost_of(manifest: Manifest) -> Cost:
    """Return the counts for the artifact's model, from the shapes of its reference and the sizes in its weight files."""
    contract = lookup(manifest.model.model_type)
    config = contract.parse_config(manifest.model.config)
    model = meta_model(contract, config, manifest.model.task, torch.bfloat16)
    matrices, dense_names, expert_names, last = _sorted_matrices(model)
    settings = manifest.model.config
    sizes = {
        name: math.prod(tensor.shape) * BYTES[tensor.dtype] for file in manifest.weights for name, tensor in file.tensors.items()
    }

    def stored(name: str) -> int:  # whole, in parts such as NAME_blocks, or both; a tied head under the embedding's name
        own = [size for other, size in sizes.items() if other == name or (other.startswith(f"{name}_") and other not in matrices)]
        return sum(own) if own else matrices[name].numel() * BYTES[manifest.model.dtype]

    experts = sum(matrices[name].numel() for name in expert_names)
    count = next((len(matrices[name]) for name in expert_names), 1)
    return Cost(
        dense=sum(matrices[name].numel() for name in dense_names - {last}),
        head=matrices[last].numel(),
        experts=experts,
        share=settings.get("num_experts_per_tok", 1) / count if experts else 0.0,
        dense_bytes=sum(map(stored, dense_names)),
        experts_bytes=sum(map(stored, expert_names)),
        query_heads=settings["num_attention_heads"],
        cache=manifest.cache,
    )


def training_operations(contract: ModelContract, settings: dict[str, Any], tokens: int) -> float:
    """Return the floating-point operations, forward and backward, for one sequence of `tokens` tokens with labels.

    `settings` is the config.json. A backward multiplies twice where a forward multiplies once: for inputs and for weights.
    """
    config = contract.parse_config(settings)
    model = meta_model(contract, config, contract.default_task, torch.bfloat16)
    matrices, dense, experts, _ = _sorted_matrices(model)
    share = settings.get("num_experts_per_tok", 1) / next((len(matrices[name]) for name in experts), 1)
    numbers = sum(matrices[name].numel() for name in dense) + share * sum(matrices[name].numel() for name in experts)
    kinds = getattr(config, "layer_types", None) or [""] * config.num_hidden_layers
    windows = [config.sliding_window if "sliding" in kind else None for kind in kinds]
    attention = sum(4 * config.num_attention_heads * config.head_dim * _pairs(tokens, window) for window in windows)
    return float(3 * (2 * tokens * numbers + attention))
