"""Makes what `tests/gpu/shipped/` holds: programs of the 20b shape, compiled on a machine without a GPU, to be run on one.

    python -m tests.gpu.ship [--out tests/gpu/shipped] [--arch 90]

An artifact runs with the torch that it was built for: run this in an environment with the GPU machine's torch and triton. Of each
artifact the manifest and the programs are kept. The weights are 4 and 13 GB and follow from a seed (`seeded.py`): the report
makes them there, with the compiler's own writer, and compares hashes.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .checkout import HERE, commit, kernel_sources, use_checkout

if TYPE_CHECKING:
    from .made import Recipe

SHIPPED = HERE / "shipped"
ABOUT = "shipped.json"
FEW, FULL = "few-layers", "all-layers"
LARGEST = 40_000_000
"""Bytes that all that is shipped may have."""
MAX_CONTEXT, MAX_BATCH = 33280, 32
"""What decodes of 32 sequences at 32k tokens need, and room for some more tokens."""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where shipped programs come from. `sources` is `kernel_sources()`; what differs from the checkout's is old."""

    date: str
    commit: str
    sources: str
    torch: str
    triton: str
    python: str
    machine: str
    arch: int
    layers: dict[str, int]
    seed: int
    seconds: dict[str, float]
    bytes: int


def recipe_of(layers: int, arch: int, seed: int = 0) -> Recipe:
    """Return the recipe of the 20b shape with some layers."""
    from .made import Recipe
    from .seeded import shape_20b

    return Recipe(config=shape_20b(layers), target=f"cuda:sm_{arch}", max_context=MAX_CONTEXT, max_batch=MAX_BATCH, seed=seed)


def origin() -> Origin | None:
    """Return where the shipped programs come from, None where there are none."""
    path = SHIPPED / ABOUT
    return Origin(**json.loads(path.read_text("utf-8"))) if path.exists() else None


def folder_bytes(folder: Path) -> int:
    """Return the bytes of a folder's files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@click.command(help=__doc__)
@click.option("--out", type=click.Path(path_type=Path), default=SHIPPED, help="the folder; it is replaced")
@click.option("--arch", type=int, default=90, show_default=True)
@click.option("--few", type=int, default=4, show_default=True, help="layers of the artifact that is run against a native one")
@click.option("--full", type=int, default=24, show_default=True, help="layers of the programs that are timed; 0: none")
@click.option("--seed", type=int, default=0, show_default=True)
def cli(out: Path, arch: int, few: int, full: int, seed: int) -> int:
    """Build, look at the size, and put the new folder in the place of the old one."""
    from .made import WEIGHTS, build

    layers = {FEW: few} | ({FULL: full} if full else {})
    seconds: dict[str, float] = {}
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".shipped-", dir=out.parent) as place:
        made = Path(place) / "shipped"
        for name, count in layers.items():
            click.echo(f"{name}: {count} layers for sm_{arch}")
            began = time.monotonic()
            # Of few layers the file is written, so that all hashes are the writer's; of all layers that would only take time.
            build(recipe_of(count, arch, seed), made / name, weights=name == FEW)
            (made / name / WEIGHTS).unlink(missing_ok=True)
            seconds[name] = round(time.monotonic() - began, 1)
            click.echo(f"  {seconds[name]:.0f} s, {folder_bytes(made / name):,} bytes")
        size = folder_bytes(made)
        if size > LARGEST:
            raise click.ClickException(f"{size:,} bytes are more than {LARGEST:,}: ship fewer layers.")
        about = Origin(
            date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
            commit=commit(),
            sources=kernel_sources(),
            torch=importlib.metadata.version("torch"),
            triton=importlib.metadata.version("triton"),
            python=platform.python_version(),
            machine=f"{platform.machine()}, glibc {platform.libc_ver()[1]}",
            arch=arch,
            layers=layers,
            seed=seed,
            seconds=seconds,
            bytes=size,
        )
        (made / ABOUT).write_text(json.dumps(asdict(about), indent=1) + "\n", "utf-8")
        if out.exists():
            shutil.rmtree(out)
        made.rename(out)
    click.echo(f"{out}: {size:,} bytes")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    try:
        code: int | None = cli.main(
            list(sys.argv[1:] if arguments is None else arguments), "tests.gpu.ship", standalone_mode=False
        )
    except click.ClickException as error:
        error.show()
        return error.exit_code
    return code or 0


if __name__ == "__main__":
    use_checkout()
    sys.exit(main())
