"""How long a program of the 20b shape takes to compile, phase by phase: no weight exists, none is read.

    python -m oxfuse.compiler.bench.compile_time [--layers 24] [--json FILE]

The bar is 4 minutes a program for 24 layers on two cores. Foreign load is stated beside the figures, since it stretches them.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import click
import torch

from oxfuse.compiler.bench.random_checkpoint import SHAPE_20B
from oxfuse.compiler.export import StepLimits, export_step
from oxfuse.compiler.fuse import fuse
from oxfuse.compiler.lowering.aoti import lower, use_ops
from oxfuse.compiler.options import BLOCK_SIZES, MAX_STEP_TOKENS
from oxfuse.compiler.phases import Phases
from oxfuse.models.contract import lookup
from oxfuse.models.virtual import virtual_model
from oxfuse.passes.fusions.build import build_ops, cpu_kernels, load_ops
from oxfuse.passes.fusions.isa import resolve_isa
from oxfuse.passes.pack import Packing
from oxfuse.passes.weights import Encoding


def measure_compile(layers: int) -> dict[str, object]:
    """Compile the step program of `layers` layers at the 20b shape, bfloat16 with MXFP4 experts; return the figures."""
    contract = lookup(SHAPE_20B["model_type"])
    config = contract.parse_config({**SHAPE_20B, "num_hidden_layers": layers})
    level, _ = resolve_isa("native")
    phases, load = Phases(), os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as scratch:
        with phases("build reference"):
            model = virtual_model(contract, config, contract.default_task, torch.bfloat16)
            names = [name for name, _ in model.named_parameters()]
            encodings: dict[str, Encoding] = {name: "mxfp4" for name in names if name.endswith("experts.gate_up_proj")}
            encodings |= {name: "mxfp4" for name in names if name.endswith("experts.down_proj")}
        with phases("export and fuse"):
            fused = fuse(model, encodings, requested=contract.fusions, packing=Packing())
        with phases("export step"):
            limits = StepLimits(tokens=MAX_STEP_TOKENS, sequences=8, table=config.max_position_embeddings // BLOCK_SIZES["cpu"])
            program = export_step(fused.step, fused.cache, block_size=BLOCK_SIZES["cpu"], dtype=torch.bfloat16, limits=limits)
        with phases("build C++ ops"):
            ops = build_ops(cpu_kernels(), level, Path(scratch) / "ops.so")
            load_ops(ops)
            use_ops(program.graph_module, ops)
        with phases("compile program"):
            lowered = lower(program, Path(scratch) / "step", level, ops)
        size = sum(path.stat().st_size for path in lowered.folder.iterdir()) + ops.path.stat().st_size
    return {
        "layers": layers,
        "seconds": {name: round(s, 1) for name, s in phases.seconds.items()},
        "total_seconds": round(sum(phases.seconds.values()), 1),
        "program_bytes": size,
        "graph_nodes": len(fused.step.graph.nodes),
        "load_average_before": load,
        "cores": os.cpu_count(),
        "torch": torch.__version__,
    }


@click.command()
@click.option("--layers", default=24, show_default=True)
@click.option("--json", "path", type=click.Path(path_type=Path))
def main(layers: int, path: Path | None) -> None:
    """Print the figures as JSON, and write them to a file if asked."""
    text = json.dumps(measure_compile(layers), indent=1)
    click.echo(text)
    if path is not None:
        path.write_text(text + "\n")


if __name__ == "__main__":
    main()
