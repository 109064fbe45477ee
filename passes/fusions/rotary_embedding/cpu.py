"""The C++ op of `rotary_embedding`: which source, which name."""

from __future__ import annotations

from pathlib import Path

from oxfuse.passes.fusions.contract import CpuKernel

KERNEL = CpuKernel(source=Path(__file__).with_name("rotary_embedding.cpp"), ops={"oxfuse::rotary_embedding": "rotary_embedding"})
