"""Where a compile's time goes: named phases, each with a line of progress for a person and seconds for the report."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

Progress = Callable[[str, float | None], None]
"""Called with a phase's name, and with the part of it that is done (0 to 1) or None at its beginning."""


def silent(phase: str, done: float | None) -> None:
    """Show nothing."""


@dataclass(kw_only=True)
class Phases:
    """Seconds of wall time by phase, in the order of their first beginning."""

    progress: Progress = silent
    seconds: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[Callable[[float], None]]:
        """Time a block; yields a function that reports the part done."""
        self.progress(name, None)
        self.seconds.setdefault(name, 0.0)
        began = time.perf_counter()
        try:
            yield lambda done: self.progress(name, min(1.0, done))
        finally:
            self.seconds[name] += time.perf_counter() - began
