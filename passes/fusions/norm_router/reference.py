"""Residual sum, RMSNorm and a router's logits: what the op means, and its registration."""

from __future__ import annotations

import torch
from torch import Tensor

from oxfuse.passes.fusions.linear.reference import arch_of
from oxfuse.passes.fusions.rms_norm.reference import add_rms_norm


def norm_router(
    x: Tensor, residual: Tensor, norm_weight: Tensor, eps: float, router_weight: Tensor, router_bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (normed, total, logits): `add_rms_norm` of x and residual, and the router's logits of every token.

    x and residual [T, H], norm_weight [H], router_weight [E, H], router_bias [E], all of one dtype. normed and total [T, H] are
    in it; logits [T, E] in promote(x.dtype, float32), computed from normed as it is rounded. All contiguous.
    Raises NotImplementedError on devices other than cpu and cuda.
    """
    if x.device.type == "cuda":
        from oxfuse.passes.fusions.norm_router.triton import launch_norm_router

        args = x, residual, norm_weight, eps, router_weight, router_bias
        return launch_norm_router(torch.library.wrap_triton, *args, arch=arch_of(x.device))
    if x.device.type != "cpu":
        raise NotImplementedError(f"oxfuse::norm_router has no kernel for device {x.device}; it runs on cpu and cuda.")
    normed, total = add_rms_norm(x, residual, norm_weight, eps)
    wide = torch.promote_types(x.dtype, torch.float32)
    return normed, total, torch.nn.functional.linear(normed.to(wide), router_weight.to(wide), router_bias.to(wide))


def _fake(
    x: Tensor, residual: Tensor, norm_weight: Tensor, eps: float, router_weight: Tensor, router_bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    logits = x.new_empty(x.shape[0], router_weight.shape[0], dtype=torch.promote_types(x.dtype, torch.float32))
    return x.new_empty(x.shape), x.new_empty(x.shape), logits


torch.library.triton_op("oxfuse::norm_router", norm_router, mutates_args=())
torch.library.register_fake("oxfuse::norm_router", _fake, allow_override=True)  # the body's own would be slow
