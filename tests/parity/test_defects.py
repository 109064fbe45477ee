"""The parity suite bites: each defect that real implementations have had must make it fail."""

from __future__ import annotations

import json
import operator
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx

from oxfuse.passes.fusions.moe_dispatch import reference as moe
from oxfuse.runtime import CompiledModel

from .cases import CASES, NEOX_CASES, Case, assert_logits, assert_parity
from .fused import fused_model

BY_NAME = {case.name: case for case in [*CASES, *NEOX_CASES]}


def calls(step: fx.GraphModule, op: str) -> list[fx.Node]:
    return [n for n in step.graph.nodes if n.op == "call_function" and str(n.target) == f"oxfuse.{op}.default"]


def set_args(op: str, **changes: tuple[int, Callable[[object], object]]) -> Callable[[fx.GraphModule, dict[str, Tensor]], None]:
    def change(step: fx.GraphModule, values: dict[str, Tensor]) -> None:
        assert calls(step, op)
        for node in calls(step, op):
            for index, new in changes.values():
                node.update_arg(index, new(node.args[index]))

    return change


def halves_instead_of_interleaved(step: fx.GraphModule, values: dict[str, Tensor]) -> None:
    for name, value in values.items():
        if "gate_up_proj" in name:  # rows of weights, entries of biases: as if the first half were the gate
            values[name] = value.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2).contiguous()


def bias_after_weighting(step: fx.GraphModule, values: dict[str, Tensor]) -> None:
    def wrong(x, router_weight, router_bias, w1, s1, b1, w2, s2, b2, top_k, alpha, limit):
        indices, weights = moe.route(x, router_weight, router_bias, top_k)
        out = moe.combine(moe.experts(x, w1, s1, b1, w2, s2, torch.zeros_like(b2), alpha, limit), indices, weights)
        return out + b2[indices].sum(1)

    for node in calls(step, "moe_dispatch"):
        node.target = wrong


def swap_nibbles(step: fx.GraphModule, values: dict[str, Tensor]) -> None:
    for name, value in values.items():
        if name.endswith("_blocks"):
            values[name] = (value << 4) | (value >> 4)


def tie_head(step: fx.GraphModule, values: dict[str, Tensor]) -> None:
    values["lm_head.weight"] = values["model.embed_tokens.weight"]


def ignore_positions(step: fx.GraphModule, values: dict[str, Tensor]) -> None:
    """Rotate by the index in the step, not by the positions that were given."""
    for node in calls(step, "rotary_embedding"):
        with step.graph.inserting_before(node):
            wrong = step.graph.call_function(lambda p: torch.arange(p.shape[-1]).expand_as(p), (node.args[2],))
        node.update_arg(2, wrong)


def split_globally(step: fx.GraphModule, values: dict[str, Tensor]) -> None:
    """Read the fused projection as all of q, then all of k, then all of v."""
    for name, value in values.items():
        if "query_key_value" in name:
            values[name] = value.unflatten(0, (3, 4, -1)).transpose(0, 1).flatten(0, 2).contiguous()


def without_final_norm(step: fx.GraphModule, values: dict[str, Tensor]) -> None:
    last = [n for n in step.graph.nodes if str(n.target) == "aten.layer_norm.default"][-1]
    last.replace_all_uses_with(last.args[0])


def one_table_entry_off(run):
    def step(inputs: list[Tensor]) -> Tensor:
        tables = inputs[5].clone()
        if tables.shape[2] > 1:
            tables[:, :, 0] = tables[:, :, 1]
        return run([*inputs[:5], tables, *inputs[6:]])

    return step


def rope(**entries: object) -> Callable[[dict], None]:
    return lambda config: config["rope_parameters"].update(entries)


GRAPH = {
    "window + 1": ("base", set_args("sink_attention", window=(10, lambda w: w and w + 1))),
    "window - 1": ("base", set_args("sink_attention", window=(10, lambda w: w and w - 1))),
    "sink dropped": ("base", set_args("sink_attention", sink=(3, lambda sink: None))),
    "gate and up as halves": ("base", halves_instead_of_interleaved),
    "alpha 1": ("base", set_args("moe_dispatch", alpha=(10, lambda alpha: 1.0))),
    "bias after weighting": ("base", bias_after_weighting),
    "nibbles swapped": ("mxfp4", swap_nibbles),
    "tied head": ("base", tie_head),
    "positions ignored": ("base", ignore_positions),
    "q, k and v split globally": ("neox", split_globally),
    "no final norm": ("neox", without_final_norm),
    "cos and sin not scaled": ("base", set_args("rotary_embedding", scale=(4, lambda scale: 1.0))),
}
CONFIG = {
    "YaRN skipped": ("base", rope(rope_type="default")),
    "truncate flipped": ("base", rope(truncate=True)),
    "truncate flipped back": ("truncate", lambda config: config["rope_scaling"].update(truncate=False)),
    "whole heads turned": ("neox", lambda config: config.update(rotary_pct=1.0)),
    "tanh for erf gelu": ("neox", lambda config: config.update(hidden_act="gelu_fast")),
    "erf for tanh gelu": ("gelu_fast", lambda config: config.update(hidden_act="gelu")),
    "sequential for parallel": ("neox", lambda config: config.update(use_parallel_residual=False)),
    "parallel for sequential": ("sequential", lambda config: config.update(use_parallel_residual=True)),
    "betas swapped": ("base", rope(beta_fast=1.0, beta_slow=32.0)),
}


def assert_bites(model: CompiledModel, case: Case, folder: Path, scratch: Path) -> None:
    with pytest.raises(AssertionError, match=r"error|differs"):
        assert_parity(model, case.transformers(folder, scratch), case, folder)


@pytest.mark.parametrize("name", GRAPH)
def test_a_defect_of_the_graph_fails_the_suite(name, tmp_path):
    case_name, change = GRAPH[name]
    case = BY_NAME[case_name]
    folder = case.write(tmp_path / "checkpoint")
    assert_bites(fused_model(folder, change=change), case, folder, tmp_path)


@pytest.mark.parametrize("name", CONFIG)
def test_a_misread_configuration_fails_the_suite(name, tmp_path):
    case_name, change = CONFIG[name]
    case = BY_NAME[case_name]
    right, wrong = case.write(tmp_path / "right"), case.write(tmp_path / "wrong")
    config = json.loads((wrong / "config.json").read_text())
    change(config)
    (wrong / "config.json").write_text(json.dumps(config))
    assert_bites(fused_model(wrong), case, right, tmp_path)


def test_a_wrong_block_table_fails_the_suite(tmp_path):
    case = BY_NAME["base"]
    folder = case.write(tmp_path / "checkpoint")
    assert_bites(fused_model(folder, wrap=one_table_entry_off), case, folder, tmp_path)


def test_no_defect_passes(tmp_path):
    """The same road without a change passes, so the failures above are the defects'."""
    case = BY_NAME["base"]
    folder = case.write(tmp_path / "checkpoint")
    unchanged = set_args("sink_attention", window=(10, operator.pos))
    assert_logits(fused_model(folder, change=unchanged), case.transformers(folder, tmp_path), case)
