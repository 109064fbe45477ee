"""Runs the report, or another module of this folder: `python tests/gpu [MODULE] ...`, and `python -m tests.gpu ...`.

By its path it also runs where oxfuse is not installed and where some installed package is called `tests`.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import signal
import sys
import types
from pathlib import Path

HERE = Path(__file__).resolve().parent
BESIDE = ("native", "precompile")
SERVANTS = ("worker", *BESIDE)
RUNNABLE = ("report", "ship", "cubins", *SERVANTS)


def main() -> int:
    """Make the package `tests.gpu` out of this folder, and call `main` of the module that is asked for."""
    sys.path[:] = [path for path in sys.path if not path or Path(path).resolve() != HERE]  # its modules are no top-level ones
    for name, place in (("tests", HERE.parent), ("tests.gpu", HERE)):
        made = types.ModuleType(name)
        made.__path__ = [str(place)]
        if not hasattr(sys.modules.get(name), "__path__") or str(place) not in list(sys.modules[name].__path__):
            sys.modules[name] = made
    importlib.import_module("tests.gpu.checkout").use_checkout()
    module, arguments = "report", sys.argv[1:]
    if arguments and arguments[0] in RUNNABLE:
        module, *arguments = arguments
    if module in SERVANTS:
        end_with_parent()
    if module in BESIDE:
        os.nice(5)
    code: int | None = importlib.import_module(f"tests.gpu.{module}").main(arguments)
    return code or 0


def end_with_parent() -> None:
    """Ask Linux to end this process when the report is gone: one that is killed cannot do it, and a GPU would stay taken."""
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
