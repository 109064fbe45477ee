"""What the kernels are called with and what they must give: the launch of each op, and the plain op on the same device.

The bodies of the ops launch kernels on a GPU, so the plain ops are put together here from the parts of `reference.py` that run
anywhere. Results are what an op returns and the caches that it changes, in this order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from oxfuse.passes.fusions.linear import reference as linear_reference
from oxfuse.passes.fusions.linear.triton import launch_linear_rows
from oxfuse.passes.fusions.masked_attention import reference as masked_reference
from oxfuse.passes.fusions.masked_attention.triton import launch_causal, launch_masked
from oxfuse.passes.fusions.moe_dispatch import reference as moe_reference
from oxfuse.passes.fusions.moe_dispatch.triton import launch_dispatch, launch_experts
from oxfuse.passes.fusions.norm_router import reference as router_reference
from oxfuse.passes.fusions.norm_router.triton import launch_norm_router
from oxfuse.passes.fusions.qkv_rotary import reference as projection_reference
from oxfuse.passes.fusions.qkv_rotary.triton import launch_qkv_rotary
from oxfuse.passes.fusions.rms_norm.reference import add_rms_norm
from oxfuse.passes.fusions.rotary_embedding import reference as rotary_reference
from oxfuse.passes.fusions.rotary_embedding.triton import launch_rotary, launch_rotary_store
from oxfuse.passes.fusions.sink_attention import reference as attention_reference
from oxfuse.passes.fusions.sink_attention.triton import launch_attention, launch_store

from .inputs import Maker

REGISTERED = linear_reference, router_reference, projection_reference
"""Modules that register ops, and nothing of which is called here."""
Args = tuple[Any, ...]
Wrap = Callable[[Any], Any]


@dataclass(frozen=True, kw_only=True)
class Op:
    """One op: `launch(wrap, args, arch)` starts its kernels, `plain(args)` is what they mean, in promote(dtype, float32).

    `caches` are the places of the arguments that it changes; `bits`: results must be equal to the last bit; `torch_op`: the op
    whose body launches the same.
    """

    launch: Callable[[Wrap, Args, int], tuple[Tensor, ...]]
    plain: Callable[[Args], tuple[Tensor, ...]]
    caches: tuple[int, ...] = ()
    bits: bool = False
    torch_op: str = ""


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call of an op: `args(make)` makes its arguments, always the same."""

    op: str
    name: str
    args: Callable[[Maker], Args]


def _launch_store(wrap: Wrap, args: Args, arch: int) -> tuple[Tensor, ...]:
    launch_store(wrap, *args, arch)
    return args[2], args[3]


def _store(args: Args) -> tuple[Tensor, ...]:
    attention_reference.store(*args)
    return args[2], args[3]


def _attend(args: Args) -> tuple[Tensor, ...]:
    return (attention_reference._attend(*args[:-1]),)


def _causal(args: Args) -> tuple[Tensor, ...]:
    q, k, v, sink, window, scale = args
    index = torch.arange(q.shape[1], device=q.device)
    visible = attention_reference._visible(index[:, None], index, window)
    return (masked_reference._attend(q, k, v, sink, visible[None, None], scale),)


def _turns(positions: Tensor, frequencies: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    angles = positions.to(torch.float32).unsqueeze(-1) * frequencies.to(torch.float32)
    return (angles.cos() * scale).unsqueeze(-2), (angles.sin() * scale).unsqueeze(-2)


def _rotary(args: Args) -> tuple[Tensor, ...]:
    q, k, *how = args
    turns = _turns(*how)
    return rotary_reference._rotate(q, *turns), rotary_reference._rotate(k, *turns)


def _rotary_store(args: Args) -> tuple[Tensor, ...]:
    q, k, v, positions, frequencies, scale, k_cache, v_cache, slots = args
    q, k = _rotary((q, k, positions, frequencies, scale))
    return q, *_store((k, v, k_cache, v_cache, slots))


def _linear(args: Args) -> tuple[Tensor, ...]:
    x, weight, bias, activation = args
    wide = torch.promote_types(x.dtype, torch.float32)
    product = F.linear(x.to(wide), weight.to(wide), None if bias is None else bias.to(wide))
    return (linear_reference.ACTIVATIONS[activation](product).to(x.dtype),)


def _qkv(args: Args) -> tuple[Tensor, ...]:
    x, *weights, positions, frequencies, scale, k_cache, v_cache, slots = args
    pairs = zip(weights[::2], weights[1::2], strict=True)
    flat = ((weight.flatten(0, 1), None if bias is None else bias.flatten(), weight.shape[:2]) for weight, bias in pairs)
    q, k, v = (_linear((x, weight, bias, "none"))[0].unflatten(1, shape) for weight, bias, shape in flat)
    return _rotary_store((q, k, v, positions, frequencies, scale, k_cache, v_cache, slots))


def _norm_router(args: Args) -> tuple[Tensor, ...]:
    x, residual, gain, eps, weight, bias = args
    normed, total = add_rms_norm(x, residual, gain, eps)
    wide = torch.promote_types(x.dtype, torch.float32)
    return normed, total, F.linear(normed.to(wide), weight.to(wide), bias.to(wide))


def _experts(args: Args) -> tuple[Tensor, ...]:
    x, logits, gate_up, gate_up_scales, gate_up_bias, down, down_scales, down_bias, top_k, alpha, limit = args
    indices, weights = moe_reference.choose(logits, top_k)
    total = torch.zeros_like(x, dtype=weights.dtype)
    for first in range(gate_up.shape[0]):
        one = slice(first, first + 1)
        scales = [None if part is None else part[one] for part in (gate_up_scales, down_scales)]
        banks = gate_up[one], scales[0], gate_up_bias[one], down[one], scales[1], down_bias[one]
        total += moe_reference.combine(moe_reference.experts(x, *banks, alpha, limit), indices, weights, first)
    return (total.to(x.dtype),)


def _moe(args: Args) -> tuple[Tensor, ...]:
    x, router, bias, *rest = args
    wide = torch.promote_types(x.dtype, torch.float32)
    return _experts((x, F.linear(x.to(wide), router.to(wide), bias.to(wide)), *rest))


OPS = {
    "store": Op(launch=_launch_store, plain=_store, caches=(2, 3), bits=True),
    "rotary": Op(
        launch=lambda wrap, args, arch: launch_rotary(wrap, *args, arch),
        plain=_rotary,
        torch_op="rotary_embedding",
    ),
    "rotary_store": Op(
        launch=lambda wrap, args, arch: (launch_rotary_store(wrap, *args, arch), args[6], args[7]),
        plain=_rotary_store,
        caches=(6, 7),
        torch_op="rotary_embedding_store",
    ),
    "attention": Op(
        launch=lambda wrap, args, arch: (launch_attention(wrap, *args, arch),),
        plain=_attend,
        torch_op="sink_attention_cached",
    ),
    "masked_attention": Op(
        launch=lambda wrap, args, arch: (launch_masked(wrap, *args, arch),),
        plain=lambda args: (masked_reference._attend(*args),),
        torch_op="masked_attention",
    ),
    "causal_attention": Op(
        launch=lambda wrap, args, arch: (launch_causal(wrap, *args, arch),),
        plain=_causal,
        torch_op="sink_attention_dense",
    ),
    "linear_rows": Op(
        launch=lambda wrap, args, arch: (launch_linear_rows(wrap, *args, arch=arch),),
        plain=_linear,
        torch_op="linear_rows",
    ),
    "qkv_rotary": Op(
        launch=lambda wrap, args, arch: (launch_qkv_rotary(wrap, *args, arch=arch), args[10], args[11]),
        plain=_qkv,
        caches=(10, 11),
        torch_op="qkv_rotary",
    ),
    "norm_router": Op(
        launch=lambda wrap, args, arch: tuple(launch_norm_router(wrap, *args, arch=arch)),
        plain=_norm_router,
        torch_op="norm_router",
    ),
    "moe_dispatch": Op(
        launch=lambda wrap, args, arch: (launch_dispatch(wrap, *args, arch=arch),),
        plain=_moe,
        torch_op="moe_dispatch",
    ),
    "moe_experts": Op(
        launch=lambda wrap, args, arch: (launch_experts(wrap, *args, arch=arch),),
        plain=_experts,
        torch_op="moe_experts",
    ),
}


def called(op: Op, args: Args) -> tuple[Tensor, ...]:
    """Return what torch's op gives for arguments of its own, and the caches that it changed."""
    own = copied(op, args)
    result = getattr(torch.ops.oxfuse, op.torch_op)(*own)
    return (*(result if isinstance(result, tuple | list) else (result,)), *(own[place] for place in op.caches))


def copied(op: Op, args: Args, dtype: torch.dtype | None = None) -> Args:
    """Return the arguments with caches of their own, floating ones in `dtype`; what must be float32 is made so by the op."""
    found: list[Any] = []
    for place, value in enumerate(args):
        if isinstance(value, Tensor) and value.is_floating_point() and dtype is not None:
            value = value.to(dtype)
        found.append(value.clone() if place in op.caches else value)
    return tuple(found)


def distinct_choices(logits: Tensor, top_k: int) -> int:
    """Return how many experts some token chose."""
    return int(logits.topk(top_k, -1).indices.unique().numel())


def sure_choices(logits: Tensor, top_k: int, gap: float = 1e-4) -> Tensor:
    """Tell for which tokens the choice of experts does not hang on the last bits: the next logit is `gap` away."""
    if logits.shape[-1] == top_k:
        return torch.ones(logits.shape[0], dtype=torch.bool, device=logits.device)
    top = logits.topk(top_k + 1, -1).values
    return top[:, -2] - top[:, -1] > gap
