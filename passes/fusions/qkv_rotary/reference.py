"""The three projections of a decode step with all that follows them up to attention: what the op means, and its registration."""

from __future__ import annotations

import torch
from torch import Tensor

from oxfuse.passes.fusions.linear.reference import arch_of, linear_rows
from oxfuse.passes.fusions.rotary_embedding.reference import rotary_embedding
from oxfuse.passes.fusions.sink_attention.reference import store


def qkv_rotary(
    x: Tensor,
    q_weight: Tensor,
    q_bias: Tensor | None,
    k_weight: Tensor,
    k_bias: Tensor | None,
    v_weight: Tensor,
    v_bias: Tensor | None,
    positions: Tensor,
    inv_freq: Tensor,
    scale: float,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
) -> Tensor:
    """Project x to queries, keys and values, rotate the first two, write keys and values into the cache; return the queries.

    x [T, H]; q_weight [NH, D, H], k_weight and v_weight [KV, D, H], biases to match, all of one dtype, heads as far apart as they
    like, so that the three may be views of one matrix; positions int64 [T], inv_freq [R / 2] float32 and scale as for
    `rotary_embedding`; k_cache [blocks, KV, D, block_size] and v_cache [blocks, KV, block_size, D], changed in place, and slots
    int64 [T] as for `sink_attention`. Returns [T, NH, D], contiguous. The projections are rounded to x's dtype before they are
    rotated, as those of separate ops; a kernel may spare that rounding. Raises NotImplementedError on devices other than cpu and
    cuda.
    """
    if x.device.type == "cuda":
        from oxfuse.passes.fusions.qkv_rotary.triton import launch_qkv_rotary

        weights, angles = (q_weight, q_bias, k_weight, k_bias, v_weight, v_bias), (positions, inv_freq, scale)
        into = k_cache, v_cache, slots
        return launch_qkv_rotary(torch.library.wrap_triton, x, *weights, *angles, *into, arch=arch_of(x.device))
    if x.device.type != "cpu":
        raise NotImplementedError(f"oxfuse::qkv_rotary has no kernel for device {x.device}; it runs on cpu and cuda.")
    q, k, v = (_project(x, *heads) for heads in ((q_weight, q_bias), (k_weight, k_bias), (v_weight, v_bias)))
    q, k = rotary_embedding(q, k, positions, inv_freq, scale)
    store(k, v, k_cache, v_cache, slots)
    return q


def _project(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    flat: Tensor = linear_rows(x, weight.flatten(0, 1), None if bias is None else bias.flatten())
    return flat.view(-1, *weight.shape[:2])


def _fake(
    x: Tensor,
    q_weight: Tensor,
    q_bias: Tensor | None,
    k_weight: Tensor,
    k_bias: Tensor | None,
    v_weight: Tensor,
    v_bias: Tensor | None,
    positions: Tensor,
    inv_freq: Tensor,
    scale: float,
    *caches_and_slots: Tensor,
) -> Tensor:
    return x.new_empty(x.shape[0], q_weight.shape[0], q_weight.shape[1])


torch.library.triton_op("oxfuse::qkv_rotary", qkv_rotary, mutates_args=("k_cache", "v_cache"))
torch.library.register_fake("oxfuse::qkv_rotary", _fake, allow_override=True)  # the body's own would be slow
