"""Rounds float weights to MXFP4 and packs them as a GPT-OSS checkpoint stores them; training rounds with it in the loop.

In: float weights whose last dim is the input dim. Out: the rounded values (with a straight-through gradient), or the
`_blocks` and `_scales` bytes that decode to exactly those values. Reading such bytes is the business of `oxfuse.models`.
"""

from __future__ import annotations

import torch
from torch import Tensor

GROUP = 32  # values that share one scale: OCP Microscaling Formats v1.0, section 5.3
LARGEST = 6.0  # of e2m1
SCALE_BIAS = 127  # e8m0: byte b means 2^(b - 127)
SCALE_BYTES = (2, 127)  # kept inside so that scale * 0.5 is a normal float in bf16 too and no weight exceeds 6


def round_to_mxfp4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return (multiples of the scale, scale exponents) nearest to `weight`, ties to even.

    weight: float32 [..., K], K a multiple of 32. Multiples: float32 [..., K/32, 32], each an e2m1 value. Exponents: float32
    [..., K/32, 1], whole numbers. The exponent is floor(log2(max)) - 2, and one more where the largest value would lie beyond 7
    and lose more than 1/7 by saturating at 6.
    """
    if weight.shape[-1] % GROUP:
        raise ValueError(
            f"MXFP4 shares a scale between {GROUP} values; the last dim of {tuple(weight.shape)} is no multiple of it"
        )
    groups = torch.unflatten(weight, -1, (-1, GROUP))
    mantissa, exponent = torch.frexp(groups.abs().amax(-1, keepdim=True))  # mantissa in [0.5, 1)
    exponent = exponent.to(weight.dtype) - 3 + (mantissa > 7 / 8)
    exponent = exponent.clamp(SCALE_BYTES[0] - SCALE_BIAS, SCALE_BYTES[1] - SCALE_BIAS)
    scaled = groups * torch.exp2(-exponent)
    # e2m1 has one fraction bit: steps of 0.5 below 2, of 1 below 4, of 2 above. torch.round takes ties to even, as the
    # format's even codes do.
    step = torch.where(scaled.abs() < 2, 0.5, torch.where(scaled.abs() < 4, 1.0, 2.0))
    return (torch.round(scaled / step) * step).clamp(-LARGEST, LARGEST), exponent


def fake_quantize(weight: Tensor) -> Tensor:
    """Return the MXFP4 neighbour of `weight` [..., K], same shape; its gradient is that of the identity (straight-through)."""
    with torch.no_grad():
        multiples, exponent = round_to_mxfp4(weight)
        error = (multiples * torch.exp2(exponent)).flatten(-2) - weight
    # The sum is exact: the rounded value and the weight are within a factor of two, or the rounded value is 0 or saturated;
    # where float32 does round here, it does so far below the step of bf16.
    return weight + error


def pack(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return (blocks uint8 [..., K/32, 16], scales uint8 [..., K/32]) of the values nearest to `weight` [..., K].

    Two values a byte, the low nibble first; codes 0-7 are 0, .5, 1, 1.5, 2, 3, 4, 6 and codes 8-15 their negatives.
    """
    multiples, exponent = round_to_mxfp4(weight)
    ladder = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    codes = torch.bucketize(multiples.abs(), ladder) + 8 * (multiples < 0)
    blocks = (codes[..., 0::2] + 16 * codes[..., 1::2]).to(torch.uint8)
    return blocks, (exponent.squeeze(-1) + SCALE_BIAS).to(torch.uint8)
