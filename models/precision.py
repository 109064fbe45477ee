"""What "float32 inside" means here: promote(dtype, float32), so that a model in float64 computes in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def widened(x: Tensor) -> Tensor:
    """Return a floating-point x in float32, or as it is in float64."""
    # Not torch.promote_types: the exporter records each call of it as a node.
    return x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
