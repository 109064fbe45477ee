"""The x86-64 levels that kernels are built for, and the one that this machine has."""

from __future__ import annotations

import platform
from pathlib import Path

from oxfuse.errors import UserError

# The x86-64 psABI's levels, as /proc/cpuinfo spells their features (abm holds lzcnt, pni is sse3); each includes those before it.
LEVELS = {
    "x86-64-v2": ("cx16", "lahf_lm", "popcnt", "pni", "sse4_1", "sse4_2", "ssse3"),
    "x86-64-v3": ("abm", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe", "xsave"),
    "x86-64-v4": ("avx512bw", "avx512cd", "avx512dq", "avx512f", "avx512vl"),
}


def resolve_isa(isa: str) -> tuple[str, tuple[str, ...]]:
    """Return the level that `isa` means here and the CPU features it needs, sorted; no features where the CPU is not x86-64.

    Raises UserError if `isa` is unknown, or native and this machine has not even x86-64-v2.
    """
    levels = list(LEVELS)
    if isa not in ("native", *levels):
        raise UserError(f"CPU instruction set {isa!r} is unknown. Choose native, {', '.join(levels)}.")
    if platform.machine() != "x86_64":
        if isa != "native":
            raise UserError(f"CPU instruction set {isa} cannot be built on a {platform.machine()} machine. Choose native.")
        return platform.machine(), ()
    if isa == "native":
        have = _cpu_features()
        fitting = [
            name for i, name in enumerate(levels) if have.issuperset(f for below in levels[: i + 1] for f in LEVELS[below])
        ]
        if not fitting:
            missing = sorted(set(LEVELS[levels[0]]) - have)
            raise UserError(
                f"This CPU lacks {', '.join(missing)} of x86-64-v2, the least that oxfuse runs on. Use another machine."
            )
        isa = fitting[-1]
    return isa, tuple(sorted(f for name in levels[: levels.index(isa) + 1] for f in LEVELS[name]))


def _cpu_features() -> frozenset[str]:
    for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
        if line.startswith("flags"):
            return frozenset(line.split(":", 1)[1].split())
    return frozenset()
