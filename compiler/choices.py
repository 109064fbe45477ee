"""What the options of a compile may be called: names alone, so that help, completion and `doctor` import no torch."""

from __future__ import annotations

import re

TARGETS = ("cpu", "cuda:sm_80", "cuda:sm_90", "cuda:sm_100", "onnx", "onnx-portable")
"""What this version compiles for; several GPUs in one artifact are spelled cuda:sm_80,sm_90."""
PLANNED_TARGETS = re.compile(r"cuda:sm_\d+")
EXAMPLES = ("cpp",)
"""Languages of the example that a compile can add to an artifact."""
DTYPE_NAMES = ("auto", "float32", "bfloat16", "float16")
POLICIES = {
    "experts": ("exact", "int8", "int4"),
    "activations": ("exact", "int8"),
    "dense": ("exact", "int8"),
    "cpu_isa": ("native", "x86-64-v3", "x86-64-v4"),
    "provider": ("cpu", "cuda"),
}
