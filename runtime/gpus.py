"""NVIDIA GPUs of this machine as its driver tells, and which of them an artifact runs on.

The driver's library is asked directly: that needs no torch, makes no context on a device and takes no memory there, so that
`inspect` can use it on a machine that has nothing else, and an artifact for a CPU never touches it. Device numbers are the
driver's, in which CUDA_VISIBLE_DEVICES counts, and so torch's.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Sequence
from dataclasses import dataclass

from oxfuse.runtime.errors import UserError, shown

DRIVER = "libcuda.so.1"
MAJOR, MINOR = 75, 76
"""CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR of cuda.h."""
NAME_BYTES = 256


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU. `arch` is its compute capability as compilers spell it: "sm_90"."""

    index: int
    name: str
    arch: str

    def __str__(self) -> str:
        return f"cuda:{self.index}, {self.name}, {self.arch}"


@dataclass(frozen=True, kw_only=True)
class Gpus:
    """What the driver tells: the GPUs, the newest CUDA version that it runs, and why there is none where there is none."""

    found: tuple[Gpu, ...] = ()
    driver: tuple[int, int] = (0, 0)
    problem: str = ""


def find_gpus(driver: str = DRIVER) -> Gpus:
    """Ask the driver's library."""
    try:
        cuda = ctypes.CDLL(driver)
    except OSError:
        return Gpus(problem=f"there is no NVIDIA driver here ({driver} cannot be loaded)")
    number = ctypes.c_int()
    if code := cuda.cuInit(0):
        return Gpus(problem=f"the NVIDIA driver finds no GPU that it can use ({_name(cuda, code)})")
    cuda.cuDriverGetVersion(ctypes.byref(number))
    version = number.value // 1000, number.value % 1000 // 10
    cuda.cuDeviceGetCount(ctypes.byref(number))
    gpus = []
    for index in range(number.value):
        device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        name = ctypes.create_string_buffer(NAME_BYTES)
        cuda.cuDeviceGet(ctypes.byref(device), index)
        cuda.cuDeviceGetName(name, NAME_BYTES, device)
        for into, attribute in ((major, MAJOR), (minor, MINOR)):
            cuda.cuDeviceGetAttribute(ctypes.byref(into), attribute, device)
        gpus.append(Gpu(index=index, name=name.value.decode(errors="replace"), arch=f"sm_{major.value}{minor.value}"))
    return Gpus(found=tuple(gpus), driver=version, problem="" if gpus else "the NVIDIA driver shows no GPU to this process")


def _name(cuda: ctypes.CDLL, code: int) -> str:
    text = ctypes.c_char_p()
    cuda.cuGetErrorName(code, ctypes.byref(text))
    return text.value.decode(errors="replace") if text.value else f"code {code}"


def gpu_misfits(archs: Sequence[str], gpus: Gpus, torch_cuda: str) -> list[str]:
    """Return why programs for `archs` do not run here, each with its remedy; `torch_cuda` is what torch was built for."""
    needed, wrong = " or ".join(archs)[:100], []
    if not torch_cuda:
        wrong.append(
            f"torch is its CPU build, the artifact's programs run on a GPU of {needed}: install its CUDA build (pytorch.org), or "
            "compile with --target cpu"
        )
    if gpus.problem:
        wrong.append(f"{gpus.problem}, a GPU of {needed} is needed: run it where there is one, or compile with --target cpu")
    elif not {gpu.arch for gpu in gpus.found} & set(archs):
        here = sorted({gpu.arch for gpu in gpus.found})
        found = "; ".join(map(str, gpus.found))
        wrong.append(
            f"the GPUs here ({found:.300}) are not of {needed}, which the artifact was compiled for: compile with --target "
            f"cuda:{','.join(here)}"
        )
    elif torch_cuda and gpus.driver[0] < int(torch_cuda.partition(".")[0]):
        driver = ".".join(map(str, gpus.driver))
        wrong.append(
            f"the NVIDIA driver runs CUDA up to {driver}, torch was built for CUDA {torch_cuda}: update the driver, or install a "
            f"torch that was built for CUDA {gpus.driver[0]}"
        )
    return wrong


def choose_gpu(archs: Sequence[str], device: str | None, gpus: Gpus, current: int | None = None) -> Gpu:
    """Return the GPU that an artifact for `archs` is to run on.

    `device` is "cuda:N"; "cuda" and None take the `current` one if it fits, else the first that does. Raises UserError where
    there is none.
    """
    named = re.fullmatch(r"cuda:(\d{1,4})", device or "")
    if named is None and device not in (None, "cuda"):
        raise UserError(f"device is {shown(device)}: give 'cuda', or 'cuda:N' for the N-th GPU, counted from 0.")
    here = "; ".join(map(str, gpus.found)) or gpus.problem
    fitting = [gpu for gpu in gpus.found if gpu.arch in archs]
    if named:
        index = int(named[1])
        if index >= len(gpus.found):
            raise UserError(f"device is {device}, and this machine has {here}: give the number of one that is there.")
        if gpus.found[index] not in fitting:
            arch = gpus.found[index].arch
            raise UserError(
                f"{gpus.found[index]} is not of {' or '.join(archs)}, which the artifact was compiled for: compile with --target "
                f"cuda:{arch}, or give another device."
            )
        return gpus.found[index]
    if not fitting:
        raise UserError(f"The artifact was compiled for {' or '.join(archs)}, this machine has {here}: compile for what is here.")
    return next((gpu for gpu in fitting if gpu.index == current), fitting[0])
