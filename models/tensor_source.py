"""Where a parameter's values come from: a tensor of a file, some of its rows, its transpose, MXFP4 bytes, or live memory.

A source says name, shape, dtype and encoding without reading anything; `read` maps or computes rows of dim 0, so whoever streams
a checkpoint holds one slice of one tensor at a time.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from oxfuse.errors import UserError
from oxfuse.models.safetensors_file import SafetensorsFile

Encoding = Literal["dense", "mxfp4"]
MXFP4_BLOCK = 32
"""Values that share one e8m0 scale (OCP Microscaling Formats 1.0, 5.2)."""
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


@dataclass(frozen=True, kw_only=True)
class TensorSource(ABC):
    """The values of one parameter. `shape` is the parameter's, in its dense form, whatever `encoding` it is stored in."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    encoding: Encoding = "dense"

    @abstractmethod
    def read(self, rows: slice | None = None) -> Tensor:
        """Return the values, or a run of rows of dim 0; a view of the checkpoint where possible. MXFP4 becomes float32."""

    def parts(self) -> dict[str, TensorSource]:
        """Return what stores an MXFP4 parameter [E, in, out]: "blocks" [E, out, in/32, 16] and "scales" [E, out, in/32]."""
        return {}


@dataclass(frozen=True, kw_only=True)
class FileTensor(TensorSource):
    """A tensor of a safetensors file."""

    file: SafetensorsFile

    def read(self, rows: slice | None = None) -> Tensor:
        """Return a view of the mapped file."""
        return self.file.tensor(self.name, rows)


@dataclass(frozen=True, kw_only=True)
class MemoryTensor(TensorSource):
    """A tensor of a live module."""

    tensor: Tensor

    def read(self, rows: slice | None = None) -> Tensor:
        """Return a view of the tensor."""
        return self.tensor.detach() if rows is None else self.tensor.detach()[rows]


@dataclass(frozen=True, kw_only=True)
class RowsOf(TensorSource):
    """A run of rows of another source: q, k or v of a fused projection."""

    whole: TensorSource
    start: int

    def read(self, rows: slice | None = None) -> Tensor:
        """Return the rows."""
        first, last, _ = (rows or slice(None)).indices(self.shape[0])
        return self.whole.read(slice(self.start + first, self.start + max(first, last)))


@dataclass(frozen=True, kw_only=True)
class MatricesTransposed(TensorSource):
    """[E, in, out] of a stored [E, out, in]."""

    stored: TensorSource

    def read(self, rows: slice | None = None) -> Tensor:
        """Return the transposed view."""
        return self.stored.read(rows).transpose(1, 2)


@dataclass(frozen=True, kw_only=True)
class Scales(TensorSource):
    """e8m0 scales. A byte of 255 means NaN in the format and ±inf in transformers: no valid checkpoint has one."""

    stored: TensorSource

    def read(self, rows: slice | None = None) -> Tensor:
        """Return the bytes. Raises UserError if one is 255."""
        scales = self.stored.read(rows)
        if bool((scales == 255).any()):
            raise UserError(
                f"{self.name} holds a scale byte of 255, which stands for no number. The checkpoint is damaged; get it again."
            )
        return scales


@dataclass(frozen=True, kw_only=True)
class Mxfp4Tensor(TensorSource):
    """MXFP4 matrices. `dtype` is that of the checkpoint's unquantised tensors; `read` gives float32, which holds every value."""

    blocks: TensorSource
    scales: Scales

    def read(self, rows: slice | None = None) -> Tensor:
        """Return experts `rows` as a view float32 [n, in, out]."""
        return dequantise(self.blocks.read(rows), self.scales.read(rows)).transpose(1, 2)

    def parts(self) -> dict[str, TensorSource]:
        """Return blocks and scales as they are stored."""
        return {"blocks": self.blocks, "scales": self.scales}


def dequantise(blocks: Tensor, scales: Tensor) -> Tensor:
    """Return float32 [..., K] of MXFP4 blocks uint8 [..., K/32, 16] and scales uint8 [..., K/32].

    A byte holds two e2m1 values, the low nibble first; value * 2^(scale - 127). Exact: both tables are, and so is the product.
    """
    table, powers = _tables()
    # NumPy, because it backs large arrays with huge pages: page faults are most of what this costs in torch.
    found = np.take(table, blocks.contiguous().numpy().view("<u2")).view(np.float32)  # [..., K/32, 32]
    return torch.from_numpy(found).mul_(powers[scales.int()].unsqueeze(-1)).flatten(-2)


@cache
def _tables() -> tuple[npt.NDArray[np.complex128], Tensor]:
    """Return the four values of each two bytes, as one 16-byte element so that they are copied together, and 2^(scale - 127)."""
    codes = torch.tensor(_E2M1)
    words = torch.arange(1 << 16)
    fours = torch.stack([codes[(words >> shift) & 15] for shift in (0, 4, 8, 12)], -1)
    powers = [math.ldexp(1.0, scale - 127) for scale in range(255)] + [math.inf]
    return fours.numpy().view(np.complex128).ravel(), torch.tensor(powers, dtype=torch.float64).float()
