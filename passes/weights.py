"""The table of weights that travels beside a graph: names, shapes, dtypes and recipes, never values.

A graph refers to a weight by the name of its `get_attr` node. The table says which tensor of the checkpoint that is and what
has to be done to it. A pass that wants another layout replaces entries; the artifact's writer later streams every tensor
through its recipe, one at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor

Encoding = Literal["dense", "mxfp4"]
Part = Literal["blocks", "scales"]
MXFP4_BLOCK = 32
"""Values that share one e8m0 scale (OCP Microscaling Formats 1.0)."""


class Transform(Protocol):
    """One step from a checkpoint's tensor to the tensor that a program wants."""

    @property
    def label(self) -> str:
        """Name the step for the manifest."""

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape that a tensor of `shape` gets."""

    def apply(self, tensor: Tensor) -> Tensor:
        """Return the transformed tensor; a view where possible."""


@dataclass(frozen=True)
class Cast:
    """Convert to another dtype."""

    dtype: torch.dtype

    @property
    def label(self) -> str:
        """Name the step."""
        return f"cast {str(self.dtype).removeprefix('torch.')}"

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return `shape`."""
        return shape

    def apply(self, tensor: Tensor) -> Tensor:
        """Return the tensor in the other dtype."""
        return tensor.to(self.dtype)


@dataclass(frozen=True)
class SwapRowsAndColumns:
    """Swap the last two dims: [E, in, out] of a bfloat16 checkpoint becomes [E, out, in], one contiguous row per output."""

    label: str = "swap rows and columns"

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return `shape` with its last two sizes swapped."""
        return (*shape[:-2], shape[-1], shape[-2])

    def apply(self, tensor: Tensor) -> Tensor:
        """Return the swapped view."""
        return tensor.transpose(-2, -1)


@dataclass(frozen=True, kw_only=True)
class Weight:
    """One tensor that a graph reads.

    `source` is its canonical name in the checkpoint, `encoding` how the checkpoint stores it. A dense view of an MXFP4
    tensor is a placeholder that no artifact may contain: the fusion that understands the encoding replaces it by its `part`s.
    `computed` tensors have no source: the configuration determines them. `fixed` ones belong to a model in memory, which keeps
    them as they are: a pass may look at them another way, but cannot ask for another layout.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    source: str
    encoding: Encoding = "dense"
    part: Part | None = None
    transforms: tuple[Transform, ...] = ()
    computed: bool = False
    fixed: bool = False

    def then(self, transform: Transform, dtype: torch.dtype | None = None) -> Weight:
        """Return the recipe with one more step."""
        return replace(
            self, shape=transform.shape(self.shape), dtype=dtype or self.dtype, transforms=(*self.transforms, transform)
        )

    def parts(self) -> dict[Part, Weight]:
        """Return the stored parts of an MXFP4 placeholder [E, in, out]: blocks [E, out, in/32, 16] and scales [E, out, in/32]."""
        experts, rows, columns = self.shape
        stored: dict[Part, tuple[int, ...]] = {
            "blocks": (experts, columns, rows // MXFP4_BLOCK, MXFP4_BLOCK // 2),
            "scales": (experts, columns, rows // MXFP4_BLOCK),
        }
        return {part: replace(self, shape=shape, dtype=torch.uint8, part=part) for part, shape in stored.items()}


WeightTable = dict[str, Weight]


def table_of(params: Mapping[str, Tensor], encodings: Mapping[str, Encoding], computed: frozenset[str]) -> WeightTable:
    """Return the table of a freshly exported model.

    `params` gives shapes and dtypes (values are not read), `encodings` how the checkpoint stores each name, `computed` the
    names of buffers that the configuration determines.
    """
    return {
        name: Weight(
            shape=tuple(tensor.shape),
            dtype=tensor.dtype,
            source=name,
            encoding=encodings.get(name, "dense"),
            computed=name in computed,
        )
        for name, tensor in params.items()
    }
