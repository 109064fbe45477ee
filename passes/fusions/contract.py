"""What a fusion's folder declares beside its pattern: the C++ ops it brings, and the inputs its ops are tested on.

`cpu.py` holds one `KERNEL`, or None where the plain op serves; `build_ops` takes them all. `cases.py` holds `CASES` and `NAIVE`,
which the contract tests run for every folder they find.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch


@dataclasses.dataclass(frozen=True, kw_only=True)
class CpuKernel:
    """One C++ source and the ops it registers.

    `source` is a file that `build.py` includes in the one translation unit of the library. `ops` maps the qualified name of
    each op it replaces, ours or torch's own, to the C++ function that `OXFUSE_OP` registers under that name and the library's
    tag. `dtypes` are those of the first argument that the function takes; calls on others are left as they are. A kernel is
    `live` if models that keep their own caches call it alone: no artifact ships it.
    """

    source: Path
    ops: Mapping[str, str]
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    live: bool = False

    def __post_init__(self) -> None:
        wrong = [name for name in self.ops if not re.fullmatch(r"(oxfuse|aten)::[a-z_][a-z0-9_]*", name)]
        if wrong or not self.ops:
            raise ValueError(
                f"{self.source.name} declares ops {sorted(self.ops)}; "
                "each must be named oxfuse::<op> or aten::<op>, one at least."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class OpCase:
    """One call of an op: `args(dtype)` makes the same inputs anew each time, floating ones in `dtype`, which may be float64.

    `op` is the qualified name; `mutated` lists the arguments that the op changes. `kernels` are the devices whose kernels
    take the case; the plain op takes all. `steps`: values inside are rounded coarsely by definition, so that one near an edge may
    fall to either side, and a few rows of the result may be off by more than roundings explain.
    """

    name: str
    op: str
    args: Callable[[torch.dtype], tuple[Any, ...]]
    mutated: tuple[int, ...] = ()
    kernels: tuple[str, ...] = ("cpu", "cuda")
    steps: bool = False
