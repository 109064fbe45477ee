"""What a caller may ask of `oxfuse.compile`, checked before any work is done."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import torch

from oxfuse.compiler.choices import DTYPE_NAMES, PLANNED_TARGETS, POLICIES, TARGETS
from oxfuse.errors import UserError
from oxfuse.runtime.manifest import TaskName

DTYPES = {name: getattr(torch, name) for name in DTYPE_NAMES if name != "auto"}
BLOCK_SIZES = {"cpu": 16, "cuda": 64}
"""Tokens of one block of the KV cache. On a CPU a window of 128 is 8 blocks, and a short sequence wastes at most 15 slots; on a
GPU a block is a tile of the attention kernels, whose rows of keys fill 128 bytes."""
MAX_STEP_TOKENS = 8192
"""Most tokens of one step: keeps index arithmetic in 32 bits on every target."""


@dataclass(frozen=True, kw_only=True)
class CompileOptions:
    """The options of one compile. Raises UserError for values that no target has, or that this target cannot honour.

    experts: "exact", or for target onnx "int8" and "int4". dense: "exact", or "int8", for target cpu of dense layers and head,
    for onnx of embeddings and head. activations: "exact", or for target cpu "int8", of what is multiplied with MXFP4 experts and
    with dense weights of 8 bits. The report says what they lose. cpu_isa: "native", "x86-64-v3" or "x86-64-v4". provider: what is
    to run an ONNX model: onnxruntime's "cpu" part, or "cuda" (bfloat16 or float16; MXFP4 experts as they are).
    """

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
        self._check_target()
        for name, choices in POLICIES.items():
            if (value := getattr(self, name)) not in choices:
                raise UserError(f"{name} is {value!r}; expected one of {', '.join(choices)}.")
        if self.provider != "cpu" and self.target != "onnx":
            raise UserError(f"provider {self.provider!r} belongs to target onnx; target {self.target} takes none.")
        where = f"target {self.target}{'' if self.provider == 'cpu' else f' with provider {self.provider}'}"
        if self.dtype not in DTYPE_NAMES:
            raise UserError(f"dtype {self.dtype!r} is not supported; choose {', '.join(DTYPES)} or auto.")
        if self.dtype not in ("auto", *self.dtypes):
            raise UserError(f"dtype {self.dtype} is not supported by {where}; choose {' or '.join(self.dtypes)}.")
        if self.task is not None and self.task not in get_args(TaskName):
            raise UserError(f"task {self.task!r} is unknown; tasks: {', '.join(get_args(TaskName))}.")
        for name, least in (("max_context", 1), ("max_batch", 1)):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
                raise UserError(f"{name} is {value!r}; expected a whole number from {least} on.")
        lossy = {("onnx", "cpu"): ("experts", "dense"), ("cpu", "cpu"): ("dense", "activations")}.get(
            (self.target, self.provider), ()
        )
        for name in ("experts", "activations", "dense"):
            if (value := getattr(self, name)) != "exact" and name not in lossy:
                raise UserError(f"{name}={value!r} is not available for {where} in this version; leave it at exact.")

    @property
    def device(self) -> str:
        """Return the kind of device: "cpu", "cuda" or "onnx"."""
        return self.target.partition(":")[0].partition("-")[0]

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Return the names of the dtypes that the target computes in."""
        if self.device == "onnx":  # onnxruntime's attention: float32 on the CPU, 16 bits on a GPU
            return ("float32",) if self.provider == "cpu" else ("bfloat16", "float16")
        return ("bfloat16", "float32", "float16") if self.archs else ("bfloat16", "float32")

    @property
    def archs(self) -> tuple[int, ...]:
        """Return the GPU archs, (80, 90) for cuda:sm_80,sm_90; none for a CPU."""
        names = self.target.partition(":")[2]
        return tuple(sorted({int(name.removeprefix("sm_")) for name in names.split(",")})) if names else ()

    def _check_target(self) -> None:
        targets = [self.target]
        if isinstance(self.target, str) and self.target.startswith("cuda:"):
            targets = [f"cuda:{arch}" for arch in self.target.removeprefix("cuda:").split(",")]
        for target in targets:
            if target not in TARGETS:
                known = isinstance(target, str) and PLANNED_TARGETS.fullmatch(target)
                what = "is not built by this version of oxfuse" if known else "is not a target"
                raise UserError(f"target {target!r} {what}; targets: {', '.join(TARGETS)}, several GPUs as cuda:sm_80,sm_90.")
