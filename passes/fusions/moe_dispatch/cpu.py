"""The C++ op of `moe_dispatch`: which source, which name."""

from __future__ import annotations

from pathlib import Path

from oxfuse.passes.fusions.contract import CpuKernel

KERNEL = CpuKernel(source=Path(__file__).with_name("moe_dispatch.cpp"), ops={"oxfuse::moe_dispatch": "moe_dispatch"})
