"""Graphs for the tests of the passes: transformers' own models, exported cache-free, with weights whose logits really vary."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram, export
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, GptOssConfig, GptOssForCausalLM

from oxfuse.passes.weights import WeightTable

WINDOW, ORIGINAL = 19, 96
CONFIG = dict(
    num_hidden_layers=3,
    vocab_size=211,
    max_position_embeddings=384,
    use_cache=False,
    eos_token_id=None,
    hidden_size=48,
    intermediate_size=40,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=16,
    num_local_experts=6,
    num_experts_per_tok=3,
    sliding_window=WINDOW,
    rope_parameters=dict(
        rope_type="yarn", rope_theta=1.5e5, factor=4.0, truncate=False, original_max_position_embeddings=ORIGINAL
    ),
)
FUSIONS = ("sink_attention", "rotary_embedding", "moe_dispatch", "rms_norm")


def transformers_gpt_oss(experts: str = "grouped_mm", dtype: torch.dtype = torch.float32, **overrides: object) -> nn.Module:
    """Return transformers' model with random weights; logits have a standard deviation of about 2."""
    torch.manual_seed(0)
    config = GptOssConfig(**{**CONFIG, **overrides})
    config._attn_implementation, config._experts_implementation = "eager", experts
    model = GptOssForCausalLM(config).eval().requires_grad_(False)
    for name, p in model.named_parameters():
        if p.dim() == 1:
            p.normal_("norm" in name, 1 if "sink" in name else 0.2)
        else:
            p.normal_(0, 1 if "embed" in name else 2 * p.shape[-2 if p.dim() == 3 else -1] ** -0.5)
    return model.to(dtype)


def transformers_gpt_neox(attention: str = "eager", dtype: torch.dtype = torch.float32, **overrides: object) -> nn.Module:
    """Return transformers' model with random weights; logits have a standard deviation of about 2."""
    torch.manual_seed(0)
    sizes = dict(num_hidden_layers=3, vocab_size=211, hidden_size=64, num_attention_heads=4, intermediate_size=112)
    config = GPTNeoXConfig(**{**sizes, "max_position_embeddings": 384, "use_cache": False, **overrides})
    config._attn_implementation = attention
    model = GPTNeoXForCausalLM(config).eval().requires_grad_(False)
    for name, p in model.named_parameters():
        if p.dim() == 1:
            p.normal_("norm" in name and "weight" in name, 0.2)
        else:
            p.normal_(0, 1 if "embed_in" in name else 2 * p.shape[-1] ** -0.5)
    return model.to(dtype)


def export_causal(model: nn.Module, batched: bool = False) -> fx.GraphModule:
    """Export at [1, T], or [B, S] with `batched`."""
    return export_program(model, batched).module(check_guards=False)


@torch.no_grad()
def export_program(model: nn.Module, batched: bool = False) -> ExportedProgram:
    """Return what `export_causal` takes its module from; it gives any number of them."""
    batch, tokens, rows = Dim("B", min=1, max=64), Dim("T", min=1, max=4096), Dim("R", min=1, max=4096)
    ids = torch.zeros(1 + batched, 5, dtype=torch.long)
    inputs = dict(input_ids=ids, position_ids=ids.clone(), logits_to_keep=torch.zeros(2, dtype=torch.long), use_cache=False)
    shape = {0: batch, 1: tokens} if batched else {1: tokens}
    dims = dict(input_ids=shape, position_ids=shape, logits_to_keep={0: rows}, use_cache=None)
    return export(model, (), inputs, dynamic_shapes=dims, strict=False)


def bind(module: nn.Module, weights: WeightTable, values: Mapping[str, Tensor]) -> None:
    """Give every weight of a fused module its value: the recipe of the table applied to the checkpoint's tensor."""
    for name, weight in weights.items():
        value = values[weight.source if weight.part is None else f"{weight.source}_{weight.part}"]
        for step in weight.transforms:
            value = step.apply(value)
        owner, _, leaf = name.rpartition(".")
        parent = module.get_submodule(owner)
        parent._parameters.pop(leaf, None), parent._buffers.pop(leaf, None)
        parent.register_buffer(leaf, value.to(weight.dtype).contiguous())
