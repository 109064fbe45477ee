"""The plain-PyTorch reference of GPT-NeoX: no custom op, nothing that depends on data, so it exports as it stands.

It is the oracle of everything that the compiler makes, and trains. "Float32 inside" means promote(dtype, float32), so it runs in
float64 too. Parameters have the names of GPT-NeoX checkpoints: the language model's head is `embed_out`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oxfuse.models.cache import KVCache
from oxfuse.models.gpt_neox.config import GPTNeoXConfig
from oxfuse.models.heads import CausalLM, QuestionAnswerer, SequenceClassifier, TokenClassifier
from oxfuse.models.outputs import (
    BodyOutput,
    CausalLMOutput,
    QuestionAnsweringOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from oxfuse.models.precision import widened
from oxfuse.models.reference import Reference, RowsOutput, body_inputs, chosen, visible_keys
from oxfuse.models.rotary import RotaryEmbedding, rotate

_CAUSAL = "causal"


class GPTNeoXAttention(nn.Module):
    """Attention with one fused projection, laid out per head: q, k and v of a head lie side by side."""

    def __init__(self, config: GPTNeoXConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim, self.dropout = layer, config.head_dim, config.attention_dropout
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=config.attention_bias)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size, bias=config.attention_bias)

    def forward(
        self, x: Tensor, rotation: tuple[Tensor, Tensor], visible: Tensor | None, cache: KVCache | None, plain: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Return what the layer adds, [B, S, H], and the probabilities, [B, NH, S, K], if computed the plain way.

        x [B, S, H]; rotation: cos and sin [B, S, R]; visible bool [S, K] or [B, 1, S, K]: what each query sees of the K
        keys, those of the cache included; None: all up to itself.
        """
        qkv = self.query_key_value(x).view(*x.shape[:2], -1, 3 * self.head_dim).transpose(1, 2)  # [B, NH, S, 3 D]
        q, k, v = qkv.chunk(3, -1)
        q, k = rotate(q, *rotation), rotate(k, *rotation)
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        out, probabilities = self._plain(q, k, v, visible) if plain else (self._sdpa(q, k, v, visible), None)
        return self.dense(out.transpose(1, 2).flatten(2)), probabilities

    def _plain(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> tuple[Tensor, Tensor]:
        assert visible is not None
        scores = torch.matmul(widened(q), widened(k).transpose(2, 3)) * self.head_dim**-0.5  # [B, NH, S, K]
        # Not -inf: a query that sees nothing, at the padding on the left, would turn NaN, and every later layer with it. Added,
        # not put in place of the scores, such queries also have transformers' gradients.
        least = torch.zeros(visible.shape, dtype=scores.dtype, device=q.device).masked_fill(
            ~visible, torch.finfo(scores.dtype).min
        )
        probabilities = (scores + least).softmax(-1)
        if self.training and self.dropout:
            probabilities = F.dropout(probabilities, self.dropout)
        return torch.matmul(probabilities, widened(v)).to(q.dtype), probabilities.to(q.dtype)

    def _sdpa(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        if visible is None:
            return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=q.shape[2] > 1)
        return F.scaled_dot_product_attention(q, k, v, visible, dropout)


class GPTNeoXMLP(nn.Module):
    """Two linear layers around an activation."""

    def __init__(self, config: GPTNeoXConfig) -> None:
        super().__init__()
        self.activation = config.hidden_act
        self.dense_h_to_4h = nn.Linear(config.hidden_size, config.intermediate_size)
        self.dense_4h_to_h = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, S, H] -> what the layer adds, [B, S, H]."""
        out: Tensor = self.dense_4h_to_h(self._act(self.dense_h_to_4h(x)))
        return out

    def _act(self, x: Tensor) -> Tensor:
        match self.activation:
            case "gelu":
                return F.gelu(x)
            case "relu":
                return F.relu(x)
            case "silu":
                return F.silu(x)
            case _:  # gelu_fast and gelu_new: two spellings of the tanh form (Hendrycks and Gimpel, arXiv:1606.08415)
                return F.gelu(x, approximate="tanh")


class GPTNeoXLayer(nn.Module):
    """One layer: attention and MLP, each behind a norm, side by side (parallel residual) or one after the other."""

    def __init__(self, config: GPTNeoXConfig, layer: int) -> None:
        super().__init__()
        self.parallel = config.use_parallel_residual
        self.input_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.post_attention_dropout = nn.Dropout(config.hidden_dropout)
        self.post_mlp_dropout = nn.Dropout(config.hidden_dropout)
        self.attention = GPTNeoXAttention(config, layer)
        self.mlp = GPTNeoXMLP(config)

    def forward(
        self, x: Tensor, rotation: tuple[Tensor, Tensor], visible: Tensor | None, cache: KVCache | None, plain: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Return the stream after the layer [B, S, H] and the attention probabilities [B, NH, S, K], if `plain`."""
        attended, probabilities = self.attention(self.input_layernorm(x), rotation, visible, cache, plain)
        attended = self.post_attention_dropout(attended)
        if self.parallel:
            return self.post_mlp_dropout(self.mlp(self.post_attention_layernorm(x))) + attended + x, probabilities
        x = attended + x
        return self.post_mlp_dropout(self.mlp(self.post_attention_layernorm(x))) + x, probabilities


class GPTNeoXModel(Reference):
    """The bare model: token ids to the hidden states after the final norm."""

    config: GPTNeoXConfig

    def __init__(self, config: GPTNeoXConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_in = nn.Embedding(config.vocab_size, config.hidden_size)
        self.emb_dropout = nn.Dropout(config.hidden_dropout)
        self.layers = nn.ModuleList(GPTNeoXLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.rotary_emb = RotaryEmbedding(config.rope_parameters, config.rotary_dim)
        self.apply(self._initialise)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: KVCache | None = None,
        use_cache: bool | None = None,
        *,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BodyOutput | tuple[object, ...]:
        """Run the model.

        Exactly one of input_ids int64 [B, S] and inputs_embeds [B, S, H]. attention_mask [B, past + S]: 0 hides a key.
        position_ids int64 [B, S] or [1, S] turn the rotation and nothing else, and never mean packed sequences; by default
        past + arange(S), padding counted. past_key_values is extended in place. What is None defaults to the configuration;
        attention probabilities are only there where attention is computed the plain way, which asking for them brings about.
        Raises UserError on inputs that do not fit together.
        """
        config = self.config
        given = body_inputs(
            self.embed_in, input_ids, inputs_embeds, position_ids, past_key_values, chosen(use_cache, config.use_cache)
        )
        x, cache = self.emb_dropout(given.hidden), given.cache
        with_states = chosen(output_hidden_states, config.output_hidden_states)
        with_attentions = chosen(output_attentions, config.output_attentions)
        plain = with_attentions or config.attn_implementation == "eager"
        visible = None
        if plain or attention_mask is not None or given.past:
            visible = visible_keys(given.past, x.shape[1], attention_mask, {_CAUSAL: None}, x.device)[_CAUSAL]
        rotation = self.rotary_emb(given.position_ids)
        states, attentions = [], []
        for layer in self.layers:
            states += [x] * with_states
            x, probabilities = layer(x, rotation, visible, cache, plain)
            attentions += [probabilities] * with_attentions
        x = self.final_layer_norm(x)
        output = BodyOutput(
            last_hidden_state=x,
            past_key_values=cache,
            hidden_states=(*states, x) if with_states else None,
            attentions=tuple(attentions) if with_attentions else None,
        )
        return output if chosen(return_dict, config.return_dict) else output.to_tuple()

    def rows(self, input_ids: Tensor, position_ids: Tensor, logits_to_keep: Tensor, **wanted: Any) -> RowsOutput:
        """Return the hidden states of some tokens of one sequence, [1, R, H]."""
        body = self(input_ids=input_ids, position_ids=position_ids, use_cache=False, return_dict=True, **wanted)
        return RowsOutput(values=body.last_hidden_state[:, logits_to_keep])

    def _initialise(self, module: nn.Module) -> None:
        """Fill a module's own parameters as transformers does: normal weights, biases 0, norms 1."""
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


class GPTNeoXForCausalLM(CausalLM):
    """The language model."""

    body_name = "gpt_neox"
    heads = ("embed_out",)

    def __init__(self, config: GPTNeoXConfig) -> None:
        body = GPTNeoXModel(config)
        super().__init__(config, body, body.embed_in)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: KVCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        *,
        return_dict: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **wanted: bool | None,
    ) -> CausalLMOutput | tuple[object, ...]:
        """Run the model; arguments as for GPTNeoXModel, to which `wanted` goes.

        labels int64 [B, S], -100 ignored, are shifted here. logits_to_keep: how many of the last tokens (0: all), or indices,
        int64 [R]. num_items_in_batch divides the loss's sum instead of the number of labels.
        """
        body = self.body(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
            use_cache=use_cache,
            return_dict=True,
            **wanted,
        )
        return self._output(self.generate_logits(body, labels, logits_to_keep, num_items_in_batch), return_dict)


class GPTNeoXForSequenceClassification(SequenceClassifier):
    """The classifier of sequences."""

    body_name = "gpt_neox"

    def __init__(self, config: GPTNeoXConfig) -> None:
        super().__init__(config, GPTNeoXModel(config))

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: KVCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        *,
        return_dict: bool | None = None,
        **wanted: bool | None,
    ) -> SequenceClassifierOutput | tuple[object, ...]:
        """Run the model; arguments as for GPTNeoXModel, to which `wanted` goes, labels as for `classify`."""
        return self.classify(
            labels,
            input_ids,
            return_dict,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **wanted,
        )


class GPTNeoXForTokenClassification(TokenClassifier):
    """The classifier of tokens."""

    body_name = "gpt_neox"
    heads = ("classifier",)

    def __init__(self, config: GPTNeoXConfig) -> None:
        super().__init__(config, GPTNeoXModel(config))

    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: KVCache | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        *,
        return_dict: bool | None = None,
        **wanted: bool | None,
    ) -> TokenClassifierOutput | tuple[object, ...]:
        """Run the model; arguments as for GPTNeoXModel, to which `wanted` goes, labels as for `tag`. token_type_ids is unread."""
        return self.tag(
            labels,
            return_dict,
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **wanted,
        )


class GPTNeoXForQuestionAnswering(QuestionAnswerer):
    """The finder of spans."""

    body_name = "gpt_neox"

    def __init__(self, config: GPTNeoXConfig) -> None:
        super().__init__(config, GPTNeoXModel(config))

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        *,
        return_dict: bool | None = None,
        **wanted: bool | None,
    ) -> QuestionAnsweringOutput | tuple[object, ...]:
        """Run the model; arguments as for GPTNeoXModel, to which `wanted` goes, positions as for `answer`.

        token_type_ids is unread.
        """
        return self.answer(
            start_positions,
            end_positions,
            return_dict,
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **wanted,
        )
