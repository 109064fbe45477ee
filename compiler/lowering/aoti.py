"""Lower an exported program to an AOTInductor library for the CPU, its weights left outside.

Enters: an ExportedProgram with oxfuse:: ops, and the C++ ops that implement some of them. Leaves: a folder with one shared
library and the files beside it that torch's runner reads. Uses `torch._inductor`, which is private: all such use is here.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._inductor.exc import InductorError, InvalidCxxCompiler
from torch.export import ExportedProgram

from oxfuse.errors import InternalError, UserError
from oxfuse.passes.fusions.build import OpsBuild

LIBRARY = "program.so"
VECTOR_BITS = {"x86-64-v2": 1, "x86-64-v3": 256, "x86-64-v4": 512}
"""Vector width that Inductor may write code for, by level (1: none; it knows no SSE): -march alone does not bound it."""
C_TYPES = {
    "Tensor": "AtenTensorHandle",
    "Optional[Tensor]": "const AtenTensorHandle*",
    "int": "int64_t",
    "float": "double",
    "bool": "int32_t",
}
"""What `Direct::call` (ops.h) takes for an argument of a schema."""


@dataclass(frozen=True, kw_only=True)
class Lowered:
    """The program's folder, and the names that it calls its weights by."""

    folder: Path
    library: str
    constants: tuple[str, ...]


def options(level: str) -> dict[str, Any]:
    """Return Inductor's settings for an x86-64 level; each is there because leaving it out was seen to break something."""
    settings: dict[str, Any] = {
        "aot_inductor.package": True,
        "aot_inductor.package_constants_in_so": False,  # weights stay in one file that all programs share
        "always_keep_tensor_constants": True,  # or tensors of 8 elements and fewer are inlined with whatever memory holds
        "cpp.dynamic_threads": True,  # or a program dies of SIGBUS with more threads than it was compiled with
        "aot_inductor.check_lowerbound": False,  # dims are believed to be 2 and more, yet 1 runs
        "fx_graph_cache": False,
        "joint_graph_constant_folding": False,  # would read weights
        "cpp.enable_kernel_profile": False,
    }
    if level in VECTOR_BITS:
        settings |= {"cpp.march": level, "cpp.simdlen": VECTOR_BITS[level]}
    known = torch._inductor.config.get_config_copy()
    return {name: value for name, value in settings.items() if name in known}


def direct_calls(ops: OpsBuild) -> dict[torch._ops.OpOverload, list[str]]:
    """Return for each C++ op the C function that a program calls in its place, as Inductor writes it into the program.

    Inductor's own way to a custom op, through torch's dispatcher, takes some 15 us a call where memory has just been read through
    the caches: a sixtieth of a token's time in all. The function asks the op's library for the address of `Direct::call`
    (ops.h) when it is first called. Inductor writes `extern` before it. Ops of other types than that takes are left out.
    """
    functions = {op: _direct_call(op) for op in map(_op, ops.names.values())}
    return {op: [function] for op, function in functions.items() if function is not None}


def _direct_call(op: torch._ops.OpOverload) -> str | None:
    takes = [C_TYPES.get(str(argument.type)) for argument in op._schema.arguments]
    gives = [str(result.type) for result in op._schema.returns]
    if None in takes or gives not in (["Tensor"], ["Tensor", "Tensor"]):
        return None
    types = [*takes, *("AtenTensorHandle*" for _ in gives)]
    parameters = ", ".join(f"{kind} a{n}" for n, kind in enumerate(types))
    values = ", ".join(f"a{n}" for n in range(len(types)))
    name = op._schema.name.partition("::")[2]
    function = f"AOTITorchError aoti_torch_cpu_{name}({parameters})"
    return (
        f"{function}; inline {function} {{ "
        f"static const auto target = [] {{ StableIValue found[1]; "
        f'AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_call_dispatcher("{op._schema.name}_address", "", found)); '
        f"return reinterpret_cast<AOTITorchError (*)({parameters})>(found[0]); }}(); "
        f"return target({values}); }}"
    )


def use_ops(module: fx.GraphModule, ops: OpsBuild) -> int:
    """Let a graph call the C++ ops that implement its ops on the CPU in the dtypes at hand; return how many calls changed."""
    targets = {_op(old): (_op(new), ops.dtypes[old]) for old, new in ops.names.items()}
    changed = 0
    for node in module.graph.nodes:
        op, dtypes = targets.get(node.target, (None, ()))
        if op is not None and (value := _value(node.args[0])).dtype in dtypes and value.device.type == "cpu":
            node.target = op
            changed += 1
    module.recompile()
    return changed


def _value(node: fx.Node) -> torch.Tensor:
    while "val" not in node.meta:  # a view that came with the cache, of something that the exporter saw
        node = node.all_input_nodes[0]
    value: torch.Tensor = node.meta["val"]
    return value


def _op(qualified: str) -> torch._ops.OpOverload:
    namespace, name = qualified.split("::")
    overload = getattr(getattr(torch.ops, namespace), name).default
    assert isinstance(overload, torch._ops.OpOverload)
    return overload


def lower(program: ExportedProgram, folder: Path, level: str, ops: OpsBuild | None = None) -> Lowered:
    """Compile `program` for an x86-64 level into `folder`, which is made; `ops` are the loaded ones that it calls.

    Raises InternalError if Inductor yields other files.
    Raises UserError where Inductor finds no C++ compiler; the variable CXX names the one it looks for.
    """
    module = program.module(check_guards=False)
    args, kwargs = program.example_inputs or ((), {})
    try:
        direct = {} if ops is None else {"aot_inductor.custom_ops_to_c_shims": direct_calls(ops)}
        files = torch._inductor.aot_compile(module, args, kwargs, options=options(level) | direct)
    except InductorError as error:
        if isinstance(error.inner_exception, InvalidCxxCompiler):  # CXX names one that is not there, for example
            raise UserError(f"{error.inner_exception}. `oxfuse doctor` looks at the compilers of this machine.") from error
        raise
    library = copy_library(files, folder)
    runner = torch._C._aoti.AOTIModelContainerRunnerCpu(str(library), 1)
    names = tuple(sorted(runner.get_constant_names_to_original_fqns().values()))
    return Lowered(folder=folder, library=LIBRARY, constants=names)


def copy_library(files: object, folder: Path) -> Path:
    """Copy the shared library among what Inductor returned, and the json files beside it, into `folder`; return the library.

    `folder` is made. Raises InternalError where there is not one library.
    """
    paths = [Path(f) for f in files if isinstance(f, str)] if isinstance(files, list) else []
    libraries = [path for path in paths if path.suffix == ".so"]
    if len(libraries) != 1:
        raise InternalError(f"AOTInductor returned {[p.name for p in paths]}; expected one shared library.")
    folder.mkdir(parents=True)
    for path in paths:
        if path.suffix in (".so", ".json"):
            shutil.copyfile(path, folder / path.name.replace(libraries[0].stem, Path(LIBRARY).stem))
    return folder / LIBRARY
