"""How near Triton kernels must come to their references: the one table of tolerances."""

from __future__ import annotations

import torch
from torch import Tensor

RMS_RATIO = 1.2
"""Largest RMS error against float64, as a multiple of that of the plain op in the same 16-bit dtype."""
FLOAT32_RELATIVE = 1e-5
"""Largest error in float32, relative to the largest result."""


def rms_error(got: Tensor, exact: Tensor) -> float:
    """Return the root mean square of the differences, in float64."""
    return (got.double() - exact.double()).square().mean().sqrt().item()


def assert_as_near(got: Tensor, plain: Tensor, exact: Tensor, what: str = "") -> None:
    """Compare a kernel's result with the plain op's of the same dtype and with the plain op's in float64."""
    assert got.shape == exact.shape and got.dtype == plain.dtype, what
    assert bool(torch.isfinite(got).all()) == bool(torch.isfinite(exact).all()), f"{what}: values that are not finite"
    if got.dtype == torch.float32:
        worst = (got.double() - exact.double()).abs().max().item()
        assert worst <= FLOAT32_RELATIVE * max(exact.abs().max().item(), 1e-30), f"{what}: off by {worst:.3g}"
    else:
        mine, others = rms_error(got, exact), rms_error(plain, exact)
        assert mine <= RMS_RATIO * others + 1e-30, f"{what}: RMS error {mine:.3g}, the plain op's is {others:.3g}"
