"""The plain-PyTorch reference of GPT-OSS: no custom op, nothing that depends on data, so it exports as it stands.

It is the oracle of everything that the compiler makes, and trains. "Float32 inside" means promote(dtype, float32), so it runs in
float64 too. Parameters have the names of transformers' GptOss checkpoints.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oxfuse.models.cache import KVCache
from oxfuse.models.contract import Experts
from oxfuse.models.gpt_oss.config import FULL, SLIDING, GptOssConfig
from oxfuse.models.heads import CausalLM, SequenceClassifier, TokenClassifier
from oxfuse.models.losses import load_balancing_loss
from oxfuse.models.outputs import MoeCausalLMOutput, MoeModelOutput, SequenceClassifierOutput, TokenClassifierOutput
from oxfuse.models.precision import widened
from oxfuse.models.reference import Reference, RowsOutput, body_inputs, chosen, visible_keys
from oxfuse.models.rotary import RotaryEmbedding, rotate


class GptOssRMSNorm(nn.Module):
    """weight * x / sqrt(mean(x²) + eps) over the last dim; the weight is multiplied before the result is rounded."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x [..., H] -> [..., H], same dtype."""
        wide = widened(x)
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return (self.weight * normed).to(x.dtype)


class GptOssAttention(nn.Module):
    """Grouped-query attention with one sink a head: a logit that takes part in the softmax and has no value."""

    def __init__(self, config: GptOssConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim, self.dropout = layer, config.head_dim, config.attention_dropout
        self.groups = config.num_attention_heads // config.num_key_value_heads
        heads, kv_heads = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        self.q_proj = nn.Linear(config.hidden_size, heads, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_heads, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_heads, bias=config.attention_bias)
        self.o_proj = nn.Linear(heads, config.hidden_size, bias=config.attention_bias)
        self.sinks = nn.Parameter(torch.empty(config.num_attention_heads))

    def forward(
        self, x: Tensor, rotation: tuple[Tensor, Tensor], visible: Tensor, cache: KVCache | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return what the layer adds, [B, S, H], and the probabilities, [B, NH, S, K].

        x [B, S, H]; rotation: cos and sin [B, S, D]; visible bool [S, K] or [B, 1, S, K]: what each query sees of the K
        keys, those of the cache included.
        """
        split = (*x.shape[:2], -1, self.head_dim)
        q, k, v = (proj(x).view(split).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, *rotation), rotate(k, *rotation)
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        k, v = widened(self._for_each_query_head(k)), widened(self._for_each_query_head(v))
        scores = torch.matmul(widened(q), k.transpose(2, 3)) * self.head_dim**-0.5  # [B, NH, S, K]
        scores = torch.where(visible, scores, -torch.inf)
        sinks = widened(self.sinks).view(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], -1)
        probabilities = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
        if self.training and self.dropout:
            probabilities = F.dropout(probabilities, self.dropout)
        out = torch.matmul(probabilities, v).to(x.dtype)
        return self.o_proj(out.transpose(1, 2).flatten(2)), probabilities.to(x.dtype)

    def _for_each_query_head(self, x: Tensor) -> Tensor:
        return x.unsqueeze(2).expand(-1, -1, self.groups, -1, -1).flatten(1, 2)  # [B, KV, K, D] -> [B, NH, K, D]


class GptOssTopKRouter(nn.Module):
    """Chooses experts by the largest logits; the softmax is over the chosen ones only."""

    def __init__(self, config: GptOssConfig) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.weight = nn.Parameter(torch.empty(config.num_local_experts, config.hidden_size))
        self.bias = nn.Parameter(torch.empty(config.num_local_experts))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [T, H] -> logits [T, E], weights [T, k], indices int64 [T, k]. Logits and weights in promote(dtype, float32)."""
        logits = F.linear(widened(x), widened(self.weight), widened(self.bias))
        top = torch.topk(logits, self.top_k, dim=-1)
        return logits, top.values.softmax(-1), top.indices


class GptOssExperts(Experts):
    """Two-layer networks with a clamped SwiGLU. Gate and up are interleaved columns: 0::2 gate, 1::2 up."""

    def __init__(self, config: GptOssConfig) -> None:
        super().__init__()
        experts, hidden, inner = config.num_local_experts, config.hidden_size, config.intermediate_size
        self.alpha, self.limit = config.swiglu_alpha, config.swiglu_limit
        self.gate_up_proj = nn.Parameter(torch.empty(experts, hidden, 2 * inner))
        self.gate_up_proj_bias = nn.Parameter(torch.empty(experts, 2 * inner))
        self.down_proj = nn.Parameter(torch.empty(experts, inner, hidden))
        self.down_proj_bias = nn.Parameter(torch.empty(experts, hidden))

    def forward(self, x: Tensor, router_indices: Tensor, routing_weights: Tensor, first: int = 0) -> Tensor:
        """Return what the experts first..first + n contribute to each token, [T, H]; n is dim 0 of the parameters.

        x [T, H], router_indices and routing_weights [T, k]. Every expert runs on every token; one that a token did not choose
        has no influence on it, NaN included.
        """
        gate_up = widened(torch.matmul(x, self.gate_up_proj) + self.gate_up_proj_bias[:, None])  # [n, T, 2I]
        gate = gate_up[..., 0::2].clamp(max=self.limit)
        up = gate_up[..., 1::2].clamp(-self.limit, self.limit)
        inner = (up + 1) * gate * torch.sigmoid(self.alpha * gate)
        out = torch.matmul(inner.to(x.dtype), self.down_proj) + self.down_proj_bias[:, None]  # [n, T, H]
        numbers = torch.arange(first, first + self.gate_up_proj.shape[0], device=x.device)
        share = torch.where(router_indices == numbers[:, None, None], routing_weights, 0).sum(-1).unsqueeze(-1)  # [n, T, 1]
        return torch.where(share != 0, out * share, 0).sum(0).to(x.dtype)


class GptOssMLP(nn.Module):
    """Router and experts."""

    def __init__(self, config: GptOssConfig) -> None:
        super().__init__()
        self.router = GptOssTopKRouter(config)
        self.experts = GptOssExperts(config)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, S, H] -> what the layer adds, [B, S, H], and the router's logits, [B * S, E]."""
        tokens = x.flatten(0, 1)
        logits, weights, indices = self.router(tokens)
        return self.experts(tokens, indices, weights).view(x.shape), logits


class GptOssDecoderLayer(nn.Module):
    """One layer: attention, then experts, each behind a norm and added to the residual stream."""

    def __init__(self, config: GptOssConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = GptOssAttention(config, layer)
        self.mlp = GptOssMLP(config)
        self.input_layernorm = GptOssRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = GptOssRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, x: Tensor, rotation: tuple[Tensor, Tensor], visible: Tensor, cache: KVCache | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the stream after the layer [B, S, H], attention probabilities [B, NH, S, K] and router logits [B * S, E]."""
        attended, probabilities = self.self_attn(self.input_layernorm(x), rotation, visible, cache)
        x = x + attended
        mixed, router_logits = self.mlp(self.post_attention_layernorm(x))
        return x + mixed, probabilities, router_logits


class GptOssModel(Reference):
    """The bare model: token ids to the hidden states after the final norm."""

    config: GptOssConfig

    def __init__(self, config: GptOssConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(GptOssDecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = GptOssRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = RotaryEmbedding(config.rope_parameters, config.head_dim)
        self.apply(self._initialise)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: KVCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cache_position: Tensor | None = None,
        *,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        output_router_logits: bool | None = None,
        return_dict: bool | None = None,
    ) -> MoeModelOutput | tuple[object, ...]:
        """Run the model.

        Exactly one of input_ids int64 [B, S] and inputs_embeds [B, S, H]. attention_mask [B, past + S]: 0 hides a key.
        position_ids int64 [B, S] or [1, S] turn the rotation and nothing else; by default past + arange(S), padding counted.
        past_key_values is extended in place. cache_position is accepted for old callers and unread: the cache knows its length.
        What is None defaults to the configuration. Raises UserError on inputs that do not fit together.
        """
        config = self.config
        given = body_inputs(
            self.embed_tokens, input_ids, inputs_embeds, position_ids, past_key_values, chosen(use_cache, config.use_cache)
        )
        x, cache = given.hidden, given.cache
        windows = {FULL: None, SLIDING: config.sliding_window}
        visible = visible_keys(given.past, x.shape[1], attention_mask, windows, x.device)
        rotation = self.rotary_emb(given.position_ids)
        with_states = chosen(output_hidden_states, config.output_hidden_states)
        with_attentions = chosen(output_attentions, config.output_attentions)
        with_router = chosen(output_router_logits, config.output_router_logits)
        states, attentions, router_logits = [], [], []
        for layer, kind in zip(self.layers, config.layer_types, strict=True):
            states += [x] * with_states
            x, probabilities, logits = layer(x, rotation, visible[kind], cache)
            attentions += [probabilities] * with_attentions
            router_logits += [logits] * with_router
        x = self.norm(x)
        output = MoeModelOutput(
            last_hidden_state=x,
            past_key_values=cache,
            hidden_states=(*states, x) if with_states else None,
            attentions=tuple(attentions) if with_attentions else None,
            router_logits=tuple(router_logits) if with_router else None,
        )
        return output if chosen(return_dict, config.return_dict) else output.to_tuple()

    def rows(self, input_ids: Tensor, position_ids: Tensor, logits_to_keep: Tensor, **wanted: Any) -> RowsOutput:
        """Return the hidden states of some tokens of one sequence, [1, R, H]."""
        body = self(input_ids=input_ids, position_ids=position_ids, use_cache=False, return_dict=True, **wanted)
        return RowsOutput(values=body.last_hidden_state[:, logits_to_keep], router_logits=body.router_logits)

    def _initialise(self, module: nn.Module) -> None:
        """Fill a module's own parameters as transformers does: normal weights, biases 0 but for the router's."""
        std = self.config.initializer_range
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, GptOssRMSNorm):
                nn.init.ones_(parameter)
            elif name.endswith("bias") and not isinstance(module, GptOssTopKRouter):
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=std)
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            with torch.no_grad():
                module.weight[module.padding_idx].zero_()


class GptOssForCausalLM(CausalLM):
    """The language model."""

    body_name = "model"
    heads = ("lm_head",)
    config: GptOssConfig

    def __init__(self, config: GptOssConfig) -> None:
        body = GptOssModel(config)
        super().__init__(config, body, body.embed_tokens)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: KVCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        cache_position: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        *,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> MoeCausalLMOutput | tuple[object, ...]:
        """Run the model; arguments as for GptOssModel.

        labels int64 [B, S], -100 ignored, are shifted here. logits_to_keep: how many of the last tokens (0: all), or indices,
        int64 [R]. With output_router_logits the load-balancing loss comes along, and is added to the loss times
        router_aux_loss_coef. num_items_in_batch divides the loss's sum instead of the number of labels.
        """
        config = self.config
        balanced = chosen(output_router_logits, config.output_router_logits)
        body = self.body(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            cache_position=cache_position,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            output_router_logits=balanced,
            return_dict=True,
        )
        plain = self.generate_logits(body, labels, logits_to_keep, num_items_in_batch)
        loss, aux_loss = plain.loss, None
        if balanced:
            new = attention_mask[:, -body.last_hidden_state.shape[1] :] if attention_mask is not None else None
            aux_loss = load_balancing_loss(body.router_logits, config.num_experts_per_tok, new)
            if loss is not None:
                loss = loss + config.router_aux_loss_coef * aux_loss
        output = MoeCausalLMOutput(**{**vars(plain), "loss": loss}, aux_loss=aux_loss, router_logits=body.router_logits)
        return self._output(output, return_dict)


class GptOssForSequenceClassification(SequenceClassifier):
    """The classifier of sequences."""

    body_name = "model"

    def __init__(self, config: GptOssConfig) -> None:
        super().__init__(config, GptOssModel(config))

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: KVCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        *,
        return_dict: bool | None = None,
        **wanted: bool | None,
    ) -> SequenceClassifierOutput | tuple[object, ...]:
        """Run the model; arguments as for GptOssModel, to which `wanted` goes, labels as for `classify`."""
        return self.classify(
            labels,
            input_ids,
            return_dict,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **wanted,
        )


class GptOssForTokenClassification(TokenClassifier):
    """The classifier of tokens."""

    body_name = "model"
    heads = ("score",)

    def __init__(self, config: GptOssConfig) -> None:
        super().__init__(config, GptOssModel(config))

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: KVCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        *,
        return_dict: bool | None = None,
        **wanted: bool | None,
    ) -> TokenClassifierOutput | tuple[object, ...]:
        """Run the model; arguments as for GptOssModel, to which `wanted` goes, labels as for `tag`."""
        return self.tag(
            labels,
            return_dict,
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **wanted,
        )
