"""What the reference models return: named fields that also behave like the tuple of those that are set."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from oxfuse.models.cache import KVCache


@dataclass(kw_only=True)
class ModelOutput:
    """Base of the outputs. Fields are None where the caller did not ask for them; indexing by number skips those."""

    def keys(self) -> list[str]:
        """Return the names of the fields that are set, in order."""
        return [f.name for f in fields(self) if getattr(self, f.name) is not None]

    def to_tuple(self) -> tuple[Any, ...]:
        """Return the fields that are set, in order."""
        return tuple(getattr(self, name) for name in self.keys())

    def __getitem__(self, key: str | int | slice) -> Any:
        if isinstance(key, str):
            if key in self.keys():
                return getattr(self, key)
            raise KeyError(key)
        return self.to_tuple()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.keys())


@dataclass(kw_only=True)
class BodyOutput(ModelOutput):
    """Of a bare model: last_hidden_state [B, S, H]; hidden_states L + 1 of the same, the last one that itself.

    attentions: L of [B, NH, S, keys].
    """

    last_hidden_state: Tensor
    past_key_values: KVCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass(kw_only=True)
class MoeModelOutput(BodyOutput):
    """Of a bare mixture-of-experts model; router_logits: L of [B * S, E], before any softmax."""

    router_logits: tuple[Tensor, ...] | None = None


@dataclass(kw_only=True)
class CausalLMOutput(ModelOutput):
    """Of a language model: logits [B, S, V]; the loss is a scalar; the rest as BodyOutput."""

    loss: Tensor | None = None
    logits: Tensor
    past_key_values: KVCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass(kw_only=True)
class MoeCausalLMOutput(ModelOutput):
    """Of a mixture-of-experts language model: as CausalLMOutput, with aux_loss, a scalar, and router_logits."""

    loss: Tensor | None = None
    aux_loss: Tensor | None = None
    logits: Tensor
    past_key_values: KVCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    router_logits: tuple[Tensor, ...] | None = None


@dataclass(kw_only=True)
class SequenceClassifierOutput(ModelOutput):
    """Of a classifier of sequences: logits [B, labels]; the rest as CausalLMOutput."""

    loss: Tensor | None = None
    logits: Tensor
    past_key_values: KVCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass(kw_only=True)
class TokenClassifierOutput(ModelOutput):
    """Of a classifier of tokens: logits [B, S, labels]; the rest as CausalLMOutput, but for the cache."""

    loss: Tensor | None = None
    logits: Tensor
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass(kw_only=True)
class QuestionAnsweringOutput(ModelOutput):
    """Of a finder of spans: start_logits and end_logits [B, S]; the rest as CausalLMOutput, but for the cache."""

    loss: Tensor | None = None
    start_logits: Tensor
    end_logits: Tensor
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
