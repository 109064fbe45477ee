"""Finds oxfuse in this checkout, whether or not it is installed, and starts other modules of this folder as processes.

A borrowed machine has the working tree and no network: nothing can be installed there.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


def use_checkout() -> None:
    """Make `import oxfuse` find this checkout, in this process and in those that it starts."""
    found = importlib.util.find_spec("oxfuse")
    if found is not None and found.origin and Path(found.origin).resolve() == ROOT / "__init__.py":
        return
    folder = _linked()
    sys.path.insert(0, str(folder))
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    importlib.invalidate_caches()


def _linked() -> Path:
    """Return a folder in which `oxfuse` is a link to this checkout, made where there is none yet."""
    places = [ROOT / ".links", Path(tempfile.gettempdir()) / f"oxfuse-{hashlib.sha256(str(ROOT).encode()).hexdigest()[:12]}"]
    for folder in places:
        link = folder / "oxfuse"
        try:
            folder.mkdir(exist_ok=True)
            if not link.exists():
                link.symlink_to(ROOT, target_is_directory=True)
            return folder
        except OSError:
            if folder == places[-1]:
                raise
    raise AssertionError("unreachable")


def command(module: str, *arguments: str) -> list[str]:
    """Return the command that runs a module of this folder: by path, since another package may be called `tests`."""
    return [sys.executable, str(HERE), module, *arguments]


def commit() -> str:
    """Return the commit of this checkout, and whether files differ from it; "unknown" where git cannot tell."""
    try:
        asked = ["git", "-C", str(ROOT), "-c", f"safe.directory={ROOT}"]
        head = subprocess.run([*asked, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, timeout=20, check=True)
        changed = subprocess.run([*asked, "status", "--porcelain"], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    files = changed.stdout.splitlines()
    return head.stdout.strip() + (f", {len(files)} files changed since" if files else "")


def kernel_sources(*, ops: bool = True) -> str:
    """Return a SHA-256 over the kernels, their tables and, with `ops`, the ops that launch them, as this checkout has them."""
    digest = hashlib.sha256()
    folder = ROOT / "passes" / "fusions"
    for path in sorted(path for name in ("triton*.py", "tuning.json", *["reference.py"] * ops) for path in folder.rglob(name)):
        digest.update(f"{path.relative_to(ROOT).as_posix()}\0".encode() + path.read_bytes())
    return digest.hexdigest()
