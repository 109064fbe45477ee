"""The passes on graphs that nobody here wrote: transformers' own GPT-OSS, whichever way it computes its experts."""

from __future__ import annotations

import itertools

import pytest
import torch

from oxfuse.passes.manager import run_passes
from oxfuse.passes.weights import table_of

from .graphs import FUSIONS, WINDOW, bind, export_causal, transformers_gpt_neox, transformers_gpt_oss


def fused(model, batched=False, requested=FUSIONS):
    module = export_causal(model, batched)
    state = dict([*model.named_parameters(), *model.named_buffers()])
    weights = table_of(state, {}, frozenset(dict(model.named_buffers())))
    results = {r.name: r for r in run_passes(module, weights, requested=requested)}
    bind(module, weights, state)
    return module, results


PAIRWISE = {
    (torch.float32, "grouped_mm", False),
    (torch.float32, "batched_mm", True),
    (torch.bfloat16, "grouped_mm", True),
    (torch.bfloat16, "batched_mm", False),
}
GPT_OSS = list(itertools.product([torch.float32, torch.bfloat16], ["grouped_mm", "batched_mm"], [False, True]))


@pytest.mark.parametrize(
    ("dtype", "experts", "batched"), [pytest.param(*g, marks=() if g in PAIRWISE else pytest.mark.slow) for g in GPT_OSS]
)
@torch.no_grad()
def test_every_layer_fuses_and_agrees(dtype, experts, batched):
    model = transformers_gpt_oss(experts, dtype)
    module, results = fused(model, batched)
    layers = model.config.num_hidden_layers
    counts = {name: results[name].count for name in FUSIONS}
    assert counts == {"sink_attention": layers, "rotary_embedding": layers, "moe_dispatch": layers, "rms_norm": 2 * layers + 1}
    windows = [n.args[4] for n in module.graph.nodes if "sink_attention_dense" in str(n.target)]
    assert windows == [WINDOW, 0, WINDOW]
    left = {str(n.target) for n in module.graph.nodes if n.op == "call_function"}
    assert not {t for t in left if any(word in t for word in ("softmax", "topk", "rsqrt", "cos", "sigmoid"))}

    tokens = 150  # beyond the window and the original context
    ids = torch.randint(0, 211, (2 if batched else 1, tokens), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(tokens).expand_as(ids)
    rows = torch.arange(tokens)
    expected = model(input_ids=ids, position_ids=positions, use_cache=False).logits.float()
    got = module(input_ids=ids, position_ids=positions, logits_to_keep=rows, use_cache=False)[0].float()
    assert expected.std() > 1
    if dtype == torch.float32:
        assert (got - expected).abs().max() <= 1e-4 * max(1.0, float(expected.abs().max()))
    else:
        exact = transformers_gpt_oss(experts)(input_ids=ids, position_ids=positions, use_cache=False).logits
        theirs, ours = ((x - exact).pow(2).mean().sqrt() for x in (expected, got))
        assert ours <= theirs * 1.2


NEOX = {
    "parallel": {},
    "sequential": {"use_parallel_residual": False, "hidden_act": "gelu_new", "attention_bias": False},
    "whole heads": {"rotary_pct": 1.0},
    "odd part": {"hidden_size": 80},
    "yarn": {"rotary_pct": 0.5, "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 96}},
}


ALWAYS = {("parallel", "eager", False), ("odd part", "sdpa", True), ("whole heads", "eager", True), ("sequential", "sdpa", False)}
GRAPHS = [(name, attention, batched) for name in NEOX for attention in ("eager", "sdpa") for batched in (False, True)]


@pytest.mark.parametrize(
    ("name", "attention", "batched"), [pytest.param(*g, marks=() if g in ALWAYS else pytest.mark.slow) for g in GRAPHS]
)
@torch.no_grad()
def test_every_layer_of_gpt_neox_fuses_and_agrees(name, attention, batched):
    """Through the arithmetic for packed sequences, which transformers' graph holds where positions are given without a mask."""
    model = transformers_gpt_neox(attention, **NEOX[name])
    module, results = fused(model, batched, ("sink_attention", "rotary_embedding"))
    assert (results["sink_attention"].count, results["rotary_embedding"].count) == (3, 3)
    left = {str(n.target) for n in module.graph.nodes if n.op == "call_function"}
    assert not {t for t in left if any(word in t for word in ("softmax", "scaled_dot", "cos", "sin."))}
    ids = torch.randint(0, 211, (2 if batched else 1, 150), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(150).expand_as(ids)
    expected = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    got = module(input_ids=ids, position_ids=positions, logits_to_keep=torch.arange(150), use_cache=False)[0]
    assert expected.std() > 1 and (got - expected).abs().max() <= 1e-4 * max(1.0, float(expected.abs().max()))
