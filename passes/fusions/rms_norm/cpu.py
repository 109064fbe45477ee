"""No C++ op: Inductor fuses the plain form of `rms_norm` with its neighbours, and an opaque op would be one pass more."""

from __future__ import annotations

from oxfuse.passes.fusions.contract import CpuKernel

KERNEL: CpuKernel | None = None
