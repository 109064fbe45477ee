"""RMSNorm, alone and with the residual sum before it: what the ops mean, and their registration.

Plain torch on every device, float32 inside, so Inductor fuses it with its neighbours; there is no kernel of our own. Source of
the formula: Zhang and Sennrich 2019 (arXiv 1910.07467), with the product by the weight taken before the cast, as GPT-OSS does.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return x / rms(x) * weight.

    x [..., H], weight [H], any floating dtype; computed in promote(x.dtype, float32), result [..., H] in x's dtype, contiguous.
    """
    return _normalise(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return (rms_norm(total), total), where total = x + residual, rounded to x's dtype before it is normalised.

    x and residual [..., H] of one dtype, weight [H]; the results are contiguous.
    """
    total = (x + residual).contiguous()
    return _normalise(total, weight, eps), total


def _normalise(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (scaled * weight.to(wide.dtype)).to(x.dtype).contiguous()


def _fake(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


def _fake_with_sum(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


torch.library.triton_op("oxfuse::rms_norm", rms_norm, mutates_args=())
torch.library.triton_op("oxfuse::add_rms_norm", add_rms_norm, mutates_args=())
# By default the fake of a triton_op is its body: running that on fake tensors would make most of an export's time.
torch.library.register_fake("oxfuse::rms_norm", _fake, allow_override=True)
torch.library.register_fake("oxfuse::add_rms_norm", _fake_with_sum, allow_override=True)
