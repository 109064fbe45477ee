"""Finds the parameters of a reference among a checkpoint's tensors and lists, in one error, all that does not fit.

A model's `checkpoint.py` derives from `TensorFinder` what its layouts need. No values are read, but to compare two tied tensors.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from oxfuse.errors import UserError
from oxfuse.models.checkpoint import Checkpoint, TensorSource
from oxfuse.models.configuration import Configuration

_MOST_NAMED = 8


@dataclass(kw_only=True)
class TensorFinder:
    """Looks tensors up by the reference's names and remembers what did not fit. Its lists hold the checkpoint's own names.

    body: the prefix of the body's parameters in a model with a head, such as "model."; a checkpoint of a bare model leaves it
    away. embedding and head: the reference's names of the two tensors that may be tied. heads: what the names of the heads of
    all the family's tasks begin with on disk: those that the task does not have are passed over.
    """

    checkpoint: Checkpoint
    config: Configuration
    body: str
    embedding: str
    head: str
    heads: Collection[str]
    used: set[str] = field(default_factory=set)
    missing: dict[str, None] = field(default_factory=dict)
    unfit: dict[str, None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        layers, count = self.config.num_hidden_layers, len(self.checkpoint.tensors)
        if layers > count:
            raise UserError(
                f"{self.where}: config.json says num_hidden_layers is {layers}, but there are only {count} tensors. "
                "Correct config.json, or get the files again."
            )
        self.tensors: Mapping[str, TensorSource] = self.checkpoint.tensors
        self.without_prefix = not any(name.startswith(self.body) for name in self.tensors)

    @property
    def where(self) -> Any:
        """Return what the messages begin with."""
        return self.checkpoint.folder or "The module"

    def stored_name(self, name: str) -> str:
        """Return what the checkpoint's layout calls the parameter."""
        return name.removeprefix(self.body) if self.without_prefix else name

    def find_all(self, model: torch.nn.Module, bare: bool, new_head: Collection[str] = ()) -> dict[str, TensorSource]:
        """Return the source of every parameter of `model`, a reference of this family, bare or with a head.

        Parameters of the attributes `new_head` may be absent, and are then absent from the result. Raises UserError that lists
        every missing, unexpected or misshapen tensor.
        """
        sources = {}
        own = tuple(f"{name}." for name in new_head)
        for name, parameter in model.named_parameters():
            whole = f"{self.body}{name}" if bare else name
            if name.startswith(own) and self.stored_name(whole) not in self.tensors:
                continue
            source = self.find(whole, tuple(parameter.shape))
            if source is not None:
                sources[name] = source
        self._pass_over_heads(bare)
        self._insist(tuple(getattr(model, "heads", ())))
        return sources

    def find(self, name: str, shape: tuple[int, ...]) -> TensorSource | None:
        """Return the source of a parameter, or None after noting why there is none."""
        return self.dense(self.untied(name), shape)

    def untied(self, name: str) -> str:
        """Return the stored name of a parameter: for tied embeddings the one that is on disk, whichever the writer met first."""
        stored = self.stored_name(name)
        if name == self.embedding and self.config.tie_word_embeddings and stored not in self.tensors:
            head = self.stored_name(self.head)
            return head if head in self.tensors else stored
        return stored

    def dense(self, stored: str, shape: tuple[int, ...], bytes_wanted: bool = False) -> TensorSource | None:
        """Return the tensor of this stored name if it has the shape, and holds floating-point numbers or, if asked, bytes."""
        source = self.tensors.get(stored)
        if source is None:
            self.missing[stored] = None
            return None
        self.used.add(stored)
        kind = "uint8" if bytes_wanted else "floating-point"
        right_kind = source.dtype == torch.uint8 if bytes_wanted else source.dtype.is_floating_point
        if source.shape != shape or not right_kind:
            found = f"{str(source.dtype).removeprefix('torch.')} {list(source.shape)}"
            self.unfit[f"{stored} is {found}, expected {kind} {list(shape)}"] = None
            return None
        return source

    def _pass_over_heads(self, bare: bool) -> None:
        """Accept heads that the reference does not have; a tied one must be the embeddings."""
        head, embedding = (self.tensors.get(self.stored_name(name)) for name in (self.head, self.embedding))
        if head is not None and head.name not in self.used and self.config.tie_word_embeddings and not bare:
            self.used.add(head.name)
            if embedding is not None and not _same_values(head, embedding):
                self.unfit[f"{head.name} differs from {embedding.name}, though tie_word_embeddings is true"] = None
        mine = {name.partition(".")[0] for name in self.used}
        others = set(self.heads) - mine
        self.used |= {name for name in self.tensors if name.partition(".")[0] in others}

    def _insist(self, heads: tuple[str, ...]) -> None:
        """Raise UserError if anything did not fit. A long list is cut: it means that config.json is another model's."""
        unexpected = sorted(self.tensors.keys() - self.used)
        remedy = "Correct config.json, or get the files again."
        if self.missing and all(name.partition(".")[0] in heads for name in self.missing):
            remedy = (
                "That is this task's head: choose the task that the checkpoint was made for, or train one (the reference class's "
                "from_pretrained makes it), or get the files again."
            )
        parts = [
            f"{title}: {mark.join(f'{name:.200}' for name in names[:_MOST_NAMED])}"
            + (f" and {len(names) - _MOST_NAMED} more." if len(names) > _MOST_NAMED else ".")
            for title, names, mark in (
                ("Missing", list(self.missing), ", "),
                ("Unexpected", unexpected, ", "),
                ("Misfits", list(self.unfit), "; "),
            )
            if names
        ]
        if parts:
            raise UserError(f"{self.where}: the tensors do not fit config.json. {' '.join(parts)} {remedy}")


def _same_values(a: TensorSource, b: TensorSource, rows: int = 4096) -> bool:
    if a.shape != b.shape:
        return False
    slices = (slice(start, start + rows) for start in range(0, a.shape[0], rows))
    return all(torch.equal(a.read(part), b.read(part)) for part in slices)
