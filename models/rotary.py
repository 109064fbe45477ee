"""Rotary position embeddings: the table of frequencies a configuration asks for, and the rotation of queries and keys.

In: `rope_parameters` with transformers 5's keys, normalised. Angles are float32 whatever the model's dtype.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from oxfuse.models.contract import ComputedBuffers
from oxfuse.models.precision import widened


def yarn_range(rope: Mapping[str, Any], dim: int) -> tuple[float, float]:
    """Return the pair indices between which YaRN goes over from the model's own frequencies to interpolated ones.

    corr(r) = dim * ln(original context / (2 pi r)) / (2 ln theta) for r = beta_fast and beta_slow turns (YaRN,
    arXiv:2309.00071, section 3.2), floored and ceiled if `truncate`, then held inside [0, dim - 1].
    """
    turns = (rope["beta_fast"], rope["beta_slow"])
    low, high = (
        dim * math.log(rope["original_max_position_embeddings"] / (r * 2 * math.pi)) / (2 * math.log(rope["rope_theta"]))
        for r in turns
    )
    if rope["truncate"]:
        low, high = math.floor(low), math.ceil(high)
    return max(low, 0), min(high, dim - 1)


def inverse_frequencies(rope: Mapping[str, Any], dim: int) -> tuple[Tensor, float]:
    """Return the angle per position of each of dim / 2 pairs, float32 [dim / 2], and what cos and sin are multiplied by.

    `rope` is what `rope_parameters.resolve` returned. An odd `dim` has (dim + 1) / 2 pairs. The operations come in transformers
    5.23's order, so the table is the same to the last bit.
    """
    kind, theta = rope["rope_type"], rope["rope_theta"]
    if kind == "dynamic":  # NTK-aware: a longer context slows the slow pairs down by a larger base
        longer = rope["factor"] * rope["context"] / rope["original_max_position_embeddings"] - (rope["factor"] - 1)
        kind, theta = "default", theta * longer ** (dim / (dim - 2))
    period = theta ** (torch.arange(0, dim, 2, device="cpu").float() / dim)
    if kind == "default":
        return 1.0 / period, 1.0
    if kind == "linear":
        return 1.0 / period / rope["factor"], 1.0
    assert kind == "yarn", kind
    low, high = yarn_range(rope, dim)
    if low == high:
        high += 0.001
    own = 1 - ((torch.arange(dim // 2, device="cpu").float() - low) / (high - low)).clamp(0, 1)
    return 1.0 / (rope["factor"] * period) * (1 - own) + 1.0 / period * own, float(rope["attention_factor"])


class RotaryEmbedding(ComputedBuffers):
    """Turns positions into cos and sin of a head's pairs."""

    inv_freq: Tensor

    def __init__(self, rope: Mapping[str, Any], dim: int) -> None:
        super().__init__()
        self.rope, self.dim = rope, dim
        self.register_buffer("inv_freq", None, persistent=False)
        self.compute_buffers(torch.get_default_device())

    def compute_buffers(self, device: torch.device) -> None:
        """Set inv_freq float32 [dim / 2] and the scale."""
        table, self.scale = inverse_frequencies(self.rope, self.dim)
        self.inv_freq = table.to(device)

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions int64 [B, S] -> cos and sin, float32 [B, S, R]: of each pair twice, as `rotate` wants them."""
        angles = (positions[..., None].float() * self.inv_freq).repeat(1, 1, 2)
        return angles.cos() * self.scale, angles.sin() * self.scale


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return x [B, heads, S, D] with pairs (d, d + R / 2), d < R / 2, turned by the angles of cos and sin [B, S, R], R <= D.

    The product is taken in promote(dtype, float32) and rounded once; what lies beyond R passes through. Parts are split off, not
    sliced, since the gradient of a slice is a tensor of zeros of x's size that the slice's is copied into.
    """
    width = cos.shape[-1]
    part, rest = (x, None) if width == x.shape[-1] else x.split([width, x.shape[-1] - width], -1)
    wide = widened(part)
    first, second = wide.chunk(2, -1)
    turned = (wide * cos.unsqueeze(1) + torch.cat([-second, first], -1) * sin.unsqueeze(1)).to(x.dtype)
    return turned if rest is None else torch.cat([turned, rest], -1)
