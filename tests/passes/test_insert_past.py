"""Modules over padded batches, run eagerly, compute what the reference does of every row alone."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from oxfuse.compiler.export import export_reference
from oxfuse.compiler.fuse import Fused, fuse
from oxfuse.errors import InternalError
from oxfuse.models import load_reference
from oxfuse.models.virtual import virtual_model
from oxfuse.passes.insert_past import insert_past

from ..checkpoints import random_gpt_oss
from ..neox import random_gpt_neox
from ..parity.fused import bind, plan_of, weight_values

LENGTHS, NEW = (43, 17, 30), 4


def fused_batch(folder: Path, task: str | None = None, *, cached: bool = True, pooled: bool = False) -> Fused:
    plan = plan_of(folder, dtype="float32", task=task)
    insert = partial(insert_past, cached=cached, pooled=pooled)
    model = virtual_model(plan.contract, plan.config, plan.task, plan.dtype)
    fused = fuse(model, {}, requested=plan.contract.fusions, export=partial(export_reference, batched=True), insert=insert)
    bind(fused.step, weight_values(plan, fused))
    return fused


def close(got: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    assert got.shape == expected.shape, what
    assert (got - expected).abs().max() <= 2e-5 * max(1.0, float(expected.abs().max())), what


@pytest.mark.parametrize("family", ["gpt_oss", "gpt_neox"])
@torch.no_grad()
def test_prompts_and_decodes_of_several_lengths(family: str, tmp_path: Path) -> None:
    folder = random_gpt_oss(tmp_path, layout="mxfp4", intermediate_size=64) if family == "gpt_oss" else random_gpt_neox(tmp_path)
    fused, reference = fused_batch(folder), load_reference(folder, torch.float32)
    ids = torch.randint(0, 200, (len(LENGTHS), max(LENGTHS) + NEW), generator=torch.Generator().manual_seed(0))
    longest = max(LENGTHS)
    mask = (torch.arange(longest) < torch.tensor(LENGTHS)[:, None]).long()
    rows = [torch.cat([ids[n, :length], ids[n, longest:]]) for n, length in enumerate(LENGTHS)]
    expected = [reference(input_ids=row[None], use_cache=False).logits[0] for row in rows]
    past = [torch.zeros(len(LENGTHS), layer.kv_heads, 0, layer.head_dim) for layer in fused.cache.layers for _ in "kv"]
    logits, *past = fused.step(ids[:, :longest], mask, torch.tensor([0]), *past)
    for n, length in enumerate(LENGTHS):
        close(logits[n, :length], expected[n][:length], f"prompt {n}")
    for step in range(NEW):
        mask = torch.cat([mask, torch.ones(len(LENGTHS), 1, dtype=torch.long)], 1)
        logits, *past = fused.step(ids[:, longest + step, None], mask, torch.tensor([-1]), *past)
        assert past[0].shape[2] == mask.shape[1]
        for n, length in enumerate(LENGTHS):
            close(logits[n], expected[n][length + step, None], f"row {n}, token {step}")


@torch.no_grad()
def test_a_chunk_on_top_of_a_past(tmp_path: Path) -> None:
    folder = random_gpt_oss(tmp_path)
    fused, reference = fused_batch(folder), load_reference(folder, torch.float32)
    ids = torch.randint(0, 200, (2, 70), generator=torch.Generator().manual_seed(0))
    past = [torch.zeros(2, layer.kv_heads, 0, layer.head_dim) for layer in fused.cache.layers for _ in "kv"]
    _, *past = fused.step(ids[:, :30], torch.ones(2, 30, dtype=torch.long), torch.tensor([0]), *past)
    logits, *past = fused.step(ids[:, 30:], torch.ones(2, 70, dtype=torch.long), torch.tensor([0]), *past)
    close(logits, reference(input_ids=ids, use_cache=False).logits[:, 30:], "chunk")


@torch.no_grad()
def test_a_pooled_head_answers_for_each_row_s_last_token(tmp_path: Path) -> None:
    folder = random_gpt_neox(tmp_path, task="text-classification", pad_token_id=0)
    fused = fused_batch(folder, "text-classification", cached=False, pooled=True)
    reference = load_reference(folder, torch.float32)
    ids = torch.randint(1, 200, (2, 20), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 12:] = 0
    (values,) = fused.step(ids, mask)
    for n, length in enumerate((20, 12)):
        close(values[n, 0], reference(input_ids=ids[n, None, :length]).logits[0], f"row {n}")


def test_a_module_of_another_form_is_refused() -> None:
    class Other(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return input_ids + 1

    module = torch.export.export(Other(), (torch.zeros(1, 3),)).module(check_guards=False)
    with pytest.raises(InternalError, match="lacks the inputs"):
        insert_past(module, {"token_ids": "ids", "positions": "input_ids", "rows": "input_ids"}, cached=True, pooled=False)
