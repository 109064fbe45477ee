"""The C++ op of `linear_int8`: which source, which name."""

from __future__ import annotations

from pathlib import Path

from oxfuse.passes.fusions.contract import CpuKernel

KERNEL = CpuKernel(source=Path(__file__).with_name("linear_int8.cpp"), ops={"oxfuse::linear_int8": "linear_int8"})
