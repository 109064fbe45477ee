"""Compiles single Triton kernels to machine code for any NVIDIA arch, on any machine, and reads what they need of a GPU.

A launch function of `passes/fusions/*/triton.py` is run on tensors of the meta device with `Launches` in the place of Triton's
launcher: what it would have launched is recorded, types and constants included, and compiled. So the shapes that are looked at
are those that the launch functions choose, not a second list.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

SHARED_MEMORY = {80: 166912, 90: 232448, 100: 232448}
"""Most bytes of shared memory that a block may ask for, by arch (CUDA C++ Programming Guide, table of compute capabilities)."""
LAUNCH_OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg")
POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.bool: "*i1",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One recorded launch. `signature` and `constants` are by parameter; `aligned` are parameters that are multiples of 16."""

    kernel: Any
    grid: tuple[int, ...]
    signature: dict[str, str]
    constants: dict[str, Any]
    aligned: tuple[str, ...]
    options: dict[str, int]

    @property
    def name(self) -> str:
        """Return the kernel's name."""
        name: str = self.kernel.__name__
        return name


@dataclass(frozen=True, kw_only=True)
class Binary:
    """A kernel's machine code for one arch, and what it needs: registers a thread, bytes of spills and of shared memory."""

    arch: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    cubin: bytes
    ptx: str

    def sass(self) -> str:
        """Return the disassembly, in which tensor-core work shows as HGMMA (sm_90) or HMMA."""
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.cubin)
            file.flush()
            return cuda_tool("nvdisasm", "-c", file.name)


@dataclass(kw_only=True)
class Launches:
    """Stands for Triton's launcher: `wrap(kernel)[grid](...)` is recorded in `made` and not run."""

    made: list[Launch] = field(default_factory=list)

    def wrap(self, kernel: Any) -> Any:
        """Return an object that takes `[grid](*args, **kwargs)` as a Triton kernel does."""
        return _Recorder(kernel, self.made)


class _Recorder:
    def __init__(self, kernel: Any, made: list[Launch]) -> None:
        self._kernel, self._made = kernel, made

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            self._made.append(record(self._kernel, grid, args, kwargs))

        return launch


def record(kernel: Any, grid: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Launch:
    """Return the launch that `kernel[grid](*args, **kwargs)` would make; types and alignment as Triton's launcher finds them."""
    options = {name: value for name, value in kwargs.items() if name in LAUNCH_OPTIONS and name not in kernel.arg_names}
    values = dict(zip(kernel.arg_names, args, strict=False)) | {n: v for n, v in kwargs.items() if n not in options}
    signature, constants, aligned = dict[str, str](), dict[str, Any](), []
    for parameter in kernel.params:
        name = parameter.name
        value = values.get(name, parameter.default)
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1 and not isinstance(value, bool)):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
            if value.storage_offset() * value.itemsize % 16 == 0:
                aligned.append(name)
        elif isinstance(value, bool):
            signature[name] = "u1"
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                aligned.append(name)
        else:
            signature[name] = "fp64"  # a Python float: kernels must take none, and a test looks for it
    shape = grid({**values, **options}) if callable(grid) else grid
    return Launch(
        kernel=kernel,
        grid=tuple(shape),
        signature=signature,
        constants=constants,
        aligned=tuple(aligned),
        options=options,
    )


def compile_launch(launch: Launch, arch: int) -> Binary:
    """Compile a recorded launch for `arch` (90 is sm_90). Raises triton's own errors where it cannot."""
    from triton import compile as compile_source
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    attributes = {(launch.kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in launch.aligned}
    source = ASTSource(launch.kernel, launch.signature, launch.constants, attributes)
    made = compile_source(source, target=GPUTarget("cuda", arch, 32), options=launch.options)
    cubin = made.asm["cubin"]
    registers, stack = resources(cubin)
    return Binary(
        arch=arch,
        registers=registers,
        spill_bytes=stack,
        shared_bytes=made.metadata.shared,
        cubin=cubin,
        ptx=made.asm["ptx"],
    )


def resources(cubin: bytes) -> tuple[int, int]:
    """Return registers a thread and bytes of stack, where spills go, of the kernel in `cubin`."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        found = re.findall(r"REG:(\d+) STACK:(\d+)", cuda_tool("cuobjdump", "-res-usage", file.name))
    registers, stack = (max(int(pair[i]) for pair in found) for i in range(2))
    return registers, stack


def cuda_tool(name: str, *args: str) -> str:
    """Run one of the binary tools that triton's wheel brings and return what it prints."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    return subprocess.run([tool, *args], capture_output=True, text=True, check=True).stdout
