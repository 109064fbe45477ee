"""A CUDA toolkit of the least that AOTInductor's host code is compiled and linked with: headers, and libraries that are empty.

A linker wants to see the libraries that a program will find on its target, so that their names stand in the program: here each
is made of functions that do nothing, by names that torch's own headers state. None of them is ever shipped or run. The headers
are those that triton's wheel brings; only C interfaces that have not changed from CUDA 12 to 13 are used from them. With a
toolkit of its own a machine would do as well, but every machine would do it a little differently.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable
from pathlib import Path

import torch

from oxfuse.errors import InternalError

DRIVER, TORCH = "libcuda.so.1", "libtorch_cuda.so"
NV_TARGET = """\
#define NV_IF_TARGET(condition, ...)
#define NV_IF_ELSE_TARGET(condition, device, ...) __VA_ARGS__
"""
"""The only header that triton's wheel leaves out: cuda_fp16.h asks it which side is being compiled, and this is the host's."""


def make_toolkit(folder: Path, compiler: str) -> Path:
    """Make `folder` what CUDA_HOME would point at: include/ and lib64/. Return it.

    A torch that was built for CUDA brings its own libtorch_cuda.so; then libcuda.so alone is made.
    """
    import triton

    include, libraries = folder / "include", folder / "lib64"
    include.mkdir(parents=True)
    libraries.mkdir()
    for header in (Path(triton.__file__).parent / "backends" / "nvidia" / "include").iterdir():
        (include / header.name).symlink_to(header)
    if not (include / "nv").exists():
        (include / "nv").mkdir()
        (include / "nv" / "target").write_text(NV_TARGET)
    made = {DRIVER: driver_functions()}
    if torch.version.cuda is None:
        made[TORCH] = torch_functions()
    for soname, functions in made.items():
        make_library(libraries / soname, functions, compiler)
        if not (link := libraries / (soname.partition(".so")[0] + ".so")).exists():
            link.symlink_to(soname)
    return folder


def driver_functions() -> set[str]:
    """Return the names of the CUDA driver's functions that a program may call."""
    return set(re.findall(r"\b(cu[A-Z]\w+)\(", _runtime_text()))


def runtime_functions() -> set[str]:
    """Return the names of the CUDA runtime's functions that a program may call; on the target libtorch_cuda.so brings them."""
    return set(re.findall(r"\b(cuda[A-Z]\w+)\(", _runtime_text()))


def torch_functions() -> set[str]:
    """Return the names of the functions of libtorch_cuda.so that a program may call."""
    headers = _torch() / "include" / "torch" / "csrc" / "inductor" / "aoti_torch"
    text = "".join((headers / name).read_text("utf-8") for name in ("generated/c_shim_cuda.h", "c/shim.h"))
    return set(re.findall(r"\b(aoti_torch_\w*cuda\w*)\(", text)) - {"aoti_torch_device_type_cuda"}  # that one is torch_cpu's


def make_library(path: Path, functions: Iterable[str], compiler: str) -> None:
    """Make a shared library of functions that do nothing. Raises InternalError where the compiler fails."""
    code = "".join(f"int {name}(void) {{ return 0; }}\n" for name in sorted(functions))
    # -fno-builtin and -w: some of the names are known to compilers with other types.
    command = [compiler, "-shared", "-fPIC", "-w", "-fno-builtin", "-xc", "-", "-o", str(path), f"-Wl,-soname,{path.name}"]
    done = subprocess.run(command, input=code, capture_output=True, text=True)
    if done.returncode:
        raise InternalError(f"{compiler} could not make {path.name} to link with: {done.stderr.strip()[-300:]}")


def _torch() -> Path:
    return Path(torch.__file__).parent


def _runtime_text() -> str:
    """Return the source of what AOTInductor's programs call CUDA by: torch's headers, and what is written into each program."""
    files = [
        *sorted((_torch() / "include/torch/csrc/inductor/aoti_runtime").glob("*.h")),
        _torch() / "_inductor/codegen/cuda/device_op_overrides.py",
    ]
    return "".join(file.read_text("utf-8") for file in files)
