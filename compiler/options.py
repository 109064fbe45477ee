"""What a caller may ask of `oxfuse.compile`, checked before any work is done."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import torch

from oxfuse.compiler.choices import DTYPE_NAMES, PLANNED_TARGETS, POLICIES, TARGETS
from oxfuse.errors import UserError
from oxfuse.runtime.manifest import TaskName

DTYPES = {name: getattr(torch, name) for name in DTYPE_NAMES if name != "auto"}
BLOCK_SIZE = 16
"""Tokens of one block of the KV cache: a sliding window of 128 is 8 blocks, and a short sequence wastes at most 15 slots."""
MAX_STEP_TOKENS = 8192
"""Most tokens of one step: keeps index arithmetic in 32 bits on every target."""


@dataclass(frozen=True, kw_only=True)
class CompileOptions:
    """The options of one compile. Raises UserError for values that no target has, or that this target cannot honour."""

    target: str = "cpu"
    dtype: str = "auto"
    task: str | None = None
    max_context: int | None = None
    max_batch: int = 8
    experts: str = "exact"
    activations: str = "exact"
    dense: str = "exact"
    cpu_isa: str = "native"
    provider: str = "cpu"

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            known = isinstance(self.target, str) and PLANNED_TARGETS.match(self.target)
            what = "is not built by this version of oxfuse" if known else "is not a target"
            raise UserError(f"target {self.target!r} {what}; targets: {', '.join(TARGETS)}.")
        if self.dtype not in DTYPE_NAMES:
            raise UserError(f"dtype {self.dtype!r} is not supported; choose {', '.join(DTYPES)} or auto.")
        if self.dtype == "float16":
            raise UserError("dtype float16 is not supported by target cpu; choose bfloat16 or float32.")
        if self.task is not None and self.task not in get_args(TaskName):
            raise UserError(f"task {self.task!r} is unknown; tasks: {', '.join(get_args(TaskName))}.")
        for name, least in (("max_context", 1), ("max_batch", 1)):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
                raise UserError(f"{name} is {value!r}; expected a whole number from {least} on.")
        for name, choices in POLICIES.items():
            if (value := getattr(self, name)) not in choices:
                raise UserError(f"{name} is {value!r}; expected one of {', '.join(choices)}.")
        for name in ("experts", "activations", "dense"):
            if (value := getattr(self, name)) != "exact":
                raise UserError(f"{name}={value!r} is not available for target cpu in this version; leave it at exact.")
        if self.provider != "cpu":
            raise UserError(f"provider {self.provider!r} belongs to target onnx; target cpu takes none.")
