"""The step program's dims: whatever the limits are, it exports."""

from __future__ import annotations

from pathlib import Path

import pytest

from oxfuse.compiler.export import export_step
from oxfuse.compiler.fuse import fuse
from oxfuse.models.virtual import virtual_model

from ..neox import random_gpt_neox
from ..parity.fused import plan_of


@pytest.mark.parametrize(("context", "batch"), [(1, 1), (40, 2), (512, 8)])
def test_small_limits(context: int, batch: int, tmp_path: Path) -> None:
    plan = plan_of(random_gpt_neox(tmp_path, num_hidden_layers=1), max_context=context, max_batch=batch)
    model = virtual_model(plan.contract, plan.config, plan.task, plan.dtype)
    fused = fuse(model, {}, requested=plan.contract.fusions)
    program = export_step(fused.step, fused.cache, block_size=plan.block_size, dtype=plan.dtype, limits=plan.step_limits)
    assert program.graph_signature.user_inputs
