"""What `explain` says of modules: ours, transformers', changed ones, and ones that cannot be exported."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import oxfuse
from oxfuse.errors import UserError

from ..passes.graphs import transformers_gpt_neox, transformers_gpt_oss

IDS = torch.zeros(1, 7, dtype=torch.long)


@pytest.mark.parametrize("experts", ["grouped_mm", "batched_mm"])
def test_all_of_transformers_gpt_oss(experts: str) -> None:
    found = oxfuse.explain(transformers_gpt_oss(experts), IDS)
    assert found.counts == {"moe_dispatch": 3, "sink_attention": 3, "rotary_embedding": 3, "rms_norm": 7} and not found.left
    assert found.fused["model.layers.1.self_attn"] == {"sink_attention": 1, "rotary_embedding": 1}
    first, *rest = str(found).splitlines()
    assert first.startswith("GptOssForCausalLM: ") and first.endswith("7 rms_norm fused; no region was left alone.")
    assert ["model.layers.2.self_attn", "sink_attention,", "rotary_embedding"] in [line.split() for line in rest]
    assert rest[-1].split() == ["model.norm", "rms_norm"]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_gpt_neox_is_left_as_it_was(attention: str) -> None:
    model = transformers_gpt_neox(attention).train()
    model.gpt_neox.layers[1].eval()
    found = oxfuse.explain(model, {"input_ids": IDS})
    assert found.counts == {"sink_attention": 3, "rotary_embedding": 3} and not found.left
    assert model.training and not model.gpt_neox.layers[1].training


def test_a_mask_of_padding_is_handed_to_the_op() -> None:
    ids = torch.zeros(2, 7, dtype=torch.long)
    found = oxfuse.explain(transformers_gpt_neox("sdpa"), {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    assert found.counts == {"masked_attention": 3, "rotary_embedding": 3} and not found.left


def test_positions_of_the_caller_s_may_belong_to_several_sequences() -> None:
    """GPT-NeoX's mask hides one sequence from the next where positions restart; GPT-OSS's reads no positions."""
    given = {"input_ids": IDS, "position_ids": torch.arange(7)[None]}
    found = oxfuse.explain(transformers_gpt_neox("sdpa"), given)
    assert found.counts == {"masked_attention": 3, "rotary_embedding": 3} and not found.left
    assert oxfuse.explain(transformers_gpt_oss(), given).counts["sink_attention"] == 3


def test_a_mask_that_differs_between_heads_is_named() -> None:
    class Biased(nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return nn.functional.scaled_dot_product_attention(q, k, v, mask)

    q, k = torch.zeros(1, 4, 5, 8), torch.zeros(1, 4, 9, 8)
    found = oxfuse.explain(Biased(), (q, k, k, torch.zeros(1, 4, 5, 9)))
    reasons = {left.fusion: left.reason for left in found.left}
    assert reasons["sink_attention"].startswith("queries and keys are not of one sequence")
    assert reasons["masked_attention"].startswith("the mask has shape [1, 4, ")


def test_a_changed_layer_is_named() -> None:
    model = transformers_gpt_oss()
    norm = model.model.layers[1].post_attention_layernorm

    def forward(x: torch.Tensor) -> torch.Tensor:
        return norm.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)).tanh()

    norm.forward = forward
    found = oxfuse.explain(model, IDS)
    assert found.counts["rms_norm"] == 6
    (left,) = found.left
    assert (left.fusion, left.layer) == ("rms_norm", "model.layers.1.post_attention_layernorm")
    assert "1 region was left alone" in str(found)


def test_what_breaks_the_graph_is_named_with_the_setting() -> None:
    with pytest.raises(
        UserError, match=r'GptOssForCausalLM cannot be exported: .* call set_experts_implementation\("grouped_mm"\)'
    ):
        oxfuse.explain(transformers_gpt_oss("eager"), IDS)


def test_a_module_that_has_none_of_it() -> None:
    found = oxfuse.explain(nn.Linear(3, 3), torch.zeros(2, 3))
    assert str(found) == "Linear: nothing fused; no region was left alone."
    with pytest.raises(UserError, match=r"Linear cannot be exported: .*\[2, 4\]"):
        oxfuse.explain(nn.Linear(3, 3), torch.zeros(2, 4))
