"""A module that lives in memory, as what a compile begins with: its weights, its configuration, and its own word on the logits.

A checkpoint's class is told by a name, a module's forward may be anybody's. So the module itself is run over the golden tokens,
and where it does not compute what the reference computes with its weights, there will be no artifact.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from oxfuse.compiler.plan import Plan
from oxfuse.errors import UserError
from oxfuse.models.checkpoint import Checkpoint
from oxfuse.runtime.verify import COARSE_TOLERANCE, RowsError, rows_error

FLOAT32_TOLERANCE = 1e-3
"""Largest difference of a float32 module from the reference, relative to the largest value or 1: ten times what two right
implementations were seen to differ by, a fifth of what YaRN left out moves the flattest logits."""
POOLED_ROWS = 4
"""Golden rows at which a model that answers for whole sequences is asked: each is a run of its own."""


def open_module(module: nn.Module) -> tuple[Checkpoint, dict[str, str]]:
    """Return the checkpoint that the module is, and its fingerprint; weights are the module's own where it is on the CPU.

    Raises UserError for a module without configuration, or without values.
    """
    kind = type(module)
    told = _told(module, "config")
    if not isinstance(told.get("model_type"), str):
        raise UserError(
            f"{kind.__name__} has no config with a model_type: give a model of oxfuse or of transformers, or a checkpoint's "
            "folder."
        )
    state = module.state_dict()
    if absent := [name for name, tensor in state.items() if tensor.is_meta]:
        raise UserError(
            f"{kind.__name__} holds no values for {len(absent)} of its {len(state)} tensors, such as {absent[0]}, which are on "
            "the meta device: load its weights first."
        )
    names = [base.__name__ for base in kind.__mro__ if issubclass(base, nn.Module) and base is not nn.Module]
    checkpoint = Checkpoint.of_tensors(
        {**told, "architectures": names},
        {name: tensor.detach().cpu() for name, tensor in state.items()},
        generation_config={name: value for name, value in _told(module, "generation_config").items() if value is not None},
    )
    shapes = json.dumps([[name, str(tensor.dtype), [*tensor.shape]] for name, tensor in state.items()])
    sums = {"config_sha256": _sha256(json.dumps(told, default=str, sort_keys=True)), "headers_sha256": _sha256(shapes)}
    return checkpoint, {"kind": "module", "name": kind.__name__, **sums}


def check_module(module: nn.Module, plan: Plan, golden: Mapping[str, Tensor]) -> RowsError:
    """Compare what the module itself makes of the golden tokens with the reference's values; return the difference.

    Raises UserError where it is more than the module's dtype explains, and whatever the module raises.
    """
    rows, pad = golden["rows"], plan.config.pad_token_id
    if plan.pooled:
        ends = [int(row) for row in rows if int(golden["token_ids"][row]) != pad][-POOLED_ROWS:]
        found = torch.cat([_values(module, plan.task, golden["token_ids"][: end + 1]) for end in ends])
        expected = golden["logits"][[rows.tolist().index(end) for end in ends]]
    else:
        found, expected = _values(module, plan.task, golden["token_ids"])[rows], golden["logits"]
    if found.shape != expected.shape:
        raise UserError(
            f"{type(module).__name__} gives values of shape {[*found.shape]}, the reference of {plan.contract.model_type} for "
            f"{plan.task} gives {[*expected.shape]}: it computes something else. Name its task, or compile its checkpoint."
        )
    error = rows_error(found, expected)
    wide = plan.checkpoint.dtype in (torch.float32, torch.float64)
    right = (
        error.max_error <= FLOAT32_TOLERANCE * max(1.0, error.reference_max)
        if wide
        else error.rms_error <= COARSE_TOLERANCE * error.reference_rms
    )
    if not right:
        raise UserError(
            f"{type(module).__name__} itself differs from the reference of {plan.contract.model_type} with its weights by "
            f"{error.max_error:.2g} at most (values up to {error.reference_max:.2g}): its forward is not what oxfuse compiles. "
            "Undo what was changed in it, or compile its checkpoint."
        )
    return error


@torch.no_grad()
def _values(module: nn.Module, task: str, token_ids: Tensor) -> Tensor:
    """Return the module's values for one sequence, float32 on the CPU: a row a token, one row for a model that pools."""
    training, device = [part for part in module.modules() if part.training], next(module.parameters()).device
    module.eval()
    try:
        out: Any = module(input_ids=token_ids[None].to(device))
    finally:
        for part in training:  # some parts may have been frozen by their owner
            part.training = True
    if task == "question-answering":
        values = torch.stack([out.start_logits, out.end_logits], -1)
    elif task == "feature-extraction":
        values = out.last_hidden_state
    else:
        values = out.logits
    return values.float().cpu() if task == "text-classification" else values[0].float().cpu()


def _told(module: nn.Module, name: str) -> dict[str, Any]:
    """Return a configuration of the module's as a dict, an empty one where it has none."""
    to_dict = getattr(getattr(module, name, None), "to_dict", None)
    return dict(to_dict()) if callable(to_dict) else {}


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
