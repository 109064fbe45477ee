"""Dense layers with weights of 8 bits: y = x Wᵀ + b, with W in panels of 16 rows and a scale for 32 values along the input."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from oxfuse.passes.quantise import ZERO, rounded

PANEL = 16
"""Rows of a panel."""
ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Which of eight values the eight bytes of a row are."""


def linear_int8(
    x: Tensor, values: Tensor, scales: Tensor, bias: Tensor | None, rows: int, int8_activations: bool = False
) -> Tensor:
    """Return x Wᵀ + b, [..., N], contiguous, with N = `rows` and W in panels of 8 bits (packed.py).

    x [..., K]; values uint8 [N / 16, K / 32, 512], scales bfloat16 [N / 16, K / 32, 16], sizes rounded up; bias [N]. Computed in
    promote(x.dtype, float32), rounded once; with `int8_activations` x is `rounded` first. Raises NotImplementedError off the CPU.
    """
    if x.device.type != "cpu":
        raise NotImplementedError(f"oxfuse::linear_int8 has no kernel for device {x.device}; it runs on cpu.")
    wide = torch.promote_types(x.dtype, torch.float32)
    weight = unpacked(values, scales, wide)[:rows, : x.shape[-1]]
    entering = rounded(x, wide) if int8_activations else x.to(wide)
    return F.linear(entering, weight, None if bias is None else bias.to(wide)).to(x.dtype)


def unpacked(values: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the weights [16 P, 32 B] of panels [P, B, 512] with scales [P, B, 16]."""
    eights = values.unflatten(-1, (4, 2, PANEL, 4)).permute(0, 4, 1, 2, 3, 5).flatten(-2)  # [P, 16, B, 4, 8]
    places = [ORDER.index(value) for value in range(8)]
    numbers = (eights[..., places].to(dtype) - ZERO[8]).flatten(-2)  # [P, 16, B, 32]
    weights: Tensor = (numbers * scales.to(dtype).transpose(1, 2)[..., None]).flatten(2).flatten(0, 1)
    return weights


def _fake(x: Tensor, values: Tensor, scales: Tensor, bias: Tensor | None, rows: int, int8_activations: bool = False) -> Tensor:
    return x.new_empty(*x.shape[:-1], rows)


torch.library.triton_op("oxfuse::linear_int8", linear_int8, mutates_args=())
torch.library.register_fake("oxfuse::linear_int8", _fake, allow_override=True)  # the body's own would be slow
