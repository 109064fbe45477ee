"""What the rest of oxfuse knows about a model, and the registry of models.

A model is a folder under `models/` whose package exposes `CONTRACT`; others register theirs by `register`. The compiler asks the
registry for a `model_type` and gets the functions that read its configuration, build its reference and find its weights.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

import oxfuse.models
from oxfuse.errors import UserError, shown

if TYPE_CHECKING:
    from oxfuse.models.checkpoint import Checkpoint, TensorSource
    from oxfuse.models.reference import Reference

SOURCE_FILES = (
    "model*.safetensors", "model.safetensors.index.json", "config.json", "generation_config.json", "tokenizer*",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template*",
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
    tensor_sources: (checkpoint, configuration, reference on the meta device, attributes of a head that may be absent) -> the
    source of each parameter of the reference, by the parameter's name; one UserError that lists every missing, unexpected or
    misshapen tensor.
    architectures: an entry of `config.json`'s `architectures` -> task name, besides the names of the reference classes.
    flavours: the name of a released model -> its `config.json`, for shapes without weights.
    fusions: names of the compiler's fusions that the graph of every such model must contain.
    recognises: tells a `config.json` without `model_type`.
    refused_dtypes: dtype -> why the model cannot run in it.
    genai_type: what onnxruntime-genai calls such models.
    source_files: glob patterns of what a download needs.
    build_tokenizer: the checkpoint's tokenizer files -> the text of the tokenizer.json that they amount to, for models whose
    tokenizer is spread over several files; None where a tokenizer.json among them counts as it stands, or there is none.
    """

    model_type: str
    parse_config: Callable[[dict[str, Any]], Any]
    tasks: Mapping[str, type[Reference]]
    tensor_sources: Callable[[Checkpoint, Any, nn.Module, Collection[str]], dict[str, TensorSource]]
    architectures: Mapping[str, str] = field(default_factory=dict)
    flavours: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    fusions: tuple[str, ...] = ()
    default_task: str = "text-generation"
    genai_type: str = "decoder"
    recognises: Callable[[Mapping[str, Any]], bool] = lambda config: False
    refused_dtypes: Mapping[torch.dtype, str] = field(default_factory=dict)
    source_files: tuple[str, ...] = SOURCE_FILES
    build_tokenizer: Callable[[Sequence[Path]], str | None] = lambda files: None

    def task_of(self, config: Mapping[str, Any]) -> str:
        """Return the task that `config.json`'s `architectures` names, or the default. Raises UserError if it names another."""
        names = config.get("architectures") or []
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise UserError(f"config.json: architectures is {shown(names)}; it must be a list of names. Correct config.json.")
        known = {**{model.__name__: task for task, model in self.tasks.items()}, **self.architectures}
        for name in names:
            if name in known:
                return known[name]
        if names:
            raise UserError(
                f"config.json names the architecture {', '.join(names):.200}; oxfuse has {', '.join(known)} "
                f"for {self.model_type}. Name the task you want, or use another checkpoint."
            )
        return self.default_task

    def sources(self, checkpoint: Checkpoint, config: Any, task: str, new_head: Collection[str] = ()) -> dict[str, TensorSource]:
        """Return the source of each parameter of the task's reference. Raises UserError if the task is none of the model's, or
        the checkpoint does not fit.
        """
        if task not in self.tasks:
            raise UserError(f"{self.model_type} has no task {shown(task)}; it has {', '.join(self.tasks)}. Choose one of these.")
        with torch.device("meta"):
            model = self.tasks[task](config)
        return self.tensor_sources(checkpoint, config, model, new_head)


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


def flavour(name: str) -> dict[str, Any]:
    """Return the `config.json` of a released model, such as "pythia-410m". Raises UserError, naming the known ones."""
    known = {name: (kind, values) for kind, contract in contracts().items() for name, values in contract.flavours.items()}
    if name not in known:
        raise UserError(f"There is no model called {shown(name)} here; oxfuse has the shapes of {', '.join(known)}.")
    kind, values = known[name]
    return {"model_type": kind, **values}


def lookup(model_type: str) -> ModelContract:
    """Return the model of this type. Raises UserError, naming the known ones, if there is none."""
    known = contracts()
    if model_type not in known:
        raise UserError(
            f"The checkpoint's model_type is {shown(model_type)}; oxfuse knows {', '.join(sorted(known))}. "
            "Use such a checkpoint, or add the model with oxfuse.models.register."
        )
    return known[model_type]
