"""The reference's own KV cache, for `past_key_values`. It keeps everything and is no part of an exported program."""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """Rotated keys and values of every layer, [B, KV, tokens, D] each, concatenated as they come."""

    def __init__(self) -> None:
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def get_seq_length(self) -> int:
        """Return how many tokens the cache holds."""
        return self.keys[0].shape[2] if self.keys else 0

    def update(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Append a step's keys and values [B, KV, S, D] to `layer` and return all of that layer's. Layers come in order."""
        if layer == len(self.keys):
            self.keys.append(keys)
            self.values.append(values)
        else:
            self.keys[layer] = torch.cat([self.keys[layer], keys], 2)
            self.values[layer] = torch.cat([self.values[layer], values], 2)
        return self.keys[layer], self.values[layer]
