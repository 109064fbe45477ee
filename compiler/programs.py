"""From the fused step module to an artifact's programs: what each target lowers, and how often each program calls each op.

`cpu` has one program, for any mix of tokens, and a library of C++ ops that it calls. `onnx` has one model, which names places in
the weight file and is therefore written after it. A `cuda` target has, for each GPU arch, a program like the CPU's and one for
steps in which every sequence adds one token: there, launches cost more than work, so neighbouring ops are merged into single
kernels, which are inlined.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from torch import Tensor, fx
from torch.export import ExportedProgram

from oxfuse.compiler.export import StepLimits, export_step
from oxfuse.compiler.fuse import Fused
from oxfuse.compiler.lowering.aoti import Lowered, lower, use_ops
from oxfuse.compiler.phases import Phases
from oxfuse.compiler.plan import Plan
from oxfuse.errors import InternalError
from oxfuse.passes.dump import GraphDumps, op_counts
from oxfuse.passes.fusions.build import OpsBuild, build_ops, cpu_kernels, load_ops
from oxfuse.runtime.manifest import ONNX_CUDA

if TYPE_CHECKING:
    from oxfuse.compiler.lowering.anatomy import Anatomy
    from oxfuse.compiler.lowering.onnx import OnnxModel

DECODE_ROWS = 64
"""Most sequences of a decode program's step: its kernels read a weight once for all rows, in tiles that hold so many."""
Kind = Literal["step", "decode"]


@dataclass(frozen=True, kw_only=True)
class BuiltProgram:
    """One program: its files, the bounds of its dims, its ops by how often the graph calls them, and what a CUDA one holds.

    `onnx` is the model of an ONNX target.
    """

    name: Kind
    target: str
    lowered: Lowered
    limits: StepLimits
    calls: dict[str, int]
    anatomy: Anatomy | None = None
    onnx: OnnxModel | None = None

    @property
    def files(self) -> list[Path]:
        """Return its files; an ONNX model lies among those of other purposes."""
        lowered = self.lowered
        return [lowered.folder / lowered.library] if self.onnx is not None else sorted(lowered.folder.iterdir())


@dataclass(frozen=True, kw_only=True)
class BuiltPrograms:
    """All programs of an artifact, and the library of C++ ops that they call."""

    programs: tuple[BuiltProgram, ...]
    ops: OpsBuild | None

    @property
    def onnx(self) -> OnnxModel | None:
        """Return the model of an ONNX target."""
        return next((program.onnx for program in self.programs if program.onnx is not None), None)

    @property
    def tables(self) -> dict[str, Tensor]:
        """Return weights that the lowering made, by name."""
        return {} if self.onnx is None else self.onnx.tables

    @property
    def constants(self) -> tuple[str, ...]:
        """Return the names of the weights that some program reads."""
        return tuple(sorted({name for program in self.programs for name in program.lowered.constants}))


def build_programs(
    plan: Plan, fuse: Callable[[], Fused], folder: Path, phases: Phases, dumps: GraphDumps | None
) -> tuple[Fused, BuiltPrograms]:
    """Call `fuse`, lower what it returns for the plan's target into `folder`, and return both."""
    builds = {"cpu": _build_cpu, "cuda": _build_cuda, "onnx": _build_onnx}
    return builds[plan.options.device](plan, fuse, folder, phases, dumps)


def _build_cpu(
    plan: Plan, fuse: Callable[[], Fused], folder: Path, phases: Phases, dumps: GraphDumps | None
) -> tuple[Fused, BuiltPrograms]:
    place = folder / "cpu"
    place.mkdir(parents=True)
    with ThreadPoolExecutor(1) as pool:  # g++ works in a process of its own while this one exports
        building = pool.submit(build_ops, cpu_kernels(), plan.level, place / "oxfuse_ops.so")
        with phases("export and fuse"):
            fused = fuse()
            program = _export(plan, fused, fused.step, plan.step_limits, dumps, "step")
        with phases("build C++ ops"):
            ops = building.result()
            load_ops(ops)
            calls = op_counts(program.graph)
            use_ops(program.graph_module, ops)
    with phases("compile program"):
        lowered = lower(program, place / "step", plan.level, ops)
    built = BuiltProgram(name="step", target="cpu", lowered=lowered, limits=plan.step_limits, calls=calls)
    return fused, BuiltPrograms(programs=(built,), ops=ops)


def _build_cuda(
    plan: Plan, fuse: Callable[[], Fused], folder: Path, phases: Phases, dumps: GraphDumps | None
) -> tuple[Fused, BuiltPrograms]:
    from oxfuse.compiler.lowering.cuda import lower_cuda  # Triton and its compiler: nothing for a CPU's compile
    from oxfuse.passes.merge import merge_ops

    with phases("export and fuse"):
        fused = fuse()
    limits: dict[Kind, StepLimits] = {"step": plan.step_limits}
    if plan.task == "text-generation":  # nothing else runs token by token
        rows = min(DECODE_ROWS, plan.limits.max_batch)
        limits["decode"] = dataclasses.replace(plan.step_limits, tokens=rows, sequences=rows)
    built = []
    for kind, bounds in limits.items():
        merged = fx.GraphModule(fused.step, _copy(fused.step.graph))
        merge_ops(merged, fused.cache, kind)
        with phases("export programs"):
            program = _export(plan, fused, merged, bounds, dumps, kind)
            calls = op_counts(program.graph)
        for arch in plan.options.archs:
            with phases(f"compile for sm_{arch}"):
                lowered, anatomy = lower_cuda(program, folder / f"cuda_sm_{arch}" / kind, arch, plan.level)
            _check(anatomy, kind)
            target = f"cuda:sm_{arch}"
            built.append(BuiltProgram(name=kind, target=target, lowered=lowered, limits=bounds, calls=calls, anatomy=anatomy))
    built.sort(key=lambda program: program.target)  # stable: an arch's step program stays before its decode program
    return fused, BuiltPrograms(programs=tuple(built), ops=None)


def _build_onnx(
    plan: Plan, fuse: Callable[[], Fused], folder: Path, phases: Phases, dumps: GraphDumps | None
) -> tuple[Fused, BuiltPrograms]:
    from oxfuse.compiler.lowering.onnx import MODEL, translate
    from oxfuse.passes.onnx_graph import OnnxTarget

    with phases("export and fuse"):
        fused = fuse()
    with phases("translate to ONNX"):
        wanted = OnnxTarget(
            profile="portable" if plan.options.target == "onnx-portable" else "ort",
            provider=cast(Any, plan.options.provider),
            dtype=plan.dtype,
            max_context=plan.limits.max_context,
            experts=cast(Any, plan.options.experts),
            dense=cast(Any, plan.options.dense),
        )
        model = translate(fused, wanted, pooled=plan.pooled)
    # Beside the weights: external data lies in the model's folder or below.
    lowered = Lowered(folder=folder.parent, library=MODEL, constants=model.weights)
    calls = op_counts(fused.step.graph)
    target = plan.options.target if plan.options.provider == "cpu" else ONNX_CUDA
    built = BuiltProgram(name="step", target=target, lowered=lowered, limits=plan.step_limits, calls=calls, onnx=model)
    return fused, BuiltPrograms(programs=(built,), ops=None)


def _check(anatomy: Anatomy, kind: Kind) -> None:
    """Raise InternalError where a program would lose what it writes to a cache, or computes in float64 by mistake."""
    if anatomy.cache_copies:
        raise InternalError(
            f"The {kind} program copies caches, so that what it writes is lost: {', '.join(anatomy.cache_copies)}."
        )
    if wide := [kernel.name for kernel in anatomy.kernels if kernel.float64]:
        raise InternalError(f"Kernels of the {kind} program take float64: {', '.join(wide)}.")


def _copy(graph: fx.Graph) -> fx.Graph:
    copy = fx.Graph()
    copy.output(copy.graph_copy(graph, {}))
    return copy


def _export(
    plan: Plan, fused: Fused, module: fx.GraphModule, limits: StepLimits, dumps: GraphDumps | None, kind: Kind
) -> ExportedProgram:
    one_token = kind == "decode"
    program = export_step(module, fused.cache, block_size=plan.block_size, dtype=plan.dtype, limits=limits, one_token=one_token)
    if dumps is not None:
        dumps(kind, program.module(check_guards=False))
    return program
