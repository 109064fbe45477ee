"""Weights as whole numbers with a scale for each block of 32 along the input, and MXFP4, as ONNX Runtime takes them.

MXFP4 goes into 8 bits without loss: twice an e2m1 value is a whole number of at most 12, and half a power of two is its scale.
All else loses: 8 bits about 0.4 % of a weight, 4 bits 7 to 8 %.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from oxfuse.passes.weights import MXFP4_BLOCK

BLOCK = MXFP4_BLOCK
ZERO = {8: 128, 4: 8}
"""What stands for 0."""
_TWICE_E2M1 = (0, 1, 2, 3, 4, 6, 8, 12)
_SHRUNK = tuple(6.6 + 0.2 * step for step in range(10))
"""What a block's largest weight may become in 4 bits: a little clipping of it makes the others more exact."""
Bits = Literal[8, 4]
_BLOCKS_AT_ONCE = 4096
"""Half a megabyte of float32, so that what is tried on a block stays in the cache."""


@runtime_checkable
class Lossy(Protocol):
    """A step of a recipe that loses something, and can say what is left."""

    def restored(self, weights: Tensor) -> Tensor:
        """Return what becomes of weights [..., K], in float32."""


@dataclass(frozen=True)
class Mxfp4Bytes:
    """MXFP4 blocks uint8 [..., K / 32, 16] to 128 + twice the values, uint8 [..., K]."""

    label: str = "mxfp4 values as bytes"
    dtype: torch.dtype = torch.uint8

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return [..., K]."""
        return (*shape[:-2], 2 * shape[-2] * shape[-1])

    def apply(self, blocks: Tensor) -> Tensor:
        """Return the bytes."""
        table = torch.tensor(
            [*(128 + value for value in _TWICE_E2M1), *(128 - value for value in _TWICE_E2M1)], dtype=torch.uint8
        )
        return table[torch.stack([blocks & 15, blocks >> 4], -1).int()].flatten(-3)


@dataclass(frozen=True)
class Mxfp4Columns:
    """MXFP4 blocks uint8 [..., N, K / 32, 16] to the same values input by input, two outputs in a byte: uint8 [..., K, N / 2].

    The lower half of a byte is the output with the even number. N must be even. That is the layout of onnxruntime's
    `pack_fp4_weights_for_cuda_moe_gemm`, which QMoE's `quant_type` fp4 wants.
    """

    label: str = "mxfp4 by columns"

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return [..., K, N / 2]."""
        return (*shape[:-3], 2 * shape[-2] * shape[-1], shape[-3] // 2)

    def apply(self, blocks: Tensor) -> Tensor:
        """Return the bytes."""
        columns = torch.stack([blocks & 15, blocks >> 4], -1).flatten(-3).transpose(-2, -1)  # [..., K, N]
        return columns[..., 0::2] | columns[..., 1::2] << 4


@dataclass(frozen=True)
class HalfPowers:
    """e8m0 scales uint8 to half the powers of two that they stand for, float32."""

    label: str = "half the e8m0 scales"
    dtype: torch.dtype = torch.float32

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return `shape`."""
        return shape

    def apply(self, scales: Tensor) -> Tensor:
        """Return the scales: below the normal numbers, too."""
        powers: Tensor = torch.ldexp(torch.ones(scales.shape), scales.int() - 128)
        return powers


@dataclass(frozen=True)
class BlockValues:
    """Weights [..., K] to the whole numbers that `quantise` gives them: bytes [..., K], or 4 bits each, the low ones first."""

    bits: Bits
    dtype: torch.dtype = torch.uint8

    @property
    def label(self) -> str:
        """Name the step."""
        return f"int{self.bits}, blocks of {BLOCK}"

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return [..., K * bits / 8]."""
        return (*shape[:-1], shape[-1] * self.bits // 8)

    def apply(self, weights: Tensor) -> Tensor:
        """Return the bytes."""
        values, _ = quantise(weights, self.bits)
        return values if self.bits == 8 else values[..., 0::2] | values[..., 1::2] << 4

    def restored(self, weights: Tensor) -> Tensor:
        """Return what becomes of weights [..., K], in float32."""
        return dequantised(weights, self.bits)


@dataclass(frozen=True)
class BlockScales:
    """Weights [..., K] to the scales that `quantise` gives their blocks, float32 [..., K / 32]."""

    bits: Bits
    dtype: torch.dtype = torch.float32

    @property
    def label(self) -> str:
        """Name the step."""
        return f"scales of int{self.bits}, blocks of {BLOCK}"

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return [..., K / 32]."""
        return (*shape[:-1], shape[-1] // BLOCK)

    def apply(self, weights: Tensor) -> Tensor:
        """Return the scales."""
        return quantise(weights, self.bits)[1]


def quantise(weights: Tensor, bits: Bits, scale_dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Return whole numbers uint8 [..., K] and scales [..., K / 32] in `scale_dtype`: a weight is (number - ZERO) * scale.

    With 8 bits the block's largest weight becomes 127; with 4 bits what makes the block's squared error smallest. Scales are
    rounded first, so numbers fit them as they are stored.
    """
    blocks = weights.float().reshape(-1, BLOCK)
    values, scales = torch.empty(blocks.shape, dtype=torch.uint8), torch.empty(len(blocks))
    for some, numbers, scale in zip(*(x.split(_BLOCKS_AT_ONCE) for x in (blocks, values, scales)), strict=True):
        columns = some.t().contiguous()  # [32, blocks]: operations with a scale a block run along the blocks
        largest = columns.abs().amax(0)
        largest.masked_fill_(largest == 0, 1)
        scale.copy_((largest / 127 if bits == 8 else _best_scale(columns, largest)).to(scale_dtype))
        numbers.copy_(_rounded(columns, scale, bits).add_(ZERO[bits]).t())
    return values.view(weights.shape), scales.view(*weights.shape[:-1], -1).to(scale_dtype)


def rounded(activations: Tensor, dtype: torch.dtype) -> Tensor:
    """Return activations [..., K] in `dtype` with 8 bits in blocks of 32: whole numbers from -127 to 127 times a block's scale.

    The last block may be shorter. The block's largest value becomes 127; a block without one of 2^-100 or more is 0, one with a
    value that is infinite or no number is NaN. All is computed in float32, whatever `dtype`.
    """
    length = activations.shape[-1]
    blocks = torch.nn.functional.pad(activations.float(), (0, -length % BLOCK)).unflatten(-1, (-1, BLOCK))
    largest = blocks.abs().amax(-1, keepdim=True)
    some = largest >= 2.0**-100
    inverse = torch.full_like(largest, 127) / largest  # 127 / largest would be a reciprocal, rounded, times 127
    numbers = (blocks * torch.where(some, inverse, 0)).round()
    scales = torch.where(largest.isfinite(), torch.where(some, largest / 127, 0), torch.nan)
    result: Tensor = (numbers.to(dtype) * scales.to(dtype)).flatten(-2)[..., :length]
    return result


def _best_scale(blocks: Tensor, largest: Tensor) -> Tensor:
    """Return for 4 bits the scales [N] of blocks [32, N] with the smallest squared error; of equals the largest scale."""
    best, least = torch.empty_like(largest), torch.full_like(largest, torch.inf)
    for shrunk in _SHRUNK:
        scale = largest / shrunk
        error = _rounded(blocks, scale, 4).mul_(scale).sub_(blocks).square_().sum(0)
        better = error < least
        best, least = torch.where(better, scale, best), torch.where(better, error, least)
    return best


def dequantised(weights: Tensor, bits: Bits, scale_dtype: torch.dtype = torch.float32) -> Tensor:
    """Return what `quantise` makes of weights [..., K], in float32."""
    values, scales = quantise(weights, bits, scale_dtype)
    blocks: Tensor = (values.float() - ZERO[bits]).unflatten(-1, (-1, BLOCK))
    return (blocks * scales.float()[..., None]).flatten(-2)


def _rounded(blocks: Tensor, scale: Tensor, bits: Bits) -> Tensor:
    least, most = {8: (-127, 127), 4: (-8, 7)}[bits]
    numbers: Tensor = (blocks / scale).round_().clamp_(least, most)
    return numbers
