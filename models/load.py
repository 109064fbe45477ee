"""`load_reference`: a checkpoint's plain-PyTorch model with its weights."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import torch

from oxfuse.errors import UserError
from oxfuse.models.checkpoint import Checkpoint
from oxfuse.models.contract import contracts
from oxfuse.models.reference import Reference
from oxfuse.models.virtual import fill, meta_model

R = TypeVar("R", bound=Reference)


def load_reference(
    source: Path | str, dtype: torch.dtype = torch.float32, task: str | None = None, *, new_head: bool = False, **values: Any
) -> Reference:
    """Return the reference model of a checkpoint folder, on the CPU, in eval mode, ready to be trained.

    `task` defaults to the one that the checkpoint's `architectures` name, else the causal language model. Weights that are stored
    in `dtype` stay mapped; MXFP4 becomes dense. `values` replace keys of config.json. With `new_head`, a head that the checkpoint
    lacks is initialised, with a warning. Raises UserError if the checkpoint is not whole or does not fit its config.json.
    """
    checkpoint = Checkpoint.open(source)
    contract = checkpoint.contract()
    config = contract.parse_config({**checkpoint.config, **values})
    task = task or contract.task_of(checkpoint.config)
    if task not in contract.tasks:
        raise UserError(f"{contract.model_type} has no task {task!r}; it has {', '.join(contract.tasks)}. Choose one of these.")
    own = contract.tasks[task].heads
    sources = contract.sources(checkpoint, config, task, own if new_head else ())
    model = meta_model(contract, config, task, dtype)
    made: list[str] = []

    def value(name: str) -> torch.Tensor:
        if name in sources:
            return sources[name].read().to(dtype).contiguous()
        made.append(name)
        return torch.zeros(dict(model.named_parameters())[name].shape, dtype=dtype)

    fill(model, value)
    if made:
        cast(Any, model).initialise_head()
        warnings.warn(
            f"{source} has no {', '.join(made)}: initialised at random. Train the model before it is used, or compiled.",
            stacklevel=3,
        )
    return model


def load_class(model: type[R], source: Path | str, dtype: torch.dtype, values: Mapping[str, Any]) -> R:
    """Return the model of this reference class: `Reference.from_pretrained`."""
    for contract in contracts().values():
        for task, known in contract.tasks.items():
            if known is model:
                return _load_task(contract.model_type, model, source, dtype, task, values)
    raise UserError(f"{model.__name__} is no model that is registered. Register it with oxfuse.models.register.")


def _load_task(
    model_type: str, model: type[R], source: Path | str, dtype: torch.dtype, task: str, values: Mapping[str, Any]
) -> R:
    found = load_reference(source, dtype, task, new_head=True, **values)
    if not isinstance(found, model):
        raise UserError(f"{source} holds a {found.config.model_type} model, not {model_type}. Use that model's own class.")
    return found
