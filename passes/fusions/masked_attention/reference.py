"""Attention over keys that a tensor holds, hidden by a mask that a tensor holds: what the op means, and its registration.

Models that keep their own cache hand their attention all that it has room for, and a mask that says which of it is written and
visible. Nothing of its structure is known when such a graph is compiled.
"""

from __future__ import annotations

import torch
from torch import Tensor

from oxfuse.passes.fusions.linear.reference import arch_of
from oxfuse.passes.fusions.sink_attention.reference import _softmax


def masked_attention(q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, mask: Tensor, scale: float) -> Tensor:
    """Return attention of the queries over all keys that the mask leaves, [B, S, NH, D], contiguous.

    q [B, S, NH, D], k and v [B, L, KV, D] with NH a multiple of KV, sink [NH]; mask [B or 1, 1, S or 1, L]: bool, true where a
    key is visible, or of a floating dtype and added to the scaled scores. Softmax and sums in promote(dtype, float32), one
    rounding at the end; a query that sees no key yields 0. Raises NotImplementedError on devices other than cpu and cuda.
    """
    if q.device.type == "cuda":
        from oxfuse.passes.fusions.masked_attention.triton import launch_masked  # only here: triton is slow to import

        return launch_masked(torch.library.wrap_triton, q, k, v, sink, mask, scale, arch_of(q.device))
    if q.device.type != "cpu":
        raise NotImplementedError(f"oxfuse::masked_attention has no kernel for device {q.device}; it runs on cpu and cuda.")
    return _attend(q, k, v, sink, mask, scale)


def _attend(q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, mask: Tensor, scale: float) -> Tensor:
    wide = torch.promote_types(q.dtype, torch.float32)
    grouped = q.to(wide).unflatten(2, (k.shape[2], -1))  # [B, S, KV, G, D]
    scores = torch.einsum("bikgd,bjkd->bkgij", grouped, k.to(wide)) * scale
    shown = mask.unsqueeze(1)
    scores = scores.masked_fill(~shown, -torch.inf) if mask.dtype == torch.bool else scores + shown.to(wide)
    column = None if sink is None else sink.to(wide).unflatten(0, (k.shape[2], -1))[..., None, None]  # [KV, G, 1, 1]
    return torch.einsum("bkgij,bjkd->bikgd", _softmax(scores, column), v.to(wide)).to(q.dtype).flatten(2, 3).contiguous()


def _fake(q: Tensor, *rest: object) -> Tensor:
    return q.new_empty(q.shape)


torch.library.triton_op("oxfuse::masked_attention", masked_attention, mutates_args=())
torch.library.register_fake("oxfuse::masked_attention", _fake, allow_override=True)  # the body's own would be slow
