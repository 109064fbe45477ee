"""The sections of the GPU report in order of value, and what is prepared while the first of them run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .checkout import command
from .worker import Section

if TYPE_CHECKING:
    from .lab import Lab

SECTIONS = (
    Section(name="environment", title="The machine and its floors", items="tests.gpu.environment:items"),
    Section(name="kernels", title="Kernels against their references", items="tests.gpu.kernels:items"),
    Section(name="shipped", title="An artifact compiled without a GPU", items="tests.gpu.artifacts:items"),
    Section(name="capture", title="Recorded decodes against uncaptured ones", items="tests.gpu.capture:items"),
    Section(
        name="timing",
        title="Decode and prefill at the 20b shape, and kernels against their floors",
        items="tests.gpu.timing:items",
        quiet=True,
        fresh=True,
    ),
    Section(name="memory", title="Memory of a context of 32k", items="tests.gpu.memory:items", quiet=True, fresh=True),
    Section(name="tuning", title="Configurations of the tuning tables", items="tests.gpu.tuning:items", quiet=True, fresh=True),
)

COMPILERS = 8
"""Processes that compile kernels into Triton's cache before they are needed."""


def open_lab(work: Path, facts: dict[str, Any]) -> Lab:
    """Return what items share."""
    from .lab import Lab  # torch: not for the process that only lists the sections

    return Lab(work=work, facts=facts)


def background(names: Sequence[str], work: Path) -> Mapping[str, Sequence[str]]:
    """Return the commands that prepare the sections `names`, by name."""
    commands = {}
    if {"shipped", "capture"} & {*names}:
        commands["native"] = command("native", str(work))
    cached = [name for name in ("kernels", "timing", "tuning") if name in names]
    for part in range(COMPILERS if cached else 0):
        commands[f"precompile-{part}"] = command("precompile", str(part), str(COMPILERS), *cached)
    return commands
