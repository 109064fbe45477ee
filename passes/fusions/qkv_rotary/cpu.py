"""No C++ op: programs for the CPU hold the ops that this one merges."""

from __future__ import annotations

from oxfuse.passes.fusions.contract import CpuKernel

KERNEL: CpuKernel | None = None
