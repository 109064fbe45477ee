"""What is inside a CUDA program: kernels and what they need, launches, calls of torch, copies of caches, libraries.

In: the C++ that Inductor wrote, what it kept of each kernel, and the shared library. Out: an `Anatomy`, small enough for a
report. Nothing is run.
"""

from __future__ import annotations

import itertools
import re
import struct
import tempfile
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from oxfuse.compiler.lowering.kernels import cuda_tool
from oxfuse.errors import InternalError

CALLS = re.compile(r"\baoti_torch_((?:cuda|cpu|item)_\w+|proxy_executor_call_function|call_dispatcher)\(")
"""What computes by torch, or waits: operators of its shims, values that the host reads, and operators looked up by name."""
COPIES = re.compile(r"aoti_torch_(?:cuda_)?(?:clone|copy_|copy)\b")


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One Triton kernel of a program: how often a run launches it, and what it needs of the GPU.

    `registers` are those of a thread, `stack_bytes` what it spills, `shared_bytes` what a block takes. `float64` and `int64` name
    parameters that are passed as such.
    """

    name: str
    launches: int
    warps: int
    registers: int
    stack_bytes: int
    shared_bytes: int
    float64: tuple[str, ...]
    int64: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Anatomy:
    """A program from the inside. `sequence` is what a run starts on the GPU, in order: kernels by name, and torch's operators."""

    archs: tuple[str, ...]
    kernels: tuple[Kernel, ...]
    torch_calls: Mapping[str, int]
    sequence: tuple[str, ...]
    cache_copies: tuple[str, ...]
    needed: tuple[str, ...]

    @property
    def launches(self) -> int:
        """Return how many Triton kernels a run launches."""
        return sum(kernel.launches for kernel in self.kernels)

    def period(self, kernel: str) -> int:
        """Return the most that is started from one launch of a kernel to its next: a layer, where each launches it once.

        `kernel` is the beginning of its name. Raises InternalError where it is launched less than twice.
        """
        places = [i for i, name in enumerate(self.sequence) if name.startswith(kernel)]
        if len(places) < 2:
            raise InternalError(f"{kernel} is launched {len(places)} times; a period takes two.")
        return max(later - earlier for earlier, later in itertools.pairwise(places))

    def to_json(self) -> dict[str, Any]:
        """Return it as plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Anatomy:
        """Return what `to_json` was called on."""
        kernels = tuple(Kernel(**{**k, "float64": tuple(k["float64"]), "int64": tuple(k["int64"])}) for k in data["kernels"])
        lists = {name: tuple(data[name]) for name in ("archs", "sequence", "cache_copies", "needed")}
        return cls(kernels=kernels, torch_calls=data["torch_calls"], **lists)


def inspect_program(source: str, kept: Mapping[str, Mapping[str, Any]], library: Path, mutated: Collection[int]) -> Anatomy:
    """Return what is inside a program.

    source: the C++ of the program's `run_impl`. kept: what Inductor saved of each kernel, by name (`CudaKernelParamCache`).
    library: the linked program. mutated: positions of the inputs that the program changes, which must not be copied.
    """
    body = run_body(source)
    sequence = tuple(call or operator for call, operator in re.findall(r"\bcall_(\w+)\(|\baoti_torch_cuda_(\w+)\(", body))
    launches = Counter(re.findall(r"\bcall_(\w+)\(", body))
    cubins = {name: Path(kept[name]["cubin_path"]).read_bytes() for name in launches}
    data = library.read_bytes()
    if missing := [name for name, cubin in cubins.items() if cubin not in data]:
        raise InternalError(f"{library.name} does not hold the machine code of {missing}.")
    used = {name: _resources(cubin) for name, cubin in cubins.items()}
    torch_calls = Counter(CALLS.findall(body))
    return Anatomy(
        archs=tuple(sorted({arch for arch, _, _ in used.values()})),
        kernels=tuple(_kernel(name, count, kept[name], *used[name][1:]) for name, count in launches.items()),
        torch_calls=dict(torch_calls),
        sequence=sequence,
        cache_copies=cache_copies(source, mutated),
        needed=needed_libraries(library),
    )


def _kernel(name: str, launches: int, kept: Mapping[str, Any], registers: int, stack: int) -> Kernel:
    signature = {parameter: str(kind) for parameter, kind in kept["triton_meta"]["signature"].items()}
    return Kernel(
        name=name,
        launches=launches,
        warps=kept["num_warps"],
        registers=registers,
        stack_bytes=stack,
        shared_bytes=kept["shared_mem"],
        float64=tuple(parameter for parameter, kind in signature.items() if "fp64" in kind),
        int64=tuple(parameter for parameter, kind in signature.items() if kind == "i64"),
    )


def run_body(source: str) -> str:
    """Return the part of a program's C++ that a run goes through. Raises InternalError where it has none."""
    start = source.find("::run_impl(")
    if start < 0:
        raise InternalError("The generated C++ has no run_impl; this torch writes it in another way.")
    return source[start:]


def cache_copies(source: str, mutated: Collection[int]) -> tuple[str, ...]:
    """Return what in a program's C++ copies tensors, and what makes a buffer as large as an input that it should change in place.

    Inputs are known by their dynamic sizes. The clone of an input that is not aligned is left out: every program has it, and the
    runtime sees to alignment.
    """
    body = run_body(source).replace("aoti_torch_clone_preserve_strides", "")
    inputs = {name for name, i in re.findall(r"auto (\w+) = std::move\(inputs\[(\d+)\]\)", body) if int(i) in mutated}
    sizes = {symbol for symbol, name in re.findall(r"int64_t (\w+) = (\w+)_size\[\d+\];", body) if name in inputs}
    shapes = dict(re.findall(r"\b(int_array_\w+)\[\] = \{(.*?)\}", body))
    made = [shapes.get(name, "") for name in re.findall(r"aoti_torch_empty_strided\w*\(\d+, (\w+),", body)]
    buffers = [f"a buffer of [{shape}]" for shape in made if sizes & set(re.findall(r"\w+", shape))]
    return tuple(buffers + COPIES.findall(body))


def constant_names(source: str) -> tuple[str, ...]:
    """Return the names that a program calls its weights by, sorted: those that a runner's get_constant_names_to_original_fqns
    has.

    A runner cannot open the program on a machine without a GPU. The program's constructor states them, and is read here.
    Raises InternalError where it is not as expected.
    """
    total = {int(n) for n in re.findall(r"AOTInductorModelBase\(\s*\d+,\s*\d+,\s*(\d+),", source)}
    names, folded = (_constant_field(source, field) for field in ("original_fqn", "from_folded"))
    if total != {len(names)} or set(names) != set(range(len(names))) or set(names) != set(folded):
        raise InternalError(
            f"The generated C++ names {len(names)} of {sorted(total)} constants; this torch writes them in another way."
        )
    return tuple(sorted(name for i, name in names.items() if folded[i] == "false"))


def _constant_field(source: str, field: str) -> dict[int, str]:
    found = re.findall(rf'constants_info_\[(\d+)\]\.{field} = "?(.*?)"?;', source)
    return {int(i): value for i, value in found}


def _resources(cubin: bytes) -> tuple[str, int, int]:
    """Return a cubin's arch, such as sm_90a, its kernel's registers a thread and bytes of stack."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        header, text = (cuda_tool("cuobjdump", option, file.name) for option in ("-elf", "-res-usage"))
    arch, used = re.search(r"\bsm[=_](\d+[a-z]?)\b", header), re.findall(r"REG:(\d+) STACK:(\d+)", text)
    if arch is None or not used:
        raise InternalError(f"cuobjdump does not tell a cubin's arch or registers: {header[:100]!r}, {text[:200]!r}")
    registers, stack = (max(int(pair[i]) for pair in used) for i in range(2))
    return f"sm_{arch.group(1)}", registers, stack


def needed_libraries(library: Path) -> tuple[str, ...]:
    """Return the names of the shared libraries that `library` asks the loader for (DT_NEEDED)."""
    data = library.read_bytes()
    sections, entry, count = struct.unpack_from("<Q", data, 40)[0], *struct.unpack_from("<HH", data, 58)
    headers = [struct.unpack_from("<IIQQQQIIQQ", data, sections + i * entry) for i in range(count)]
    for _, kind, _, _, start, size, link, *_ in headers:
        if kind == 6:  # SHT_DYNAMIC; sh_link is its string table
            names = headers[link][4]
            tags = struct.iter_unpack("<qQ", data[start : start + size])
            return tuple(data[names + value : data.index(b"\0", names + value)].decode() for tag, value in tags if tag == 1)
    return ()
