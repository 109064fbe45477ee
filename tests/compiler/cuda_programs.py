"""Programs for the tests of the CUDA lowering, and the check that a library finds all that it needs."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export

from oxfuse.compiler.export import export_step
from oxfuse.compiler.fuse import fuse
from oxfuse.compiler.lowering import stubs
from oxfuse.models.virtual import virtual_model
from oxfuse.passes.merge import merge_ops

from ..parity.fused import plan_of
from . import toy_cuda_op as toy_cuda_op  # registers the ops

TOY_OPS = str(Path(__file__).with_name("toy_cuda_op.py"))
LOAD = """
import ctypes, json, os, sys
import torch
stubs, library = json.loads(sys.argv[1])
for stub in stubs:
    ctypes.CDLL(stub, os.RTLD_NOW | os.RTLD_GLOBAL)
assert hasattr(ctypes.CDLL(library, os.RTLD_NOW | os.RTLD_LOCAL), "AOTInductorModelContainerCreateWithDevice")
"""


class Toy(nn.Module):
    """A norm of ours, two dense layers of 64 times `width`, a cache.

    `broken` reads the cache as it was before, and uses a kernel that takes fp64.
    """

    def __init__(self, width: int, broken: bool) -> None:
        super().__init__()
        self.broken = broken
        self.norm = nn.Parameter(torch.empty(64, dtype=torch.bfloat16))
        self.same_norm = self.norm
        self.up = nn.Linear(64, width, dtype=torch.bfloat16)
        self.down = nn.Linear(width, 64, bias=False, dtype=torch.bfloat16)
        self.register_buffer("frequency", torch.empty(64), persistent=False)

    def forward(self, x: Tensor, slots: Tensor, cache: Tensor) -> Tensor:
        """x [T, 64], slots [T], cache [B, 16, 64]; return [T, 64]."""
        old = cache * 2 if self.broken else None
        y = torch.ops.oxfuse_toy.append(x, cache, slots, 0.3)
        if old is not None:
            y = torch.ops.oxfuse_toy.scale(y, 0.7) + old[0, :1]
        normed = torch.ops.oxfuse.rms_norm(y * self.frequency.exp().to(y.dtype), self.same_norm, 1e-5)
        return self.down(nn.functional.silu(self.up(normed))) + y * self.norm


@torch.no_grad()
def toy_program(width: int = 256, broken: bool = False) -> ExportedProgram:
    """Return the toy as the exporter leaves it, its weights virtual."""
    with torch.device("meta"):
        model = Toy(width, broken)
    model = model.to_empty(device="cpu").eval().requires_grad_(False)
    tokens, blocks = Dim("T", min=1, max=8192), Dim("B", min=1, max=1 << 20)
    inputs = torch.zeros(5, 64, dtype=torch.bfloat16), torch.arange(5), torch.zeros(7, 16, 64, dtype=torch.bfloat16)
    return export(model, inputs, dynamic_shapes=({0: tokens}, {0: tokens}, {0: blocks}), strict=False)


def assert_loads(library: Path, scratch: Path) -> None:
    """Let a process of its own load a library, with every symbol resolved at once, against stubs of what a GPU machine has."""
    scratch.mkdir()
    found = {
        "libcudart.so.13": stubs.runtime_functions(),
        "libcuda.so.1": stubs.driver_functions(),
        "libtorch_cuda.so": stubs.torch_functions() if torch.version.cuda is None else set(),
    }
    made = []
    for name, functions in found.items():
        if functions:
            stubs.make_library(scratch / name, functions, "g++")
            made.append(str(scratch / name))
    done = subprocess.run([sys.executable, "-c", LOAD, json.dumps([made, str(library)])], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def step_program(checkpoint: Path, kind: str, **options: Any) -> ExportedProgram:
    """Return a checkpoint's program for the steps of a GPU: "step" for any mix, "decode" for one token a sequence."""
    plan = plan_of(checkpoint, target="cuda:sm_90", **options)
    encodings = {name: source.encoding for name, source in plan.sources.items()}
    fused = fuse(virtual_model(plan.contract, plan.config, plan.task, plan.dtype), encodings, requested=plan.contract.fusions)
    merge_ops(fused.step, fused.cache, kind)
    limits = dataclasses.replace(plan.step_limits, **(dict(tokens=8, sequences=8) if kind == "decode" else {}))
    sizes = dict(block_size=plan.block_size, dtype=plan.dtype, limits=limits)
    return export_step(fused.step, fused.cache, **sizes, one_token=kind == "decode")
