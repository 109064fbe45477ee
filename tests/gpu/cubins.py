"""What every kernel needs of a GPU, for each arch, read from its machine code: no GPU is needed for that, and none is asked.

    python -m tests.gpu.cubins [--out tests/gpu/results] [--processes 2]

Launch functions run on tensors without values at the shapes of `kernels.py`, and what they would launch is compiled. The table is
checked in, so that a kernel which begins to need more shows as a difference; `test_cubins.py` wants it to be of the kernels of
this checkout.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click

from .checkout import HERE, kernel_sources, use_checkout
from .document import table

NAME = "cubins"
TENSOR_CORES = re.compile(r"\b(HGMMA|UTC[A-Z]*MMA|HMMA)\b")
"""Instructions of the tensor cores: warpgroups' (sm_90), those of tensor memory (sm_100), a warp's (sm_80 and later)."""


@dataclass(frozen=True, kw_only=True)
class Cubin:
    """One kernel as one call launches it on one arch; bytes are a block's, registers a thread's.

    `float64` names parameters that are passed as such; `tensor_cores` are the instructions that its machine code has of them.
    """

    op: str
    case: str
    kernel: str
    arch: int
    warps: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    tensor_cores: str
    float64: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Table:
    """All cubins, and what they were made of and by."""

    sources: str
    triton: str
    cubins: tuple[Cubin, ...]

    @classmethod
    def read(cls, folder: Path) -> Table:
        """Return the table that `write` left in a folder."""
        data = json.loads((folder / f"{NAME}.json").read_text("utf-8"))
        cubins = tuple(Cubin(**{**row, "float64": tuple(row["float64"])}) for row in data.pop("cubins"))
        return cls(**data, cubins=cubins)

    def write(self, folder: Path) -> None:
        """Write the table as JSON and as Markdown."""
        folder.mkdir(parents=True, exist_ok=True)
        rows = ",\n".join(f"  {json.dumps(asdict(cubin), ensure_ascii=False)}" for cubin in self.cubins)
        head = f'{{\n "sources": "{self.sources}",\n "triton": "{self.triton}",\n "cubins": [\n'
        (folder / f"{NAME}.json").write_text(f"{head}{rows}\n ]\n}}\n", "utf-8")
        (folder / f"{NAME}.md").write_text("\n".join(self._lines()) + "\n", "utf-8")

    def _lines(self) -> Iterator[str]:
        yield "# Machine code of the kernels"
        yield ""
        yield (
            f"Compiled by triton {self.triton} without a GPU, at the shapes of the released models and at edges: "
            "`python -m tests.gpu.cubins`. Nothing here was executed; `python -m tests.gpu.report` does that on a GPU, and "
            "writes beside this file. Registers are a thread's, of 255; shared memory is a block's, in bytes."
        )
        for arch in sorted({cubin.arch for cubin in self.cubins}):
            columns = ["kernel", "op", "call", "warps", "registers", "spilled", "shared", "tensor cores"]
            rows = [
                [c.kernel, c.op, c.case, c.warps, c.registers, c.spill_bytes, c.shared_bytes, c.tensor_cores]
                for c in self.cubins
                if c.arch == arch
            ]
            yield ""
            yield f"## sm_{arch}"
            yield ""
            yield from table(columns, rows)


def cubins_of(number: int, arch: int) -> list[tuple[str, Cubin]]:
    """Compile what call `number` of `kernels.calls()` launches on an arch; each comes with what tells it from others."""
    from oxfuse.compiler.lowering.kernels import Launches, compile_launch

    from .calls import OPS
    from .inputs import Maker
    from .kernels import calls

    call, launches = calls()[number], Launches()
    OPS[call.op].launch(launches.wrap, call.args(Maker("meta")), arch)
    found = []
    for launch in launches.made:
        binary = compile_launch(launch, arch)
        cubin = Cubin(
            op=call.op,
            case=call.name,
            kernel=launch.name,
            arch=arch,
            warps=launch.options["num_warps"],
            registers=binary.registers,
            spill_bytes=binary.spill_bytes,
            shared_bytes=binary.shared_bytes,
            tensor_cores=", ".join(sorted({*TENSOR_CORES.findall(binary.sass())})),
            float64=tuple(name for name, kind in launch.signature.items() if kind == "fp64"),
        )
        found.append((repr((launch.name, arch, launch.signature, launch.constants, launch.aligned, launch.options)), cubin))
    return found


def make_table(archs: Sequence[int], processes: int) -> Table:
    """Compile everything; of calls that launch the same code the first stands for all."""
    from .kernels import calls

    count = len(calls())
    cubins = dict[str, Cubin]()
    # Forked: a new process could not import this package, which has been made out of a folder, and nothing runs here yet.
    with ProcessPoolExecutor(processes, mp_context=get_context("fork")) as pool:
        for arch in archs:
            for found in pool.map(partial(cubins_of, arch=arch), range(count)):
                for key, cubin in found:
                    cubins.setdefault(key, cubin)
    order = sorted(cubins.values(), key=lambda cubin: (cubin.arch, cubin.kernel))  # stable: calls keep their order
    return Table(sources=kernel_sources(ops=False), triton=importlib.metadata.version("triton"), cubins=tuple(order))


@click.command(help=__doc__)
@click.option("--out", type=click.Path(path_type=Path), default=HERE / "results", help="folder of the table")
@click.option("--processes", type=int, default=2, show_default=True)
def cli(out: Path, processes: int) -> int:
    """Make the table."""
    from oxfuse.compiler.lowering.kernels import SHARED_MEMORY

    made = make_table(sorted(SHARED_MEMORY), processes)
    made.write(out)
    spilled = sum(cubin.spill_bytes > 0 for cubin in made.cubins)
    click.echo(f"{out / NAME}.md: {len(made.cubins)} kernels, {spilled} of them spill")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    given: list[str] = list(sys.argv[1:] if arguments is None else arguments)
    code: Any = cli.main(given, "tests.gpu.cubins", standalone_mode=False)
    return code or 0


if __name__ == "__main__":
    use_checkout()
    sys.exit(main())
