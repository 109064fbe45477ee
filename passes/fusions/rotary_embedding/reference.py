"""Rotary position embedding of queries and keys: what the op means, and its registration.

Default, YaRN, linear and partial rotation differ only in `inv_freq` and `scale`, which the model computes. Rotate-half
form: the first half of the rotated dims is paired with the second. Source: Su et al. 2021 (arXiv 2104.09864).
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_embedding(q: Tensor, k: Tensor, positions: Tensor, inv_freq: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return q and k with their first R = 2 * len(inv_freq) dims rotated by positions * inv_freq.

    q [..., NH, D], k [..., KV, D], positions [...] of any integer dtype, inv_freq [R / 2] float32. Angles, cos and sin are
    float32 whatever the dtype, times `scale` (YaRN's attention factor); the product is taken in promote(dtype, float32)
    and cast back once. The results are contiguous. Raises NotImplementedError off the CPU.
    """
    if q.device.type != "cpu":
        raise NotImplementedError(f"oxfuse::rotary_embedding has no kernel for device {q.device}; it runs on cpu.")
    angles = positions.to(torch.float32).unsqueeze(-1) * inv_freq.to(torch.float32)
    cos, sin = (part.unsqueeze(-2) for part in (angles.cos() * scale, angles.sin() * scale))  # [..., 1, R / 2]
    return _rotate(q, cos, sin), _rotate(k, cos, sin)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    wide = x[..., : 2 * half].to(torch.promote_types(x.dtype, torch.float32))
    first, second = wide[..., :half], wide[..., half:]
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)
    return torch.cat([turned, x[..., 2 * half :]], -1).contiguous()


def _fake(q: Tensor, k: Tensor, positions: Tensor, inv_freq: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


torch.library.triton_op("oxfuse::rotary_embedding", rotary_embedding, mutates_args=())
torch.library.register_fake("oxfuse::rotary_embedding", _fake, allow_override=True)  # the body's own would be slow
