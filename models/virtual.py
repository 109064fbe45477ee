"""Models whose weights are memory that nobody touches: what the compiler exports and transforms.

In: a contract, a configuration, a task, a dtype. Out: a module as large as the model that costs no memory, however large.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from oxfuse.models.contract import ComputedBuffers, ModelContract
from oxfuse.models.reference import Reference

M = TypeVar("M", bound=nn.Module)

_NORESERVE = 0x4000
"""MAP_NORESERVE of Linux, which Python names from 3.13 on: a tensor larger than the machine's memory is not refused."""


def meta_model(contract: ModelContract, config: Any, task: str, dtype: torch.dtype) -> Reference:
    """Return the task's reference in eval mode on the meta device, floating parameters in `dtype`, without gradients."""
    with torch.device("meta"):
        model = contract.tasks[task](config)
    return model.to(dtype).eval().requires_grad_(False)


def virtual_model(contract: ModelContract, config: Any, task: str, dtype: torch.dtype) -> Reference:
    """Return the task's reference on the CPU, parameters in `dtype`, in eval mode and without gradients.

    Parameters are address space: their values are undefined and reading them makes zeros. Tied ones stay tied. Buffers that the
    configuration determines are real, in their own dtype.
    """
    model = meta_model(contract, config, task, dtype)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    return fill(model, lambda name: _address_space(shapes[name], dtype)).requires_grad_(False)


def fill(model: M, values: Callable[[str], Tensor]) -> M:
    """Give a meta model `values(name)` as its parameters, tied ones once, and compute its buffers on the CPU."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            if parameter not in made:
                made[parameter] = nn.Parameter(values(names[parameter]))
            module.register_parameter(leaf, made[parameter])
        if isinstance(module, ComputedBuffers):
            module.compute_buffers(torch.device("cpu"))
    return model


def _address_space(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    count = math.prod(shape)
    memory = mmap.mmap(-1, max(1, count * dtype.itemsize), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE)
    return torch.frombuffer(memory, dtype=dtype, count=count).view(shape)
