"""bfloat16 on the fused graph: no less exact than transformers' own, judged where both take the oracle's experts.

Routing in 16 bits flips between near experts, and a flip moves logits more than all rounding does. So both candidates are given
the choices of the float32 oracle, and flips are counted apart.
"""

from __future__ import annotations

import pytest
import torch

from oxfuse.models import load_reference
from oxfuse.passes.fusions.moe_dispatch import reference as moe

from .cases import CASES, Case, random_ids
from .fused import fused_model

TOKENS = 150


def forced_moe(choices: list[torch.Tensor], flips: list[int]):
    """Return a moe_dispatch that takes the next layer's choices from a list, and notes how many its own router would change."""
    layers = iter(choices)

    def dispatch(x, router_weight, router_bias, w1, s1, b1, w2, s2, b2, top_k, alpha, limit):
        indices = next(layers)
        own, _ = moe.route(x, router_weight, router_bias, top_k)
        flips.append(int((own.sort(-1).values != indices.sort(-1).values).any(-1).sum()))
        logits = torch.nn.functional.linear(x.float(), router_weight.float(), router_bias.float())
        weights = logits.gather(1, indices).softmax(-1)
        parts = moe.experts(x, w1, s1, b1, w2, s2, b2, alpha, limit)
        return moe.combine(parts, indices, weights).to(x.dtype)

    return dispatch


@pytest.mark.parametrize("case", [CASES[i] for i in (0, 1, 8, 9, 11)], ids=lambda case: case.name)
@torch.no_grad()
def test_bf16_is_as_exact_as_transformers(case: Case, tmp_path):
    folder = case.write(tmp_path / "checkpoint", torch.bfloat16)
    ids = random_ids(case, 1, TOKENS)
    oracle = load_reference(folder)(input_ids=ids, output_router_logits=True)
    top_k = load_reference(folder).config.num_experts_per_tok
    choices = [logits.topk(top_k).indices for logits in oracle.router_logits]

    flips: list[int] = []

    def force(step, values):
        dispatch = forced_moe(choices, flips)
        for node in step.graph.nodes:
            if str(node.target) == "oxfuse.moe_dispatch.default":
                node.target = dispatch

    ours = fused_model(folder, dtype="bfloat16", change=force).logits(ids)[0]

    theirs = case.transformers(folder, tmp_path / "theirs", torch.bfloat16)
    their_flips = []
    for layer, indices in zip(theirs.model.layers, choices, strict=True):
        force_router(layer.mlp.router, indices, their_flips)
    theirs = theirs(input_ids=ids).logits[0].float()

    error_ours, error_theirs = (float((x - oracle.logits[0]).pow(2).mean().sqrt()) for x in (ours, theirs))
    print(f"{case.name}: RMS {error_ours:.4f}, transformers {error_theirs:.4f}; flips {sum(flips)} and {sum(their_flips)}")
    assert error_ours <= 1.2 * error_theirs
    assert sum(flips) <= sum(their_flips) * 1.2 + 3


def force_router(router, indices, flips):
    own = router.forward

    def forward(hidden_states):
        logits, _, chosen = own(hidden_states)
        flips.append(int((chosen.sort(-1).values != indices.sort(-1).values).any(-1).sum()))
        all_logits = torch.nn.functional.linear(hidden_states.reshape(-1, router.weight.shape[1]), router.weight, router.bias)
        return logits, all_logits.gather(1, indices).softmax(-1, dtype=all_logits.dtype), indices

    router.forward = forward
