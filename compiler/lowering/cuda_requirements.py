"""What a machine needs to build programs for NVIDIA GPUs. A GPU is not among it.

In: an arch and the environment's variables. Out: what is missing, each with its remedy. Like `oxfuse doctor`, which shows it,
this imports nothing that may be broken: no torch, no triton.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

ARCHS = (80, 90, 100)
"""GPUs that programs are built for: sm_80 (A100), sm_90 (H100, H200), sm_100 (B200)."""
TRITON_OF_TORCH = {"2.11": "3.6", "2.12": "3.7", "2.13": "3.7"}
"""The triton that each torch's wheels ask for; Inductor calls triton's private functions, so no other pair is tried."""
TORCH_REMEDY = "install one of these pairs: " + ", ".join(f"torch {a} with triton {b}" for a, b in TRITON_OF_TORCH.items())


@dataclass(frozen=True, kw_only=True)
class Lack:
    """One thing that is missing: what was found, and what to do about it."""

    found: str
    remedy: str

    def __str__(self) -> str:
        """Return both in one sentence."""
        return f"{self.found}; {self.remedy}"


def why_not(arch: int, environment: Mapping[str, str]) -> list[Lack]:
    """Return what this machine lacks to build for sm_`arch` (90 is sm_90); nothing where it can. Raises nothing."""
    return [*_system(arch), *_versions(), *_triton_files(arch), *_compiler(environment)]


def _system(arch: int) -> Iterator[Lack]:
    if arch not in ARCHS:
        known = ", ".join(f"sm_{a}" for a in ARCHS)
        yield Lack(found=f"sm_{arch} is not an arch that oxfuse has kernels for", remedy=f"choose among {known}")
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
        found = f"this is {platform.system()} on {platform.machine()}, and triton's compiler runs on Linux on x86-64 or aarch64"
        yield Lack(found=found, remedy="compile on such a machine and ship the artifact")


def _versions() -> Iterator[Lack]:
    torch, triton = _version("torch"), _version("triton")
    if torch is None or _minor(torch) not in TRITON_OF_TORCH:
        yield Lack(found="torch is not installed" if torch is None else f"torch is {torch}", remedy=TORCH_REMEDY)
        return
    wanted = TRITON_OF_TORCH[_minor(torch)]
    if triton is None or _minor(triton) != wanted:
        found = f"torch {torch} goes with triton {wanted}, and {'there is none' if triton is None else f'triton is {triton}'}"
        yield Lack(found=found, remedy=f"pip install 'triton=={wanted}.*'")


def _triton_files(arch: int) -> Iterator[Lack]:
    try:
        spec = importlib.util.find_spec("triton")
    except (ImportError, ValueError):
        spec = None
    if spec is None or spec.origin is None:
        if _version("triton") is not None:
            yield Lack(found="triton is installed, but Python does not find it", remedy="install triton again")
        return
    root = Path(spec.origin).parent / "backends" / "nvidia"
    tools = ["ptxas-blackwell" if arch >= 100 else "ptxas", "cuobjdump"]
    missing = [f"bin/{tool}" for tool in tools if not os.access(root / "bin" / tool, os.X_OK)]
    missing += [name for name in ("include/cuda.h", "include/cuda_runtime.h") if not (root / name).is_file()]
    if missing:
        remedy = "install triton again from its official wheels, which bring NVIDIA's tools and headers"
        yield Lack(found=f"{root} lacks {', '.join(missing)}", remedy=remedy)


def _compiler(environment: Mapping[str, str]) -> Iterator[Lack]:
    command = environment.get("CXX") or "g++"
    if shutil.which(command, path=environment.get("PATH", "")) is None:
        remedy = "install GCC 11 or later (Debian, Ubuntu: apt install g++)"
        yield Lack(found=f"the C++ compiler {command} is not in PATH", remedy=remedy)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])
