"""Padded batches, and keys and values that are handed on, as ONNX models have them: attention, places and last tokens.

The ops stand in graphs between the insertion of the cache and ONNX; nothing runs them but checks. A mask of zeros and ones over
past and new tokens says what is padding; a token's place is the number of ones before it in its row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from oxfuse.passes.fusions.sink_attention.reference import _softmax, _visible


def sink_attention_past(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink: Tensor | None,
    past_k: Tensor | None,
    past_v: Tensor | None,
    mask: Tensor,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return attention of new tokens over the past and themselves, [B, S, NH, D], and the keys and values of both.

    q [B, S, NH, D], k and v [B, S, KV, D], sink [NH]; past_k and past_v [B, KV, P, D], None where P is 0; mask int64 [B, P + S].
    The results' keys and values are [B, KV, P + S, D]. A token at place p sees those at places p - window < place <= p whose mask
    is 1, all place <= p where window is 0; one that sees none yields 0. So it does not matter where in a row padding lies, and
    rows may have different lengths. Raises NotImplementedError off the CPU.
    """
    if q.device.type != "cpu":
        raise NotImplementedError(f"oxfuse::sink_attention_past has no kernel for device {q.device}; it runs on cpu.")
    wide = torch.promote_types(q.dtype, torch.float32)
    keys, values = (x.transpose(1, 2) for x in (k, v))
    if past_k is not None and past_v is not None:
        keys, values = torch.cat([past_k, keys], 2), torch.cat([past_v, values], 2)
    place, new = _places(mask), new_places(mask, q)
    visible = _visible(new[:, :, None], place[:, None], window) & (mask[:, None] != 0)  # [B, S, T]
    grouped = q.to(wide).unflatten(2, (k.shape[2], -1))  # [B, S, KV, G, D]
    scores = torch.einsum("bikgd,bkjd->bkgij", grouped, keys.to(wide)) * scale
    column = None if sink is None else sink.to(wide).unflatten(0, (k.shape[2], -1))[..., None, None]  # [KV, G, 1, 1]
    weights = _softmax(scores.masked_fill(~visible[:, None, None], -torch.inf), column)
    out = torch.einsum("bkgij,bkjd->bikgd", weights, values.to(wide)).to(q.dtype).flatten(2, 3).contiguous()
    return out, keys.contiguous(), values.contiguous()


def new_places(mask: Tensor, new: Tensor) -> Tensor:
    """Return the places of the new tokens, those of new [B, S, ...], as int64 [B, S]: the last of mask int64 [B, P + S]."""
    return _places(mask)[:, mask.shape[1] - new.shape[1] :].contiguous()


def last_tokens(x: Tensor, mask: Tensor) -> Tensor:
    """Return of x [B, S, H] each row's last token whose mask [B, S] is 1, the first one where all are 0, as [B, 1, H]."""
    last = mask.cumsum(1).argmax(1)  # of equal sums the first
    return x[torch.arange(x.shape[0], device=x.device), last].unsqueeze(1)


def tokens_from(x: Tensor, first: Tensor) -> Tensor:
    """Return of x [B, S, H] the tokens from index `first` on, int64 [1], counted from the end where negative: [B, R, H]."""
    return x[:, torch.arange(x.shape[1], device=x.device)[int(first) :]]


def _places(mask: Tensor) -> Tensor:
    return mask.cumsum(1) - mask


def _fake(q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, past_k: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    present = k.new_empty(k.shape[0], k.shape[2], rest[1].shape[1], k.shape[3])
    return q.new_empty(q.shape), present, torch.empty_like(present)


def _fake_places(mask: Tensor, new: Tensor) -> Tensor:
    return mask.new_empty(new.shape[:2])


def _fake_last(x: Tensor, mask: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], 1, x.shape[2])


def _fake_from(x: Tensor, first: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], torch.library.get_ctx().new_dynamic_size(), x.shape[2])


torch.library.custom_op("oxfuse::tokens_from", tokens_from, mutates_args=()).register_fake(_fake_from)  # how many, data tell
torch.library.triton_op("oxfuse::sink_attention_past", sink_attention_past, mutates_args=())
torch.library.triton_op("oxfuse::new_places", new_places, mutates_args=())
torch.library.triton_op("oxfuse::last_tokens", last_tokens, mutates_args=())
torch.library.register_fake("oxfuse::sink_attention_past", _fake, allow_override=True)  # the body's own would be slow
torch.library.register_fake("oxfuse::new_places", _fake_places, allow_override=True)
torch.library.register_fake("oxfuse::last_tokens", _fake_last, allow_override=True)
