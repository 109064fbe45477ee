"""Merged step modules compute what they did, of fewer and larger ops, and can be exported again."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, fx

from oxfuse.compiler.export import export_step
from oxfuse.compiler.fuse import Fused, fuse
from oxfuse.compiler.plan import Plan
from oxfuse.errors import InternalError
from oxfuse.models.virtual import virtual_model
from oxfuse.passes.graph import OXFUSE, A, args_of, is_op
from oxfuse.passes.insert_cache import PagedCache
from oxfuse.passes.merge import merge_ops
from oxfuse.runtime.manifest import cache_shapes

from ..checkpoints import random_gpt_oss
from ..neox import random_gpt_neox
from ..parity.fused import bind, plan_of, weight_values

BLOCK_SIZE, LAYERS = 4, 2
Kind = Literal["step", "decode"]
Part = tuple[int, int]
"""Keys before the step and new tokens of a sequence; (0, 0) is a padded one, which in a decode step has a token all the same."""
MIXED: list[Part] = [(9, 3), (0, 5), (30, 1), (0, 0), (4, 1)]
DECODE: list[Part] = [(9, 1), (0, 1), (0, 0), (30, 1)]
Edit = Callable[[fx.Graph], None]


@dataclass(frozen=True, kw_only=True)
class Subject:
    plan: Plan
    fused: Fused

    def copy(self) -> fx.GraphModule:
        graph = fx.Graph()
        graph.output(graph.graph_copy(self.fused.step.graph, {}))
        return fx.GraphModule(self.fused.step, graph)

    def merged(self, kind: Kind) -> tuple[fx.GraphModule, dict[str, int]]:
        module = self.copy()
        return module, merge_ops(module, self.fused.cache, kind)


def fused_step(folder: Path, **options: Any) -> Subject:
    plan = plan_of(folder, **options)
    model = virtual_model(plan.contract, plan.config, plan.task, plan.dtype)
    encodings = {name: source.encoding for name, source in plan.sources.items()}
    fused = fuse(model, encodings, requested=plan.contract.fusions)
    bind(fused.step, weight_values(plan, fused))
    return Subject(plan=plan, fused=fused)


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return fused_step(random_gpt_oss(tmp_path_factory.mktemp("gpt_oss"), num_hidden_layers=LAYERS))


@pytest.fixture(scope="module")
def gpt_neox(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return fused_step(random_gpt_neox(tmp_path_factory.mktemp("gpt_neox"), num_hidden_layers=LAYERS))


@pytest.fixture
def subject(request: pytest.FixtureRequest) -> Subject:
    return request.getfixturevalue(request.param)


def step_inputs(cache: PagedCache, parts: Sequence[Part], kind: Kind) -> list[Tensor]:
    """Return inputs of a step; groups have block tables of their own, and caches hold something everywhere."""
    generator, groups = torch.Generator().manual_seed(0), len(cache.windows)
    new = [max(count, 1) if kind == "decode" else count for _, count in parts]
    columns = max(-(-(past + count) // BLOCK_SIZE) for past, count in parts) + 1
    blocks = 1 + len(parts) * columns
    orders = [torch.randperm(blocks - 1, generator=generator).add(1) for _ in range(groups)]
    tables = torch.stack(orders).view(groups, -1, columns)
    slots: list[list[int]] = [[] for _ in range(groups)]
    positions: list[int] = []
    for n, ((past, count), tokens) in enumerate(zip(parts, new, strict=True)):
        positions += range(past, past + tokens)
        for table, row in zip(tables[:, n], slots, strict=True):
            places = range(past, past + count)
            row += [int(table[place // BLOCK_SIZE]) * BLOCK_SIZE + place % BLOCK_SIZE for place in places]
            row += [-1] * (tokens - count)
    caches = [
        torch.randn(blocks, *shape, generator=generator)
        for layer in cache.layers
        for shape in cache_shapes(layer.kv_heads, layer.head_dim, BLOCK_SIZE)
    ]
    total = sum(new)
    ints = (
        torch.randint(0, 200, (total,), generator=generator),
        torch.tensor(positions),
        torch.tensor([0, *new]).cumsum(0),
        torch.tensor([past + count for past, count in parts]),
        torch.tensor(slots),
        tables,
        torch.arange(total).flip(0),
    )
    return [*ints, *caches]


def run(module: fx.GraphModule, inputs: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Return the logits, and the caches as the step leaves them."""
    inputs = [tensor.clone() for tensor in inputs]
    with torch.no_grad():
        logits = module(*inputs)
    return logits, list(inputs[7:])


def assert_same(got: Tensor, expected: Tensor, what: str) -> None:
    assert torch.isfinite(expected).all()
    error = (got - expected).abs().max()
    assert error <= 1e-5 * expected.abs().max(), f"{what}: off by {error:.1e}"


def assert_computes_the_same(merged: fx.GraphModule, subject: Subject, parts: Sequence[Part], kind: Kind) -> None:
    inputs = step_inputs(subject.fused.cache, parts, kind)
    (got, mine), (expected, theirs) = run(merged, inputs), run(subject.copy(), inputs)
    assert_same(got, expected, "logits")
    for i, (a, b, before) in enumerate(zip(mine, theirs, inputs[7:], strict=True)):
        assert not torch.equal(b, before)
        assert_same(a, b, f"cache {i}")


def ops(graph: fx.Graph) -> Counter[str]:
    """Count the calls of our ops and of dense layers."""
    targets = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    return Counter(name.removesuffix(".default") for name in targets if name.startswith(("oxfuse.", "aten.linear.")))


EXPECTED = {
    ("gpt_oss", "step"): (
        {"rotary_embedding_store": 2},
        {
            "rms_norm": 1,
            "add_rms_norm": 4,
            "rotary_embedding_store": 2,
            "sink_attention_cached": 2,
            "moe_dispatch": 2,
            "linear": 9,
        },
    ),
    ("gpt_oss", "decode"): (
        {"rotary_embedding_store": 2, "qkv_rotary": 2, "linear_rows": 3, "activation": 0, "norm_router": 2},
        {
            "rms_norm": 1,
            "add_rms_norm": 2,
            "qkv_rotary": 2,
            "sink_attention_cached": 2,
            "norm_router": 2,
            "moe_experts": 2,
            "linear_rows": 3,
        },
    ),
    ("gpt_neox", "step"): (
        {"rotary_embedding_store": 2},
        {"rotary_embedding_store": 2, "sink_attention_cached": 2, "linear": 9},
    ),
    ("gpt_neox", "decode"): (
        {"rotary_embedding_store": 2, "qkv_rotary": 2, "linear_rows": 7, "activation": 2, "norm_router": 0},
        {"qkv_rotary": 2, "sink_attention_cached": 2, "linear_rows": 7},
    ),
}


@pytest.mark.parametrize(("subject", "kind"), EXPECTED, indirect=["subject"])
def test_merged_modules_compute_the_same(subject: Subject, kind: Kind, request: pytest.FixtureRequest) -> None:
    counts, left = EXPECTED[request.node.callspec.params["subject"], kind]
    merged, found = subject.merged(kind)
    assert found == counts
    assert ops(merged.graph) == {("aten." if name == "linear" else "oxfuse.") + name: count for name, count in left.items()}
    for parts in [DECODE, [(7, 1)], [(0, 1), (0, 0)]] if kind == "decode" else [MIXED, [(0, 6)], [(3, 1)]]:
        assert_computes_the_same(merged, subject, parts, kind)


@pytest.mark.slow
def test_packed_experts_and_no_biases(tmp_path: Path) -> None:
    folder = random_gpt_oss(tmp_path, layout="mxfp4", intermediate_size=64, num_hidden_layers=LAYERS, attention_bias=False)
    subject = fused_step(folder)
    for kind, parts in (("step", MIXED), ("decode", DECODE)):
        merged, found = subject.merged(kind)
        assert found == EXPECTED["gpt_oss", kind][0]
        assert_computes_the_same(merged, subject, parts, kind)


QUICK = [("gpt_oss", "decode"), ("gpt_neox", "step")]
EXPORTS = [pytest.param(*key, marks=() if key in QUICK else pytest.mark.slow) for key in EXPECTED]


@pytest.mark.parametrize(("subject", "kind"), EXPORTS, indirect=["subject"])
def test_merged_modules_can_be_exported(subject: Subject, kind: Kind) -> None:
    merged, _ = subject.merged(kind)
    plan, cache = subject.plan, subject.fused.cache
    program = export_step(
        merged, cache, block_size=BLOCK_SIZE, dtype=plan.dtype, limits=plan.step_limits, one_token=kind == "decode"
    )
    assert ops(program.graph) == ops(merged.graph)
    inputs = step_inputs(cache, DECODE if kind == "decode" else MIXED, kind)
    (got, mine), (expected, theirs) = run(program.module(), inputs), run(subject.copy(), inputs)
    assert_same(got, expected, "logits")
    for a, b in zip(mine, theirs, strict=True):
        assert_same(a, b, "a cache")


def test_decode_programs_attend_by_single_tokens(gpt_oss: Subject) -> None:
    for kind in ("step", "decode"):
        merged, _ = gpt_oss.merged(kind)
        attentions = [node for node in merged.graph.nodes if is_op(node, OXFUSE.sink_attention_cached.default)]
        assert [args_of(node)[-1] for node in attentions] == [kind == "decode"] * LAYERS


def first(graph: fx.Graph, *targets: Any) -> fx.Node:
    return next(node for node in graph.nodes if is_op(node, *targets))


def read_too(graph: fx.Graph, value: fx.Node) -> None:
    """Let the program's result depend on `value`, but not change by it."""
    output = graph.output_node()
    (result,) = output.all_input_nodes
    with graph.inserting_before(output):
        nothing = graph.call_function(A.mul.Tensor, (graph.call_function(A.sum.default, (value,)), 0))
        output.args = (graph.call_function(A.add.Tensor, (result, nothing)),)


def rotated_keys_are_read(graph: fx.Graph) -> None:
    rotation = first(graph, OXFUSE.rotary_embedding.default)
    read_too(graph, next(user for user in rotation.users if args_of(user)[1] == 1))


def a_cache_is_read(graph: fx.Graph) -> None:
    read_too(graph, args_of(first(graph, OXFUSE.sink_attention.default))[5])


def a_layer_does_not_turn(graph: fx.Graph) -> None:
    rotation = first(graph, OXFUSE.rotary_embedding.default)
    for user in list(rotation.users):
        user.replace_all_uses_with(args_of(rotation)[args_of(user)[1]])


def keys_turn_by_another_op(graph: fx.Graph) -> None:
    """The same rotation, but as two ops, one for queries and one for keys."""
    rotation = first(graph, OXFUSE.rotary_embedding.default)
    with graph.inserting_after(rotation):
        twin = graph.call_function(OXFUSE.rotary_embedding.default, args_of(rotation))
    for user in [user for user in rotation.users if args_of(user)[1] == 1]:
        user.args = (twin, 1)


def a_projection_is_read(graph: fx.Graph) -> None:
    read_too(graph, first(graph, A.linear.default))


def a_projection_has_another_input(graph: fx.Graph) -> None:
    projection = first(graph, A.linear.default)
    with graph.inserting_before(projection):
        copy = graph.call_function(A.clone.default, args_of(projection)[:1])
    copy.meta = dict(args_of(projection)[0].meta)
    projection.args = (copy, *args_of(projection)[1:])


def a_router_reads_something_else(graph: fx.Graph) -> None:
    moe = first(graph, OXFUSE.moe_dispatch.default)
    with graph.inserting_before(moe):
        copy = graph.call_function(A.clone.default, args_of(moe)[:1])
    copy.meta = dict(args_of(moe)[0].meta)
    moe.args = (copy, *args_of(moe)[1:])


def a_router_reads_the_sum(graph: fx.Graph) -> None:
    """Not the norm, but what was normed."""
    moe = first(graph, OXFUSE.moe_dispatch.default)
    node = args_of(moe)[0]
    while not is_op(node, operator.getitem):
        node = args_of(node)[0]
    both = args_of(node)[0]
    total = next(user for user in both.users if args_of(user)[1] == 1)
    node.replace_all_uses_with(total)


FULL = EXPECTED["gpt_oss", "decode"][0]
NEAR_MISSES: dict[Edit, dict[str, int]] = {
    rotated_keys_are_read: {"rotary_embedding_store": 1, "qkv_rotary": 1, "linear_rows": 6},
    a_cache_is_read: {"rotary_embedding_store": 1, "qkv_rotary": 1, "linear_rows": 6},
    a_layer_does_not_turn: {"rotary_embedding_store": 1, "qkv_rotary": 1, "linear_rows": 6},
    keys_turn_by_another_op: {"rotary_embedding_store": 1, "qkv_rotary": 1, "linear_rows": 6},
    a_projection_is_read: {"qkv_rotary": 1, "linear_rows": 6},
    a_projection_has_another_input: {"qkv_rotary": 1, "linear_rows": 6},
    a_router_reads_something_else: {"norm_router": 1},
    a_router_reads_the_sum: {"norm_router": 1},
}


@pytest.mark.parametrize("edit", NEAR_MISSES, ids=lambda edit: edit.__name__)
def test_a_near_miss_stays_as_it_is(edit: Edit, gpt_oss: Subject) -> None:
    assert_stays(edit, gpt_oss, {**FULL, **NEAR_MISSES[edit]})


def assert_stays(edit: Edit, subject: Subject, counts: dict[str, int]) -> None:
    """What is merged of the edited module computes what that computes."""
    module, plain = subject.copy(), subject.copy()
    for edited in (module, plain):
        edit(edited.graph)
        edited.recompile()
    assert merge_ops(module, subject.fused.cache, "decode") == counts
    inputs = step_inputs(subject.fused.cache, DECODE, "decode")
    (got, mine), (expected, theirs) = run(module, inputs), run(plain, inputs)
    assert_same(got, expected, "logits")
    for a, b in zip(mine, theirs, strict=True):
        assert_same(a, b, "a cache")


def a_joint_projection_is_read(graph: fx.Graph) -> None:
    read_too(graph, first(graph, A.linear.default))


def one_head_is_read(graph: fx.Graph) -> None:
    cut = first(graph, A.chunk.default)
    read_too(graph, next(user for user in cut.users if args_of(user)[1] == 2))


def values_come_before_keys(graph: fx.Graph) -> None:
    keys, values = (next(user for user in first(graph, A.chunk.default).users if args_of(user)[1] == i) for i in (1, 2))
    keys.args, values.args = values.args, keys.args


def an_activation_s_input_is_read(graph: fx.Graph) -> None:
    read_too(graph, args_of(first(graph, A.gelu.default))[0])


def something_is_between(graph: fx.Graph) -> None:
    gelu = first(graph, A.gelu.default)
    with graph.inserting_before(gelu):
        halved = graph.call_function(A.mul.Tensor, (args_of(gelu)[0], 0.5))
    gelu.args = (halved,)


FULL_JOINT = EXPECTED["gpt_neox", "decode"][0]
NEAR_MISSES_JOINT: dict[Edit, dict[str, int]] = {
    a_joint_projection_is_read: {"qkv_rotary": 1, "linear_rows": 8},
    one_head_is_read: {"qkv_rotary": 1, "linear_rows": 8},
    values_come_before_keys: {"qkv_rotary": 1, "linear_rows": 8},
    an_activation_s_input_is_read: {"activation": 1},
    something_is_between: {"activation": 1},
}


@pytest.mark.parametrize("edit", NEAR_MISSES_JOINT, ids=lambda edit: edit.__name__)
def test_a_near_miss_of_one_projection_stays_as_it_is(edit: Edit, gpt_neox: Subject) -> None:
    assert_stays(edit, gpt_neox, {**FULL_JOINT, **NEAR_MISSES_JOINT[edit]})


def test_the_tanh_form_of_gelu(gpt_neox: Subject) -> None:
    """It is another activation than the exact form, by up to 5e-4."""

    def tanh(graph: fx.Graph) -> None:
        first(graph, A.gelu.default).kwargs = {"approximate": "tanh"}

    assert_stays(tanh, gpt_neox, FULL_JOINT)


def test_normed_values_may_be_read_elsewhere(gpt_oss: Subject) -> None:
    """Norm and sum are results of the merged op as well."""
    module = gpt_oss.copy()
    both = args_of(first(module.graph, OXFUSE.moe_dispatch.default))[0]
    while not is_op(both, OXFUSE.add_rms_norm.default):
        both = args_of(both)[0]
    for value in list(both.users):
        read_too(module.graph, value)
    assert merge_ops(module, gpt_oss.fused.cache, "decode") == FULL
    inputs = step_inputs(gpt_oss.fused.cache, DECODE, "decode")
    assert_same(run(module, inputs)[0], run(gpt_oss.copy(), inputs)[0], "logits")


def test_merging_again_changes_nothing(gpt_oss: Subject, gpt_neox: Subject) -> None:
    for subject in (gpt_oss, gpt_neox):
        merged, _ = subject.merged("decode")
        before = [str(node.target) for node in merged.graph.nodes]
        assert not any(merge_ops(merged, subject.fused.cache, "decode").values())
        assert [str(node.target) for node in merged.graph.nodes] == before


def test_a_cache_of_another_module_is_an_error(gpt_oss: Subject) -> None:
    cache = PagedCache(windows=(0,), layers=gpt_oss.fused.cache.layers[:1])
    with pytest.raises(InternalError, match="attends 2 times, but its cache has 1 layers"):
        merge_ops(gpt_oss.copy(), cache, "step")
