"""A checkpoint's weights as an artifact with fewer bits has them, for the oracle: it tells what is lost from what is wrong."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from oxfuse.models.tensor_source import TensorSource
from oxfuse.passes.quantise import Lossy


@dataclass(frozen=True, kw_only=True)
class Quantised(TensorSource):
    """A bank of experts [E, in, out], or a matrix [out, in], whose values went through `step` along `in` and back."""

    whole: TensorSource
    step: Lossy

    @classmethod
    def of(cls, whole: TensorSource, step: Lossy) -> Self:
        """Return what `whole` becomes."""
        return cls(name=whole.name, shape=whole.shape, dtype=torch.float32, whole=whole, step=step)

    def read(self, rows: slice | None = None) -> Tensor:
        """Return experts, or outputs, `rows`, float32."""
        if len(self.shape) == 2:
            return self.step.restored(self.whole.read(rows))
        return self.step.restored(self.whole.read(rows).transpose(1, 2)).transpose(1, 2)
