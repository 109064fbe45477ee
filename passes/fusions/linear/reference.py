"""Dense layers: y = x Wᵀ + b, with x [..., K], W [N, K] and b [N] or None, result [..., N].

Graphs hold torch's own `aten.linear`. `linear_rows` is the same for the few rows of a decode step, where a GPU does nothing but
read W: torch would launch two kernels for one row, and a third for an activation behind it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


def linear_rows(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "none") -> Tensor:
    """Return activation(x Wᵀ + b) of few rows, [T, N], contiguous.

    x [T, K], weight [N, K], bias [N], all of one dtype; computed in promote(x.dtype, float32) and rounded once. `activation` is a
    key of ACTIVATIONS. Raises NotImplementedError on devices other than cpu and cuda.
    """
    if x.device.type == "cuda":
        from oxfuse.passes.fusions.linear.triton import launch_linear_rows  # only here: triton is slow to import

        return launch_linear_rows(torch.library.wrap_triton, x, weight, bias, activation, arch=arch_of(x.device))
    if x.device.type != "cpu":
        raise NotImplementedError(f"oxfuse::linear_rows has no kernel for device {x.device}; it runs on cpu and cuda.")
    wide = torch.promote_types(x.dtype, torch.float32)
    offset = None if bias is None else bias.to(wide)
    return ACTIVATIONS[activation](F.linear(x.to(wide), weight.to(wide), offset)).to(x.dtype)


def arch_of(device: torch.device) -> int:
    """Return the arch of a GPU, 90 for sm_90, by which kernels choose their configuration."""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "none") -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


torch.library.triton_op("oxfuse::linear_rows", linear_rows, mutates_args=())
torch.library.register_fake("oxfuse::linear_rows", _fake, allow_override=True)  # the body's own would be slow
