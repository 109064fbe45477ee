"""What all reference models share: the way in (ids or embeddings, positions, masks, cache), and the contract with the compiler.

A reference is a body, which turns tokens into hidden states, or a body with a head (`heads.py`). The compiler sees `rows` alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from oxfuse.errors import UserError
from oxfuse.models.cache import KVCache
from oxfuse.models.configuration import Configuration


class Reference(nn.Module):
    """Base of the reference models, bodies and models with heads alike."""

    config: Configuration
    heads: ClassVar[tuple[str, ...]] = ()
    """Attributes of the model's own head: what a checkpoint of another task lacks."""
    pooled: ClassVar[bool] = False
    """Whether the model answers with one row a sequence, which it picks itself."""

    def rows(self, input_ids: Tensor, position_ids: Tensor, logits_to_keep: Tensor, **wanted: Any) -> RowsOutput:
        """Return what the model says about the tokens `logits_to_keep`, int64 [R], of one sequence: values [1, R, ...].

        input_ids and position_ids int64 [1, T]. This is what the compiler exports, and runs as the oracle. `wanted` asks the
        body for more, such as `output_router_logits`.
        """
        raise NotImplementedError

    @classmethod
    def from_pretrained(cls, source: Path | str, *, dtype: torch.dtype = torch.float32, **values: Any) -> Self:
        """Return this class's model of a checkpoint folder, in eval mode; see `load_reference`.

        `values` replace keys of config.json, such as `num_labels`. A head that the checkpoint lacks is initialised, with a
        warning: it has to be trained. Raises UserError if the checkpoint is of another model, or not whole.
        """
        from oxfuse.models.load import load_class  # it imports the registry, whose members import this module

        return load_class(cls, source, dtype, values)

    def save_pretrained(self, folder: Path | str) -> None:
        """Write config.json and model.safetensors into `folder`, which is made where it is not; files of these names go.

        The folder loads as a checkpoint here and in transformers. Raises UserError where it cannot be written.
        """
        from oxfuse.models.save import save_reference

        save_reference(self, Path(folder))


@dataclass(frozen=True, kw_only=True)
class RowsOutput:
    """What `Reference.rows` returns: values [1, R, ...], and L of [T, E] router logits where they were asked for."""

    values: Tensor
    router_logits: tuple[Tensor, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class BodyInputs:
    """What a body begins with: the first hidden states [B, S, H], positions [B or 1, S], and the cache to extend."""

    hidden: Tensor
    position_ids: Tensor
    past: int
    cache: KVCache | None


def body_inputs(
    embeddings: nn.Embedding,
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    position_ids: Tensor | None,
    past_key_values: KVCache | None,
    use_cache: bool,
) -> BodyInputs:
    """Return what a body begins with. Raises UserError unless exactly one of input_ids and inputs_embeds is given.

    Positions default to past + arange(S), padding counted.
    """
    if (input_ids is None) == (inputs_embeds is None):
        found = "neither" if input_ids is None else "both"
        raise UserError(f"Found {found} of input_ids and inputs_embeds. Give exactly one.")
    if past_key_values is not None and not isinstance(past_key_values, KVCache):
        raise UserError(f"past_key_values is a {type(past_key_values).__name__}. Give what an earlier call returned, or None.")
    cache = past_key_values
    if cache is None and use_cache:
        cache = KVCache()
    if inputs_embeds is not None:
        hidden, length = inputs_embeds, inputs_embeds.shape[1]
    else:
        assert input_ids is not None
        hidden, length = embeddings(input_ids), input_ids.shape[1]
    past = cache.get_seq_length() if cache is not None else 0
    if position_ids is None:
        position_ids = torch.arange(past, past + length, device=hidden.device).unsqueeze(0)
    return BodyInputs(hidden=hidden, position_ids=position_ids, past=past, cache=cache)


def visible_keys(
    past: int, length: int, attention_mask: Tensor | None, windows: Mapping[str, int | None], device: torch.device
) -> dict[str, Tensor]:
    """Return, for each of `windows` (in tokens, the query's own included; None: all), which keys each query sees.

    bool [S, past + S], or [B, 1, S, past + S] under an attention_mask [B, past + S], whose zeros hide keys. Raises UserError if
    the mask has another shape.
    """
    query = torch.arange(past, past + length, device=device)[:, None]
    key = torch.arange(past + length, device=device)
    causal = key <= query
    masks = {name: causal if window is None else causal & (key > query - window) for name, window in windows.items()}
    if attention_mask is None:
        return masks
    if attention_mask.dim() != 2 or attention_mask.shape[1] != past + length:
        raise UserError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; expected [batch, {past + length}]: "
            f"{past} cached tokens and {length} new ones. Give one 0 or 1 for each."
        )
    return {name: mask & attention_mask.bool()[:, None, None] for name, mask in masks.items()}


def chosen(given: bool | None, default: bool) -> bool:
    """Return what the caller said, or what the configuration says."""
    return default if given is None else given


def kept(hidden: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    """Return the rows of hidden [B, S, H] that a head shall see: the last n (0: all), or those of indices int64 [R]."""
    if isinstance(logits_to_keep, Tensor):
        if logits_to_keep.dim() != 1:
            raise UserError(f"logits_to_keep has shape {tuple(logits_to_keep.shape)}. Give a number, or indices in one dim.")
        return hidden[:, logits_to_keep]
    return hidden[:, -logits_to_keep:] if logits_to_keep else hidden
