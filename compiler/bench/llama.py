"""Finds or builds llama.cpp, a peer of the benchmark: the package llama-cpp-python, in whichever interpreter has it.

In: an interpreter that a caller names, or none. Out: the interpreter whose worker (`llama_worker.py`) can run GGUF files.
"""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from importlib.util import find_spec
from pathlib import Path

from oxfuse.compiler.phases import Progress, silent
from oxfuse.errors import UserError

MODULE = "llama_cpp"
REQUIREMENT = "llama-cpp-python==0.3.36"
CMAKE_ARGS = "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF"
"""For the machine that it is built on, as a user of llama.cpp would build it; without the models of pictures."""
HOME = Path("~/.cache/oxfuse/llama-cpp")
SCRIPT = Path(__file__).with_name("llama_worker.py")


def find_llama(python: Path | None = None, home: Path = HOME) -> Path:
    """Return an interpreter that has llama-cpp-python: `python` where given, else the running one, else that built in `home`.

    Raises UserError that says how to get one.
    """
    if python is None:
        built = _interpreter(home.expanduser())
        if find_spec(MODULE) is not None:
            return Path(sys.executable)
        if not built.exists():
            raise UserError(
                f"llama.cpp needs {REQUIREMENT}: add --build-llama, which builds it in {home} (about 10 minutes), or name an "
                "interpreter that has it with --llama PYTHON."
            )
        python = built
    try:
        asked = subprocess.run([python, "-c", f"import {MODULE}"], capture_output=True, text=True)
    except OSError as error:
        raise UserError(f"{python} cannot be run: {error.strerror}. Name a Python interpreter with --llama.") from error
    if asked.returncode:
        reason = (asked.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"{python} cannot import {MODULE}: {reason}. Install {REQUIREMENT} there, or name another with --llama.")
    return python


def build_llama(home: Path = HOME, progress: Progress = silent) -> Path:
    """Build llama-cpp-python from its sources in an environment of its own in `home`, if it is not there; return its interpreter.

    Needs a C++ compiler and a package index. Raises UserError with the end of pip's messages if it fails.
    """
    home = home.expanduser()
    python = _interpreter(home)
    if python.exists() and not subprocess.run([python, "-c", f"import {MODULE}"], capture_output=True).returncode:
        return python
    progress("building llama.cpp, about 10 minutes", None)
    venv.create(home, with_pip=True, clear=True)
    command = [str(python), "-m", "pip", "install", "--no-binary", "llama-cpp-python", REQUIREMENT]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "CMAKE_ARGS": CMAKE_ARGS})
    if done.returncode:
        raise UserError(f"{REQUIREMENT} could not be built in {home}: {(done.stderr or done.stdout).strip()[-600:]}")
    return python


def _interpreter(home: Path) -> Path:
    return home / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
