"""Near-misses: regions that look like a fusion's and are not must stay as they are, with a reason that names the place."""

from __future__ import annotations

import pytest
import torch

from oxfuse.errors import UserError
from oxfuse.passes.graph import A, is_op
from oxfuse.passes.manager import run_passes
from oxfuse.passes.weights import table_of

from .graphs import FUSIONS, export_program, transformers_gpt_oss


def nodes(module, *targets):
    return [n for n in module.graph.nodes if is_op(n, *targets)]


def set_arg(node, index, value):
    node.args = (*node.args[:index], value, *node.args[index + 1 :])


def shift_window(module):
    """Query i also sees key 0: neither causal nor a window."""
    (bound,) = [n for n in nodes(module, A.sub.Tensor) if n.args[1] == 19]
    with module.graph.inserting_after(bound):
        odd = module.graph.call_function(A.mul.Tensor, (bound, 2))
    odd.meta = dict(bound.meta)
    bound.replace_all_uses_with(odd, delete_user_cb=lambda user: user is not odd)


def keep_sink_probability(module):
    node = next(n for n in nodes(module, A.slice.Tensor) if n.args[1:] == (3, 0, -1))
    set_arg(node, 2, 1)
    set_arg(node, 3, 9223372036854775807)


def sum_instead_of_maximum(module):
    node = nodes(module, A.softmax.int)[0]
    set_arg(node, 1, 1)


def turn_the_other_way(module):
    node = next(n for n in nodes(module, A.sub.Tensor) if is_op(n.args[0], A.mul.Tensor) and is_op(n.args[1], A.mul.Tensor))
    node.target = A.add.Tensor


def scale_sine_alone(module):
    sine = nodes(module, A.sin.default)[0]
    scaled = next(iter(sine.users))
    set_arg(scaled, 1, 1.0)


def plain_sigmoid(module):
    sigmoid = nodes(module, A.sigmoid.default)[0]
    sigmoid.target = A.tanh.default


def another_slope(module):
    """up + 1 becomes up + 2: every op and shape stays, only the numbers tell."""
    add = next(n for n in nodes(module, A.add.Tensor) if is_op(n.args[0], A.clamp.default) and n.args[1] == 1)
    set_arg(add, 1, 2)


def unequal_limits(module):
    clamp = next(n for n in nodes(module, A.clamp.default) if n.args[1] is None)
    set_arg(clamp, 2, 6.0)


def mean_over_tokens(module):
    mean = nodes(module, A.mean.dim)[0]
    set_arg(mean, 1, [1])


def cube(module):
    power = nodes(module, A.pow.Tensor_Scalar)[0]
    set_arg(power, 1, 3)


CASES = {
    shift_window: ("sink_attention", "neither causal nor a causal window"),
    keep_sink_probability: ("sink_attention", "sink's probability is not dropped"),
    sum_instead_of_maximum: ("sink_attention", "not over the keys"),
    turn_the_other_way: ("rotary_embedding", "expected"),
    scale_sine_alone: ("rotary_embedding", "scaled differently"),
    plain_sigmoid: ("moe_dispatch", "expected one sigmoid"),
    another_slope: ("moe_dispatch", "differs from the region"),
    unequal_limits: ("moe_dispatch", "not at one limit"),
    mean_over_tokens: ("rms_norm", "not over the last dim"),
    cube: ("rms_norm", "power is not 2"),
}


@pytest.fixture(scope="module")
def model():
    return transformers_gpt_oss(num_hidden_layers=2)


@pytest.fixture(scope="module")
def program(model):
    return export_program(model)


@pytest.mark.parametrize("change", CASES, ids=lambda c: c.__name__)
def test_a_near_miss_is_refused_with_its_reason(model, program, change):
    fusion, reason = CASES[change]
    module = program.module(check_guards=False)
    change(module)
    module.recompile()
    table = table_of(dict([*model.named_parameters(), *model.named_buffers()]), {}, frozenset(dict(model.named_buffers())))
    results = {r.name: r for r in run_passes(module, dict(table), policy="best_effort")}
    assert results[fusion].refused, results[fusion]
    assert any(reason in r.reason for r in results[fusion].refused), results[fusion].refused
    assert all("layers" in r.layer or "rotary" in r.layer or "norm" in r.layer for r in results[fusion].refused)
    assert results[fusion].count < {"rms_norm": 5}.get(fusion, 2)

    module = program.module(check_guards=False)
    change(module)
    with pytest.raises(UserError, match=fusion):
        run_passes(module, dict(table), requested=FUSIONS)


def test_a_requested_fusion_without_any_match_is_an_error():
    class Plain(torch.nn.Module):
        def forward(self, x):
            return (torch.relu(x),)

    module = torch.export.export(Plain(), (torch.ones(3),), strict=False).module(check_guards=False)
    with pytest.raises(UserError, match="sink_attention matched nothing"):
        run_passes(module, {}, requested=["sink_attention"])
    module = torch.export.export(Plain(), (torch.ones(3),), strict=False).module(check_guards=False)
    assert all(r.count == 0 for r in run_passes(module, {}))


def test_passes_are_idempotent(model, program):
    module = program.module(check_guards=False)
    table = table_of(dict([*model.named_parameters(), *model.named_buffers()]), {}, frozenset(dict(model.named_buffers())))
    run_passes(module, table, requested=FUSIONS)
    before = [str(n.target) for n in module.graph.nodes]
    again = run_passes(module, table)
    assert all(r.count == 0 for r in again), again
    assert [str(n.target) for n in module.graph.nodes] == before
