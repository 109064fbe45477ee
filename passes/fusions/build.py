"""Builds the C++ ops of all fusions into one shared library, and makes a built one known to this process.

Kernels and an instruction set enter; a library leaves that an artifact ships and a runtime loads with
`torch.ops.load_library`, without a compiler. Its ops carry a hash of what they were made from in their names, so libraries of
different versions can live in one process. It is one translation unit over torch's stable ABI headers, because parsing headers
is most of the work: 9 s of CPU where the usual headers and a unit for each op would need over 30.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib
import os
import pkgutil
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from oxfuse.errors import InternalError, UserError
from oxfuse.passes.fusions.contract import CpuKernel
from oxfuse.passes.fusions.isa import resolve_isa

HERE = Path(__file__).parent
FLAGS = (
    *("-std=c++20", "-O2", "-fPIC", "-shared", "-fvisibility=hidden"),
    # -O3 gives the same inner loops, which are unrolled by hand, and takes a quarter longer.
    # Products and sums may fuse, nothing else may change: NaN and infinities keep their meaning.
    *("-ffp-contract=fast", "-fno-math-errno", "-fopenmp-simd"),
    # The oldest torch that oxfuse takes: newer headers then offer just what that one has.
    "-DTORCH_TARGET_VERSION=0x020b000000000000",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OpsBuild:
    """A built library. `names` maps an op to the C++ op that replaces it where its first argument has one of `dtypes`;
    `features` is what the CPU must have."""

    path: Path
    tag: str
    names: Mapping[str, str]
    dtypes: Mapping[str, tuple[torch.dtype, ...]]
    isa: str
    flags: tuple[str, ...]
    features: tuple[str, ...]


def cpu_kernels(live: bool = False) -> list[CpuKernel]:
    """Return the kernels of every folder that has some, by name, and register the Python ops that they replace.

    With `live` also those that models in memory need.
    """
    kernels = []
    for info in pkgutil.iter_modules([str(HERE)]):
        if info.ispkg:
            importlib.import_module(f"oxfuse.passes.fusions.{info.name}.reference")
            kernel: CpuKernel | None = importlib.import_module(f"oxfuse.passes.fusions.{info.name}.cpu").KERNEL
            kernels += [kernel] if kernel is not None and live >= kernel.live else []
    return kernels


def build_ops(kernels: Iterable[CpuKernel], isa: str, out: Path, compiler: str = "g++") -> OpsBuild:
    """Compile all kernels into the one shared library `out` for `isa`, native or a level such as x86-64-v3.

    native is the highest level that this machine has. Raises UserError for an unknown `isa` and where `compiler` is missing or
    refuses.
    """
    kernels = _in_order(kernels)
    build = _describe(kernels, isa, lambda tag: out)
    _compile(kernels, build, compiler)
    return build


def cached_ops(kernels: Iterable[CpuKernel], isa: str, folder: Path, compiler: str = "g++") -> OpsBuild:
    """Return what `build_ops` makes, compiled into `folder` under a name of its own unless it lies there already."""
    kernels = _in_order(kernels)
    build = _describe(kernels, isa, lambda tag: folder / f"oxfuse_ops_{tag}.so")
    if not build.path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        _compile(kernels, build, compiler)
    return build


def _in_order(kernels: Iterable[CpuKernel]) -> list[CpuKernel]:
    return sorted(kernels, key=lambda kernel: kernel.source.as_posix())


def _describe(kernels: list[CpuKernel], isa: str, place: Callable[[str], Path]) -> OpsBuild:
    level, features = resolve_isa(isa)
    flags = FLAGS + ((f"-march={level}",) if features else ()) + (("-mprefer-vector-width=512",) if level == "x86-64-v4" else ())
    folders = {HERE, *(folder for kernel in kernels for folder in kernel.source.absolute().parents[:2])}
    headers = sorted(path for folder in folders for path in folder.glob("*.h"))
    content = hashlib.sha256()
    for part in (*flags, torch.__version__, *(path.read_text("utf-8") for path in (*headers, *(k.source for k in kernels)))):
        content.update(part.encode() + b"\0")
    tag = content.hexdigest()[:16]
    names = {op: f"oxfuse::{function}_{tag}" for kernel in kernels for op, function in kernel.ops.items()}
    dtypes = {op: kernel.dtypes for kernel in kernels for op in kernel.ops}
    return OpsBuild(path=place(tag), tag=tag, names=names, dtypes=dtypes, isa=level, flags=flags, features=features)


def load_ops(build: OpsBuild) -> None:
    """Register the ops of `build` in this process, with the shapes that the Python ops they replace compute.

    The modules that register those must be imported. An op that is registered already, by this file or by a copy of it, is
    left as it is. Raises InternalError if the library lacks one of its ops.
    """
    if any(_find(name) is None for name in build.names.values()):
        torch.ops.load_library(build.path)
    for reference, name in build.names.items():
        op, known = _find(name), _find(reference)
        if op is None or known is None:
            raise InternalError(f"Op {name if op is None else reference} is not registered after {build.path} was loaded.")
        torch.library.register_fake(name, functools.partial(_fake, known), allow_override=True)


def _compile(kernels: list[CpuKernel], build: OpsBuild, compiler: str) -> None:
    command, out = [compiler, *build.flags, f'-DOXFUSE_TAG="{build.tag}"'], build.path
    if shutil.which(command[0]) is None:
        raise UserError(
            f"The C++ compiler {command[0]} was not found. Install it (Debian, Ubuntu: apt install g++) to compile models."
        )
    root = Path(torch.__file__).parent
    unit = "".join(f'#include "{kernel.source.absolute().as_posix()}"\n' for kernel in kernels)
    handle, partial = tempfile.mkstemp(suffix=".so", prefix=f".{out.name}.", dir=out.parent)
    os.close(handle)
    # Nothing of this machine's paths is shipped: torch's macros put the names of source files into the library.
    folders = {kernel.source.absolute().parent for kernel in kernels} | {HERE, root}
    paths = [
        *(f"-ffile-prefix-map={folder}={folder.name}" for folder in sorted(folders)),
        f"-isystem{root}/include",
        f"-L{root}/lib",
    ]
    libraries = ["-ltorch_cpu", "-Wl,--no-undefined", "-Wl,-soname,liboxfuse_ops.so"]
    try:
        done = subprocess.run(
            [*command, *paths, "-xc++", "-", "-o", partial, *libraries], input=unit, capture_output=True, text=True
        )
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
            raise UserError(
                f"{command[0]} could not compile the CPU ops for {[flag for flag in command if flag.startswith('-march')]}: "
                + " | ".join(errors[:3])
                + ". It must be GCC 11 or newer, or a Clang that takes the same flags."
            )
        Path(partial).chmod(0o755)
        Path(partial).replace(out)
    finally:
        Path(partial).unlink(missing_ok=True)


def _find(name: str) -> Callable[..., Any] | None:
    namespace, _, op = name.partition("::")
    return getattr(getattr(torch.ops, namespace), op, None)


def _fake(reference: Callable[..., Any], *args: Any) -> Any:
    return reference(*args)
