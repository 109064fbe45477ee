"""The C++ op that stands for `aten.linear` in bfloat16; float32 stays with torch, whose library for it is as fast as any."""

from __future__ import annotations

from pathlib import Path

import torch

from oxfuse.passes.fusions.contract import CpuKernel

KERNEL = CpuKernel(source=Path(__file__).with_name("linear.cpp"), ops={"aten::linear": "linear"}, dtypes=(torch.bfloat16,))
