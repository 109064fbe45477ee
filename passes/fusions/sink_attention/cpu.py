"""The C++ op of `sink_attention`: which source, which name."""

from __future__ import annotations

from pathlib import Path

from oxfuse.passes.fusions.contract import CpuKernel

KERNEL = CpuKernel(source=Path(__file__).with_name("sink_attention.cpp"), ops={"oxfuse::sink_attention": "sink_attention"})
