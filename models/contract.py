"""What the rest of oxfuse knows about a model, and the registry of models.

A model is a folder under `models/` whose package exposes `CONTRACT`; others register theirs by `register`. The compiler asks the
registry for a `model_type` and gets the functions that read its configuration, build its reference and find its weights.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

import oxfuse.models
from oxfuse.errors import UserError, shown

if TYPE_CHECKING:
    from oxfuse.models.checkpoint import Checkpoint, TensorSource

SOURCE_FILES = (
    "model*.safetensors", "model.safetensors.index.json", "config.json", "generation_config.json", "tokenizer*",
    "special_tokens_map.json", "added_tokens.json", "chat_template*",
)  # fmt: skip
"""Patterns match whole paths, so subfolders with further copies of the weights (original/, metal/) stay out."""


class Experts(nn.Module):
    """Base of a bank of experts whose parameters all have the experts as dim 0.

    `forward(x [T, H], router_indices [T, k], routing_weights [T, k], first=0)` returns [T, H]: what the experts
    first..first + n contribute, n being the size of dim 0. So the outputs of slices add up, and a model larger than memory
    runs expert by expert.
    """

    by_expert: ClassVar[bool] = True


class ComputedBuffers(nn.Module):
    """Base of a module whose buffers follow from the configuration alone and are never stored in a checkpoint.

    They are computed anew, in their own dtype, whenever the module is moved, cast or emptied.
    """

    def compute_buffers(self, device: torch.device) -> None:
        """Set the buffers on `device`."""
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.compute_buffers(next(self.buffers()).device)
        return self


@dataclass(frozen=True, kw_only=True)
class ModelContract:
    """One kind of model.

    parse_config: `config.json` -> the configuration; UserError on impossible values.
    tasks: task name -> reference class, built from the configuration.
    architectures: an entry of `config.json`'s `architectures` -> task name.
    tensor_sources: (checkpoint, configuration, task) -> the source of each parameter of the reference, by the parameter's name;
    one UserError that lists every missing, unexpected or misshapen tensor.
    fusions: names of the compiler's fusions that the graph of every such model must contain.
    recognises: tells a `config.json` without `model_type`.
    refused_dtypes: dtype -> why the model cannot run in it.
    source_files: glob patterns of what a download needs.
    """

    model_type: str
    parse_config: Callable[[dict[str, Any]], Any]
    tasks: Mapping[str, Callable[[Any], nn.Module]]
    architectures: Mapping[str, str]
    tensor_sources: Callable[[Checkpoint, Any, str], dict[str, TensorSource]]
    fusions: tuple[str, ...] = ()
    default_task: str = "text-generation"
    recognises: Callable[[Mapping[str, Any]], bool] = lambda config: False
    refused_dtypes: Mapping[torch.dtype, str] = field(default_factory=dict)
    source_files: tuple[str, ...] = SOURCE_FILES

    def task_of(self, config: Mapping[str, Any]) -> str:
        """Return the task that `config.json`'s `architectures` names, or the default. Raises UserError if it names another."""
        names = config.get("architectures") or []
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise UserError(f"config.json: architectures is {shown(names)}; it must be a list of names. Correct config.json.")
        for name in names:
            if name in self.architectures:
                return self.architectures[name]
        if names:
            raise UserError(
                f"config.json names the architecture {', '.join(names):.200}; oxfuse has {', '.join(self.architectures)} "
                f"for {self.model_type}. Name the task you want, or use another checkpoint."
            )
        return self.default_task


_registered: dict[str, ModelContract] = {}


def register(model_type: str, contract: ModelContract) -> None:
    """Make `contract` the model of checkpoints whose `model_type` is this; a later one replaces an earlier one."""
    _registered[model_type] = contract


def contracts() -> dict[str, ModelContract]:
    """Return all known models by type: those that were registered, and the folders of `oxfuse.models`."""
    shipped = {}
    for info in pkgutil.iter_modules(oxfuse.models.__path__):
        if info.ispkg:
            contract: ModelContract = importlib.import_module(f"{oxfuse.models.__name__}.{info.name}").CONTRACT
            shipped[contract.model_type] = contract
    return {**shipped, **_registered}


def lookup(model_type: str) -> ModelContract:
    """Return the model of this type. Raises UserError, naming the known ones, if there is none."""
    known = contracts()
    if model_type not in known:
        raise UserError(
            f"The checkpoint's model_type is {shown(model_type)}; oxfuse knows {', '.join(sorted(known))}. "
            "Use such a checkpoint, or add the model with oxfuse.models.register."
        )
    return known[model_type]
