"""Lower an exported program to an AOTInductor library for one NVIDIA GPU arch, whether this machine has such a GPU or none.

Enters: an ExportedProgram for the CPU, whose weights nobody touches. Leaves: a folder with one shared library that holds its
kernels, and the files beside it that torch's runner reads. Nothing in it points to this machine.

The work is done by another process, one for each arch (`python -m oxfuse.compiler.lowering.cuda FOLDER`), because Inductor keeps
what it knows of the GPU in dozens of caches: no one process can believe in an sm_80, then an sm_90, and lower for the CPU as
well. It is a new process and no fork: a fork would inherit this one's caches, and its threads' locks without the threads. What it
is handed is the graph, a few hundred kB; of the weights it gets shapes alone. If it dies, this process only hears of it.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import importlib.util
import json
import os
import pkgutil
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx
from torch.export import ExportedProgram

from oxfuse.compiler.lowering import aoti
from oxfuse.compiler.lowering.anatomy import Anatomy, constant_names, inspect_program
from oxfuse.compiler.lowering.aoti import LIBRARY, Lowered
from oxfuse.compiler.lowering.cuda_requirements import why_not
from oxfuse.errors import InternalError, UserError

REQUEST, RESULT, OUTPUT = "request.json", "result.json", "program"
PARTS = ("exported_program", "state_dict", "constants", "example_inputs")
"""What a program is taken apart into to be handed over: one file each."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the other process is to do: lower for sm_`arch`, host code for an x86-64 level, after importing `modules`.

    `native` asks for a real GPU, or for none; None leaves it to what there is.
    """

    arch: int
    level: str
    modules: tuple[str, ...]
    native: bool | None


def options(level: str) -> dict[str, Any]:
    """Return Inductor's settings for a host of an x86-64 level: those of the CPU, and more, each for a reason."""
    settings: dict[str, Any] = aoti.options(level) | {
        "aot_inductor.embed_kernel_binary": True,  # or the library looks for its kernels by this machine's paths
        "aot_inductor.enable_line_tables": False,  # debug information names this machine's folders
        "aot_inductor.precompile_headers": False,  # each would be used once
        "cpp.vec_isa_ok": False,  # the host computes nothing: what vectors its compiler can do is not tried out, for 19 s
        "triton.autotune_at_compile_time": True,  # kernels are compiled here and now, see compile_without_measuring
        "triton.autotune_pointwise": False,  # one candidate each: nothing is measured, so what is built is the same everywhere
        "max_autotune": False,
        "max_autotune_gemm": False,
        "shape_padding": False,  # would measure products on the GPU
        "dynamic_scale_rblock": False,  # would look at registers, which only a driver tells
        "compile_threads": 1,  # the workers would be processes without our changes
        # triton's own launcher loads kernels where this one can; of two names, 2.12 and before have the second
        "use_static_triton_launcher": False,
        "use_static_cuda_launcher": False,
    }
    known = torch._inductor.config.get_config_copy()
    return {name: value for name, value in settings.items() if name in known}


def lower_cuda(
    program: ExportedProgram,
    folder: Path,
    arch: int,
    level: str,
    *,
    modules: Sequence[str] = (),
    native: bool | None = None,
) -> tuple[Lowered, Anatomy]:
    """Compile `program` for sm_`arch` and a host of an x86-64 level into `folder`, which is made; return it and what is inside.

    program: as exported on the CPU; it is not changed and no weight is read. modules: names or paths of Python modules that
    register ops of the program, besides oxfuse's own. native: False compiles as on a machine without a GPU. The program runs with
    the torch that this process has, in torch._C._aoti.AOTIModelContainerRunnerCuda.
    Raises UserError where this machine cannot build for the arch, InternalError where it should but did not.
    """
    if lacks := why_not(arch, os.environ):
        raise UserError(f"This machine cannot build for sm_{arch}: {'. '.join(map(str, lacks))}. `oxfuse doctor` lists it all.")
    with tempfile.TemporaryDirectory(prefix="oxfuse-cuda-") as place:
        work = Path(place)
        _hand_over(program, work)
        request = Request(arch=arch, level=level, modules=tuple(modules), native=native)
        (work / REQUEST).write_text(json.dumps(request.__dict__), "utf-8")
        result = _run(work, request)
        folder.mkdir(parents=True)
        for path in sorted((work / OUTPUT).iterdir()):
            shutil.copyfile(path, folder / path.name)
    lowered = Lowered(folder=folder, library=LIBRARY, constants=tuple(result["constants"]))
    return lowered, Anatomy.from_json(result["anatomy"])


def _run(work: Path, request: Request) -> dict[str, Any]:
    """Run the other process on what lies in `work` and return its result. Raises the error that it reports, or its death."""
    environment = {
        **os.environ,
        "TORCHINDUCTOR_CACHE_DIR": str(work / "cache"),  # nothing old enters, nothing stays
        "TRITON_CACHE_DIR": str(work / "triton"),
        "TRITON_DEFAULT_FP_FUSION": "1",  # later tritons have another default
        "TRITON_DISABLE_LINE_INFO": "1",  # kernels would carry their source's place on this machine, and their PTX
    }
    for name in ("CUDA_HOME", "CUDA_PATH", "TRITON_INTERPRET"):
        environment.pop(name, None)
    if request.native is False:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, "-P", "-m", "oxfuse.compiler.lowering.cuda", str(work)]
    log = work / "log"
    with log.open("w", encoding="utf-8") as file:
        # A session of its own: its compilers can be ended with it.
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=environment, start_new_session=True
        )
        try:
            process.wait()
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
    result: dict[str, Any] = {}
    if (work / RESULT).exists():
        result = json.loads((work / RESULT).read_text("utf-8"))
    if "user_error" in result:
        raise UserError(result["user_error"])
    if process.returncode or "constants" not in result:
        lines = log.read_text("utf-8", "replace").strip().splitlines()
        how = f"died of signal {-process.returncode}" if process.returncode < 0 else f"ended with {process.returncode}"
        why = result.get("error") or " | ".join(lines[-3:]) or "it said nothing"
        error = InternalError(f"Compiling for sm_{request.arch} failed; the process {how}: {why}")
        error.add_note("\n".join(lines[-60:]))
        raise error
    return result


def _hand_over(program: ExportedProgram, work: Path) -> None:
    """Write `program` into `work`, with shapes for its tensors. The program itself stays as it is."""
    from torch._export.serde.serialize import serialize

    shapes: dict[int, Tensor] = {}

    def shape_of(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) not in shapes:  # tied weights stay one tensor
            bare = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
            is_parameter = isinstance(value, torch.nn.Parameter)
            shapes[id(value)] = torch.nn.Parameter(bare, requires_grad=False) if is_parameter else bare
        return shapes[id(value)]

    bare = copy.copy(program)
    bare._state_dict = {name: shape_of(value) for name, value in program.state_dict.items()}
    bare._constants = {name: shape_of(value) for name, value in program.constants.items()}
    bare._example_inputs = pytree.tree_map(shape_of, program.example_inputs)
    artifact = serialize(bare)
    for part in PARTS:
        (work / part).write_bytes(getattr(artifact, part))


def _take_over(work: Path) -> ExportedProgram:
    """Return the program that `_hand_over` wrote. What lies there was pickled by our own parent."""
    from torch._export.serde.serialize import SerializedArtifact, deserialize

    return deserialize(SerializedArtifact(**{part: (work / part).read_bytes() for part in PARTS}))


def _serve(work: Path) -> None:
    """Do what the request in `work` says, and leave the result there. For a process of its own: nothing is put back."""
    request = Request(**json.loads((work / REQUEST).read_text("utf-8")))
    _end_with_parent()
    try:
        result = _lower_here(request, work)
    except UserError as error:
        result = {"user_error": str(error)}
    except Exception as error:  # whatever it is, it crosses to the process that asked
        traceback.print_exc()
        result = {"error": f"{type(error).__name__}: {str(error).strip()[:1000]}"}
    (work / RESULT).write_text(json.dumps(result), "utf-8")
    sys.exit("error" in result)


def _lower_here(request: Request, work: Path) -> dict[str, Any]:
    import torch.utils.cpp_extension as cpp_extension
    from torch._inductor.codecache import CudaKernelParamCache
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InductorError, InvalidCxxCompiler

    from oxfuse.compiler.lowering import without_gpu
    from oxfuse.compiler.lowering.stubs import make_toolkit

    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    native = capability == divmod(request.arch, 10) if request.native is None else request.native
    if native:
        if capability != divmod(request.arch, 10):
            raise UserError(f"A native build for sm_{request.arch} needs such a GPU; this machine has {capability or 'none'}.")
        without_gpu.build_patterns()
    else:
        without_gpu.pretend_gpu(request.arch)
    without_gpu.compile_without_measuring()
    without_gpu.same_tensors_by_identity()
    without_gpu.name_objects_by_kernel()
    without_gpu.hide_folders({work: "program", Path(torch.__file__).parent: "torch"})
    _import_ops(request.modules)
    program = _take_over(work)
    mutated = mutated_inputs(program)
    without_gpu.move_to_fake_gpu(program)
    try:
        cpp_extension.CUDA_HOME = str(make_toolkit(work / "cuda", get_cpp_compiler()))
        args, kwargs = program.example_inputs or ((), {})
        files: Any = torch._inductor.aot_compile(program.module(check_guards=False), args, kwargs, options=options(request.level))
    except InvalidCxxCompiler as error:
        raise UserError(f"{error}. `oxfuse doctor` looks at the compilers of this machine.") from error
    except InductorError as error:
        if isinstance(error.inner_exception, InvalidCxxCompiler):
            raise UserError(f"{error.inner_exception}. `oxfuse doctor` looks at the compilers of this machine.") from error
        raise
    lowered = aoti.copy_library(files, work / OUTPUT)
    (source,) = [Path(f) for f in files if isinstance(f, str) and f.endswith(".wrapper.cpp")]
    text = source.read_text("utf-8")
    anatomy = inspect_program(text, CudaKernelParamCache.cache, lowered, mutated)
    return {"constants": constant_names(text), "anatomy": anatomy.to_json()}


def _import_ops(modules: Sequence[str]) -> None:
    """Register oxfuse's ops and those of `modules`, each a name or a path."""
    from oxfuse.passes import fusions

    for info in pkgutil.iter_modules(fusions.__path__):
        if info.ispkg:
            importlib.import_module(f"{fusions.__name__}.{info.name}.reference")
    for name in modules:
        if not name.endswith(".py"):
            importlib.import_module(name)
            continue
        spec = importlib.util.spec_from_file_location(Path(name).stem, name)
        assert spec is not None and spec.loader is not None, name
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)


def mutated_inputs(program: ExportedProgram) -> tuple[int, ...]:
    """Return the positions of the inputs that ops of `program` write to."""
    weights = {*program.graph_signature.inputs_to_parameters, *program.graph_signature.inputs_to_buffers}
    weights |= {*program.graph_signature.inputs_to_lifted_tensor_constants}
    inputs = [node for node in program.graph.nodes if node.op == "placeholder" and node.name not in weights]
    written = set()
    for node in program.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        for place, argument in enumerate(schema.arguments if schema is not None else ()):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = node.args[place] if place < len(node.args) else node.kwargs.get(argument.name)
                written |= {_owner(v) for v in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(v, fx.Node)}
    return tuple(i for i, node in enumerate(inputs) if node in written)


def _owner(node: fx.Node) -> fx.Node:
    while node.op == "call_function" and node.all_input_nodes:  # a view
        node = node.all_input_nodes[0]
    return node


def _end_with_parent() -> None:
    """Ask Linux to end this process when the one that waits for it is gone; it could not clean up itself."""
    import ctypes

    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


if __name__ == "__main__":
    # Under its own name, or this module and what it raises would exist twice.
    importlib.import_module("oxfuse.compiler.lowering.cuda")._serve(Path(sys.argv[1]))
