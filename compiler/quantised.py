"""A checkpoint's weights as an artifact with fewer bits has them, for the oracle: it tells what is lost from what is wrong."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from oxfuse.models.tensor_source import TensorSource
from oxfuse.passes.quantise import Bits, dequantised


@dataclass(frozen=True, kw_only=True)
class Quantised(TensorSource):
    """A bank of experts [E, in, out], or a matrix [out, in], whose values went through blocks of `bits` along `in` and back."""

    whole: TensorSource
    bits: Bits

    @classmethod
    def of(cls, whole: TensorSource, bits: Bits) -> Self:
        """Return what `whole` becomes."""
        return cls(name=whole.name, shape=whole.shape, dtype=torch.float32, whole=whole, bits=bits)

    def read(self, rows: slice | None = None) -> Tensor:
        """Return experts, or outputs, `rows`, float32."""
        if len(self.shape) == 2:
            return dequantised(self.whole.read(rows), self.bits)
        return dequantised(self.whole.read(rows).transpose(1, 2), self.bits).transpose(1, 2)
