"""`load_reference`: a checkpoint's plain-PyTorch model with its weights."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from oxfuse.errors import UserError
from oxfuse.models.checkpoint import Checkpoint
from oxfuse.models.virtual import fill, meta_model


def load_reference(source: Path | str, dtype: torch.dtype = torch.float32, task: str | None = None) -> nn.Module:
    """Return the reference model of a checkpoint folder, on the CPU, in eval mode, ready to be trained.

    `task` defaults to the one that the checkpoint's `architectures` name, else the causal language model. Weights that are stored
    in `dtype` stay mapped; MXFP4 becomes dense. Raises UserError if the checkpoint is not whole or does not fit its config.json.
    """
    checkpoint = Checkpoint.open(source)
    contract = checkpoint.contract()
    config = contract.parse_config(dict(checkpoint.config))
    task = task or contract.task_of(checkpoint.config)
    if task not in contract.tasks:
        raise UserError(f"{contract.model_type} has no task {task!r}; it has {', '.join(contract.tasks)}. Choose one of these.")
    sources = contract.tensor_sources(checkpoint, config, task)
    model = meta_model(contract, config, task, dtype)
    return fill(model, lambda name: sources[name].read().to(dtype).contiguous())
