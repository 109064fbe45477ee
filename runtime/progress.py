"""Progress on stderr for a person at a terminal: one line that is gone when its work is done, and nothing at all in a pipe."""

from __future__ import annotations

import shutil
import sys
import threading
from types import TracebackType
from typing import Any

TICK = 1.0
"""Seconds between two looks at the clock while a phase tells nothing: a line that stands still looks like a fault."""

MOST_COLUMNS = 100


class PhaseLine:
    """Shows the running phase, how long it has been running, and a bar where the phase tells how far it is."""

    def __init__(self, *, quiet: bool = False) -> None:
        """Show nothing with `quiet`, or where stderr is no terminal."""
        self._shown = not quiet and sys.stderr.isatty()
        self._bar: Any = None
        self._phase = ""
        self._stop = threading.Event()

    def __enter__(self) -> PhaseLine:
        if self._shown:
            threading.Thread(target=self._tick, name="progress", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        self.clear()

    def __call__(self, phase: str, done: float | None) -> None:
        """Begin `phase`, or tell that the part `done` of it (0 to 1) is over."""
        if not self._shown:
            return
        if phase != self._phase:
            from tqdm import tqdm

            self.clear()
            self._phase = phase
            width = min(MOST_COLUMNS, shutil.get_terminal_size().columns - 1)
            form = "{desc} [{elapsed}]"
            self._bar = tqdm(total=1.0, desc=phase, leave=False, ncols=width, nrows=20, bar_format=form, file=sys.stderr)
        if done is not None and self._bar is not None:
            self._bar.bar_format = "{desc} {percentage:3.0f}% |{bar}| [{elapsed}]"
            self._bar.update(done - self._bar.n)

    def clear(self) -> None:
        """Take the line away, as before something else is written to the terminal."""
        bar, self._bar, self._phase = self._bar, None, ""
        if bar is not None:
            bar.close()

    def _tick(self) -> None:
        while not self._stop.wait(TICK):
            if (bar := self._bar) is not None:
                bar.refresh()
