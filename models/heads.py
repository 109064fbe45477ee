"""Models that are a body with a head: what the heads compute, their losses and their outputs, the same for every family.

A family's classes name their attributes and order the arguments of `forward`; see `models/README.md`.
"""

from __future__ import annotations

import warnings
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from oxfuse.errors import UserError
from oxfuse.models.configuration import Configuration
from oxfuse.models.losses import causal_lm_loss, classification_loss, span_loss, token_loss
from oxfuse.models.outputs import (
    BodyOutput,
    CausalLMOutput,
    ModelOutput,
    QuestionAnsweringOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from oxfuse.models.reference import Reference, RowsOutput, chosen, kept

Output = TypeVar("Output", bound=ModelOutput)


class Headed(Reference):
    """Base of a body with a head. `body_name` and `heads[0]` are the attributes that hold them, neither called body or head."""

    body_name: ClassVar[str]

    def __init__(self, config: Configuration, body: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.config = config
        self.add_module(self.body_name, body)
        self.add_module(self.heads[0], head)

    @property
    def body(self) -> nn.Module:
        """The bare model."""
        return self.get_submodule(self.body_name)

    @property
    def head(self) -> nn.Module:
        """The linear layer behind it."""
        return self.get_submodule(self.heads[0])

    def initialise_head(self) -> None:
        """Fill the head's parameters: normal weights, biases 0."""
        for name, parameter in self.head.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=self.config.initializer_range)

    def rows(self, input_ids: Tensor, position_ids: Tensor, logits_to_keep: Tensor, **wanted: Any) -> RowsOutput:
        """Return the head's values for some tokens of one sequence, [1, R, head]."""
        body = self.body(input_ids=input_ids, position_ids=position_ids, use_cache=False, return_dict=True, **wanted)
        values: Tensor = self.head(body.last_hidden_state[:, logits_to_keep])
        return RowsOutput(values=values, router_logits=getattr(body, "router_logits", None))

    def _output(self, output: Output, return_dict: bool | None) -> Output | tuple[object, ...]:
        return output if chosen(return_dict, self.config.return_dict) else output.to_tuple()


class CausalLM(Headed):
    """A language model: a head over the vocabulary, tied to the embeddings if the configuration says so."""

    def __init__(self, config: Configuration, body: nn.Module, embeddings: nn.Embedding) -> None:
        super().__init__(config, body, nn.Linear(config.hidden_size, config.vocab_size, bias=False))
        if config.tie_word_embeddings:
            self.head.weight = embeddings.weight
        else:
            self.initialise_head()

    def generate_logits(
        self, body: BodyOutput, labels: Tensor | None, logits_to_keep: int | Tensor, num_items_in_batch: Tensor | int | None
    ) -> CausalLMOutput:
        """Return logits and loss for what the body returned; the arguments are `forward`'s."""
        logits = self.head(kept(body.last_hidden_state, logits_to_keep))
        return CausalLMOutput(
            loss=causal_lm_loss(logits, labels, num_items_in_batch) if labels is not None else None,
            logits=logits,
            past_key_values=body.past_key_values,
            hidden_states=body.hidden_states,
            attentions=body.attentions,
        )


class SequenceClassifier(Headed):
    """A classifier of sequences: the head's values for the rightmost token that is not padding."""

    heads = ("score",)
    pooled = True

    def __init__(self, config: Configuration, body: nn.Module) -> None:
        super().__init__(config, body, nn.Linear(config.hidden_size, config.num_labels, bias=False))
        self.initialise_head()

    def classify(
        self, labels: Tensor | None, input_ids: Tensor | None, return_dict: bool | None, **inputs: Any
    ) -> SequenceClassifierOutput | tuple[object, ...]:
        """Run body and head; `inputs` are the body's.

        labels: int64 [B], or float [B] (regression), or float [B, labels] (several labels at once). Raises UserError for a batch
        without a pad_token_id, since it cannot be told where a row ends.
        """
        body = self.body(input_ids=input_ids, return_dict=True, **inputs)
        logits = self.head(body.last_hidden_state)
        batch, length = logits.shape[:2]
        pad = self.config.pad_token_id
        if pad is None and batch != 1:
            raise UserError(
                f"There are {batch} sequences, and the configuration has no pad_token_id to tell where each ends. "
                "Set pad_token_id in config.json, or give one sequence at a time."
            )
        if pad is None or input_ids is None:
            last = torch.full((batch,), length - 1, device=logits.device)
            if pad is not None:
                warnings.warn("inputs_embeds do not show padding: the last position of every row is used.", stacklevel=3)
        else:
            last = (torch.arange(length, device=logits.device) * (input_ids != pad)).argmax(-1)  # a row of pads alone gives 0
        values = logits[torch.arange(batch, device=logits.device), last]
        output = SequenceClassifierOutput(
            loss=classification_loss(values, labels, self.config.problem_type) if labels is not None else None,
            logits=values,
            past_key_values=body.past_key_values,
            hidden_states=body.hidden_states,
            attentions=body.attentions,
        )
        return self._output(output, return_dict)


class TokenClassifier(Headed):
    """A classifier of tokens, with a bias; dropout in training."""

    def __init__(self, config: Configuration, body: nn.Module) -> None:
        super().__init__(config, body, nn.Linear(config.hidden_size, config.num_labels))
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.initialise_head()

    def tag(self, labels: Tensor | None, return_dict: bool | None, **inputs: Any) -> TokenClassifierOutput | tuple[object, ...]:
        """Run body and head; `inputs` are the body's. labels int64 [B, S], -100 ignored."""
        body = self.body(return_dict=True, **inputs)
        logits = self.head(self.dropout(body.last_hidden_state))
        output = TokenClassifierOutput(
            loss=token_loss(logits, labels) if labels is not None else None,
            logits=logits,
            hidden_states=body.hidden_states,
            attentions=body.attentions,
        )
        return self._output(output, return_dict)


class QuestionAnswerer(Headed):
    """Finds a span: two values a token, how well the answer begins and ends there."""

    heads = ("qa_outputs",)

    def __init__(self, config: Configuration, body: nn.Module) -> None:
        super().__init__(config, body, nn.Linear(config.hidden_size, 2))
        self.initialise_head()

    def answer(
        self, start_positions: Tensor | None, end_positions: Tensor | None, return_dict: bool | None, **inputs: Any
    ) -> QuestionAnsweringOutput | tuple[object, ...]:
        """Run body and head; `inputs` are the body's. Positions int64 [B] or [B, 1]; those beyond the text do not count."""
        body = self.body(return_dict=True, **inputs)
        start, end = self.head(body.last_hidden_state).unbind(-1)
        both = start_positions is not None and end_positions is not None
        output = QuestionAnsweringOutput(
            loss=span_loss(start, end, start_positions, end_positions) if both else None,  # type: ignore[arg-type]
            start_logits=start.contiguous(),
            end_logits=end.contiguous(),
            hidden_states=body.hidden_states,
            attentions=body.attentions,
        )
        return self._output(output, return_dict)
