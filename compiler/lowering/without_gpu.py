"""Inductor's CUDA pipeline in a process that has no GPU, no driver and perhaps a torch without CUDA.

AOTInductor was made to compile on the machine that runs the result ("native compilation, not cross compilation", a maintainer on
pytorch#153697). Yet it needs a GPU for little: to ask what GPU there is, and to try kernels. So this process is made to believe
in one GPU that answers as `GPUS` says, and nothing is tried. All of it is private to torch 2.11 to 2.13 and their triton, is here
and nowhere else, and is never undone: torch and Inductor keep such answers in dozens of caches, so `cuda.py` calls these
functions in a process of its own, once.
"""

from __future__ import annotations

import shutil
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx
from torch.export import ExportedProgram

from oxfuse.compiler.lowering.kernels import SHARED_MEMORY
from oxfuse.errors import InternalError

DEVICE = torch.device("cuda", 0)


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """What Inductor asks of a GPU. Memory is in bytes; `shared_per_processor` is what a multiprocessor's blocks share."""

    processors: int
    shared_per_processor: int
    l2: int
    memory: int


GPUS = {
    80: Gpu(processors=108, shared_per_processor=167936, l2=40 << 20, memory=80 << 30),  # A100
    90: Gpu(processors=132, shared_per_processor=233472, l2=50 << 20, memory=80 << 30),  # H100, H200
    100: Gpu(processors=148, shared_per_processor=233472, l2=126 << 20, memory=180 << 30),  # B200
}
"""By arch; the SXM module where there are several. Shared memory: CUDA C++ Programming Guide, table of compute capabilities,
which gives 2048 threads and 65536 registers a multiprocessor and 1024 threads a block for all of them. The rest: NVIDIA's white
papers on the A100, H100 and Blackwell architectures. Shared memory decides what compiles; Inductor's heuristics look at the
processors."""


def pretend_gpu(arch: int) -> None:
    """Make torch, Inductor and triton believe in one GPU of sm_`arch`. Call it before anything asked for a GPU."""
    build_patterns()
    gpu = properties(arch)
    nothing = lambda *args, **kwargs: None  # noqa: E731
    answers: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_properties": lambda device=None: gpu,
        "get_device_capability": lambda device=None: (gpu.major, gpu.minor),
        "get_device_name": lambda device=None: gpu.name,
        "get_arch_list": lambda: [gpu.name],
        "is_bf16_supported": lambda *args, **kwargs: True,
        "is_tf32_supported": lambda: True,
        "memory_allocated": lambda device=None: 0,
        "mem_get_info": lambda device=None: (gpu.total_memory, gpu.total_memory),
        "get_rng_state": lambda *args: torch.get_rng_state(),  # saved and restored around tracing
        "_exchange_device": lambda device: 0,
        "_maybe_exchange_device": lambda device: 0,
    }
    answers |= dict.fromkeys(("set_device", "synchronize", "_lazy_init", "set_rng_state", "reset_peak_memory_stats"), nothing)
    from torch._dynamo.device_interface import CudaInterface

    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)
        if name in CudaInterface.__dict__:  # copies, made when the class was defined
            setattr(CudaInterface, name, staticmethod(answer))
    for name in ("exchange_device", "maybe_exchange_device"):
        setattr(CudaInterface, name, staticmethod(answers[f"_{name}"]))
    setattr(CudaInterface, "get_raw_stream", staticmethod(lambda device=None: 0))  # noqa: B010

    import torch._subclasses.fake_tensor as fake_tensor

    setattr(fake_tensor, "init_gpu_context", nothing)  # noqa: B010 - it would allocate on the GPU
    _set_triton_driver(arch, gpu)


def build_patterns() -> None:
    """Let Inductor build its tables of patterns on the CPU: where a GPU seems to be there, it would trace them on that."""
    from torch._inductor.fx_passes import joint_graph, post_grad, pre_grad

    cpu = torch.device("cpu")
    for module, args in ((joint_graph, (cpu,)), (post_grad, (cpu,)), (pre_grad, ())):
        module.lazy_init(*args)
        setattr(module, "lazy_init", lambda *a, **k: None)  # noqa: B010 - they are kept by device


def properties(arch: int) -> types.SimpleNamespace:
    """Return what torch.cuda.get_device_properties returns for the GPU of `arch` in `GPUS`."""
    gpu = GPUS[arch]
    return types.SimpleNamespace(
        name=f"sm_{arch}",
        major=arch // 10,
        minor=arch % 10,
        multi_processor_count=gpu.processors,
        warp_size=32,
        max_threads_per_multi_processor=2048,
        max_threads_per_block=1024,
        regs_per_multiprocessor=65536,
        shared_memory_per_block=49152,
        shared_memory_per_block_optin=SHARED_MEMORY[arch],
        shared_memory_per_multiprocessor=gpu.shared_per_processor,
        total_memory=gpu.memory,
        L2_cache_size=gpu.l2,
        gcnArchName="",
        is_integrated=0,
        is_multi_gpu_board=0,
        uuid="none",
    )


def _set_triton_driver(arch: int, gpu: types.SimpleNamespace) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaDriver

    class Driver(CudaDriver):  # type: ignore[misc]  # of that class, or Inductor would put the real one in its place
        """Knows the arch, takes binaries and loads none; what triton checks before loading, it still checks."""

        def __init__(self) -> None:
            self.utils = types.SimpleNamespace(
                get_device_properties=lambda device: {
                    "max_shared_mem": gpu.shared_memory_per_block_optin,
                    "multiprocessor_count": gpu.multi_processor_count,
                    "warpSize": 32,
                },
                load_binary=lambda *args: (1, 1, 0, 0, gpu.max_threads_per_block),  # module, function, registers, spills, threads
            )
            self.launcher_cls = lambda source, metadata: lambda *args, **kwargs: None
            self.get_current_device = self.get_current_stream = lambda *args: 0
            self.set_current_device = lambda device: None
            self.get_device_capability = lambda device=None: (gpu.major, gpu.minor)

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", arch, 32)

    triton.runtime.driver.set_active(Driver())


def compile_without_measuring() -> None:
    """Let Inductor compile each kernel and keep the first of its candidates, with or without a GPU.

    Measuring would run kernels on made-up inputs, and block tables of random numbers point anywhere. Our own kernels have one
    candidate: `tuning.json` decides.
    """
    from torch._inductor.codegen.wrapper import PythonWrapperCodegen
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner

    def compile_kernels(wrapper: Any) -> None:
        wrapper.kernel_autotune_defs.splice("async_compile.wait(globals())\ndel async_compile\n")
        scope: dict[str, Any] = {}
        exec(wrapper.kernel_autotune_defs.getvalue(), scope)
        for kernel in scope.values():
            if isinstance(kernel, CachingAutotuner):
                if not kernel.launchers:
                    kernel.precompile()
                kernel.save_gpu_kernel(0, kernel.launchers[0])

    PythonWrapperCodegen.generate_and_run_autotune_block = compile_kernels  # type: ignore[method-assign]


def name_objects_by_kernel() -> None:
    """Let each kernel's machine code be linked from an object of its own.

    Files go by their contents. Where two kernels have the same machine code, torch 2.11 makes the object of the second in the
    place of the first's, and links it twice.
    """
    import torch._inductor.codecache as codecache

    convert = vars(codecache)["convert_cubin_to_obj"]

    def convert_own(cubin_file: str, kernel_name: str, ld: str, objcopy: str) -> str:
        own = f"{cubin_file}.{kernel_name}"
        shutil.copyfile(cubin_file, own)
        made: str = convert(own, kernel_name, ld, objcopy)
        return made

    setattr(codecache, "convert_cubin_to_obj", convert_own)  # noqa: B010


def hide_folders(folders: dict[Path, str]) -> None:
    """Let C++ be compiled such that `folders` go by other names in it: the text of errors names source files."""
    from torch._inductor import cpp_builder

    flags = cpp_builder._get_shared_cflags

    def with_names(do_link: bool) -> list[str]:
        return [*flags(do_link), *(f"ffile-prefix-map={folder}={name}" for folder, name in folders.items())]

    cpp_builder._get_shared_cflags = with_names


def move_to_fake_gpu(program: ExportedProgram) -> None:
    """Make every tensor of `program`, in place, a CUDA tensor that has no memory, of the program's own fake mode.

    torch's move_to_device_pass would put the weights on a GPU.
    """
    from torch._guards import detect_fake_mode

    mode = detect_fake_mode([node.meta["val"] for node in program.graph.nodes if isinstance(node.meta.get("val"), Tensor)])
    if mode is None:
        raise InternalError("The exported program has no fake tensors; it must come from torch.export.")
    moved: dict[int, tuple[Tensor, Tensor]] = {}  # the old one is kept, or its id may be given to another

    def fake(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) not in moved:  # tied weights stay one tensor
            with mode:
                new = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=DEVICE)
            is_parameter = isinstance(value, torch.nn.Parameter)
            moved[id(value)] = value, torch.nn.Parameter(new, requires_grad=False) if is_parameter else new
        return moved[id(value)][1]

    program._state_dict = {name: fake(value) for name, value in program._state_dict.items()}
    program._constants = {name: fake(value) for name, value in program._constants.items()}
    program._example_inputs = pytree.tree_map(fake, program._example_inputs)
    for module in program.graph_module.modules():
        if isinstance(module, fx.GraphModule):
            for node in module.graph.nodes:
                node.args, node.kwargs = pytree.tree_map(_to_gpu, (node.args, node.kwargs))
                if "val" in node.meta:
                    node.meta["val"] = pytree.tree_map(fake, node.meta["val"])
            module.recompile()


def _to_gpu(argument: Any) -> Any:
    return DEVICE if isinstance(argument, torch.device) and argument.type == "cpu" else argument


def same_tensors_by_identity() -> None:
    """Let Inductor tell constants apart by identity: it would compare addresses, and fake tensors have none."""
    import torch._inductor.graph as graph

    setattr(graph, "is_same_tensor", lambda one, other: one is other)  # noqa: B010
