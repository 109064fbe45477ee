"""What this machine offers, against what an artifact requires.

A program is machine code for one torch and one instruction set: running it elsewhere ends in a crash without a word. So the
requirements of the manifest are compared with the host before anything is loaded, and every misfit is named with its remedy.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import re
import sys
from pathlib import Path

from oxfuse.runtime.errors import UserError
from oxfuse.runtime.gpus import Gpus, find_gpus, gpu_misfits
from oxfuse.runtime.machine import cpu_features
from oxfuse.runtime.manifest import Requirements


def torch_version() -> str:
    """Return the version of torch, "" without one: of the one that is imported, else from metadata, which opens no library."""
    if (imported := sys.modules.get("torch")) is not None:
        return str(imported.__version__)
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return ""


def torch_cuda() -> str:
    """Return the CUDA version that torch was built for, "" for its CPU build or without torch. Opens no library."""
    if (imported := sys.modules.get("torch")) is not None:
        return str(imported.version.cuda or "")
    found = importlib.util.find_spec("torch")
    try:
        text = Path(found.origin).with_name("version.py").read_text("utf-8") if found and found.origin else ""
    except OSError:
        return ""
    version = re.search(r"^cuda\b[^=\n]*=\s*['\"]([\d.]+)", text, re.MULTILINE)
    return version[1] if version else ""


def version_numbers(text: str) -> tuple[int, ...]:
    """Return the numbers that a version begins with: `2.13.0+cpu` gives (2, 13, 0)."""
    found = re.match(r"\d+(?:\.\d+)*", text)
    return tuple(int(part) for part in found[0].split(".")) if found else ()


def misfits(need: Requirements, gpus: Gpus | None = None) -> list[str]:
    """Return what of `need` the host does not have, each with what to do about it; `gpus` by default are those found here.

    A requirement that is an empty string is none.
    """
    wrong = []
    if need.torch and (torch_here := version_numbers(torch_version())[:2]) != version_numbers(need.torch)[:2]:
        here = ".".join(map(str, torch_here)) or "not installed"
        wrong.append(
            f"torch is {here}, the artifact was compiled for {need.torch:.40}: install torch=={need.torch:.40}.* or compile here"
        )
    if need.platform and need.platform.lower() != sys.platform:
        wrong.append(
            f"the platform is {sys.platform}, the artifact was compiled for {need.platform:.40}: compile on this platform"
        )
    if need.machine and (machine := platform.machine()) != need.machine:
        wrong.append(f"the machine is {machine}, the artifact was compiled for {need.machine:.40}: compile on this machine")
    elif missing := sorted(set(need.cpu_features) - cpu_features()):
        wrong.append(
            f"the processor lacks {', '.join(missing):.300}, which --cpu-isa {need.cpu_isa:.40} uses: "
            "compile here, or with --cpu-isa x86-64-v3 for older processors"
        )
    libc, libc_version = platform.libc_ver()
    if need.glibc and (libc != "glibc" or version_numbers(libc_version) < version_numbers(need.glibc)):
        wrong.append(
            f"the C library is {libc or 'unknown'} {libc_version}, glibc {need.glibc:.40} or later is needed: compile here"
        )
    if need.gpu_archs:
        wrong += gpu_misfits(need.gpu_archs, find_gpus() if gpus is None else gpus, torch_cuda())
    return wrong


def check_host(need: Requirements, gpus: Gpus | None = None) -> None:
    """Compare the host with `need`. Raises one UserError that lists every misfit and what to do about it."""
    if wrong := misfits(need, gpus):
        raise UserError("The artifact does not fit this machine: " + "; ".join(wrong) + ".")
