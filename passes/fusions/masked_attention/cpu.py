"""The C++ ops for attention of whole tensors, with a mask or causal: which source, which names."""

from __future__ import annotations

from pathlib import Path

from oxfuse.passes.fusions.contract import CpuKernel
from oxfuse.passes.fusions.sink_attention import reference as reference  # registers sink_attention_dense

KERNEL = CpuKernel(
    source=Path(__file__).with_name("masked_attention.cpp"),
    ops={"oxfuse::masked_attention": "masked_attention", "oxfuse::sink_attention_dense": "sink_attention_dense"},
    live=True,  # artifacts have a cache of their own
)
