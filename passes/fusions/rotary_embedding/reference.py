"""Rotary position embedding of queries and keys: what the ops mean, and their registration.

`rotary_embedding` returns both; `rotary_embedding_store` puts the keys, and the values that go with them, where attention over a
paged cache reads them, which spares a GPU a launch and the way through memory. Default, YaRN, linear and partial rotation differ
only in `inv_freq` and `scale`, which the model computes. Rotate-half form: the first half of the rotated dims is paired with the
second. Source: Su et al. 2021 (arXiv 2104.09864).
"""

from __future__ import annotations

import torch
from torch import Tensor

from oxfuse.passes.fusions.linear.reference import arch_of
from oxfuse.passes.fusions.sink_attention.reference import store


def rotary_embedding(q: Tensor, k: Tensor, positions: Tensor, inv_freq: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return q and k with their first R = 2 * len(inv_freq) dims rotated by positions * inv_freq.

    q [..., NH, D], k [..., KV, D], positions [...] of any integer dtype, inv_freq [R / 2] float32. Angles, cos and sin are
    float32 whatever the dtype, times `scale` (YaRN's attention factor); the product is taken in promote(dtype, float32)
    and cast back once. The results are contiguous. Raises NotImplementedError on devices other than cpu and cuda.
    """
    if q.device.type == "cuda":
        from oxfuse.passes.fusions.rotary_embedding.triton import launch_rotary  # only here: triton is slow to import

        return launch_rotary(torch.library.wrap_triton, q, k, positions, inv_freq, scale, arch_of(q.device))
    if q.device.type != "cpu":
        raise NotImplementedError(f"oxfuse::rotary_embedding has no kernel for device {q.device}; it runs on cpu and cuda.")
    angles = positions.to(torch.float32).unsqueeze(-1) * inv_freq.to(torch.float32)
    cos, sin = (part.unsqueeze(-2) for part in (angles.cos() * scale, angles.sin() * scale))  # [..., 1, R / 2]
    return _rotate(q, cos, sin), _rotate(k, cos, sin)


def rotary_embedding_store(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    inv_freq: Tensor,
    scale: float,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
) -> Tensor:
    """Write rotated k, and v, into the paged caches and return rotated q, [T, NH, D], contiguous.

    q [T, NH, D], k and v [T, KV, D], positions [T]; `inv_freq`, `scale` and the rotation as of `rotary_embedding`; caches,
    changed in place, and `slots` [T] as of `sink_attention`. Raises NotImplementedError on devices other than cpu and cuda.
    """
    if q.device.type == "cuda":
        from oxfuse.passes.fusions.rotary_embedding.triton import launch_rotary_store

        into = k_cache, v_cache, slots, arch_of(q.device)
        return launch_rotary_store(torch.library.wrap_triton, q, k, v, positions, inv_freq, scale, *into)
    if q.device.type != "cpu":
        raise NotImplementedError(f"oxfuse::rotary_embedding_store has no kernel for device {q.device}; it runs on cpu and cuda.")
    turned_q, turned_k = rotary_embedding(q, k, positions, inv_freq, scale)
    store(turned_k, v, k_cache, v_cache, slots)
    return turned_q


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    wide = x[..., : 2 * half].to(torch.promote_types(x.dtype, torch.float32))
    first, second = wide[..., :half], wide[..., half:]
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)
    return torch.cat([turned, x[..., 2 * half :]], -1).contiguous()


def _fake(q: Tensor, k: Tensor, positions: Tensor, inv_freq: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _fake_store(q: Tensor, *rest: object) -> Tensor:
    return q.new_empty(q.shape)


torch.library.triton_op("oxfuse::rotary_embedding", rotary_embedding, mutates_args=())
torch.library.triton_op("oxfuse::rotary_embedding_store", rotary_embedding_store, mutates_args=("k_cache", "v_cache"))
torch.library.register_fake("oxfuse::rotary_embedding", _fake, allow_override=True)  # the body's own would be slow
torch.library.register_fake("oxfuse::rotary_embedding_store", _fake_store, allow_override=True)
