"""The command `bench`: results go to stdout and the files that were asked for, progress to stderr."""

from __future__ import annotations

import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from oxfuse.compiler.bench.engines import ENGINES, EngineSpec
from oxfuse.errors import UserError
from oxfuse.runtime.help_page import FILE, FOLDER, HelpPage, one_of, option
from oxfuse.runtime.manifest import read_manifest

if TYPE_CHECKING:
    from oxfuse.compiler.bench.contenders import Contender
    from oxfuse.compiler.bench.grid import GridPlan
    from oxfuse.compiler.bench.grid_result import GridResult
    from oxfuse.compiler.bench.speed_result import SpeedResult
    from oxfuse.compiler.phases import Progress

LAYERS, PEER_LAYERS = 2, 4
NAMES = tuple(spec.key for spec in ENGINES)
ROTATION = {
    "rope_type": "yarn",
    "rope_theta": 150000.0,
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": True,
    "original_max_position_embeddings": 4096,
}
"""The released models' but for `truncate`: llama.cpp rounds the ends of YaRN's ramp whatever the file says, and the engines are
to compute the same."""
PEER_SIZES: dict[str, Any] = {"prompts": (512, 4096), "contexts": (128, 4096)}
MAX_BATCH = 8  # what compile does by itself
GRID_ONLY = ("dtypes", "batches", "sequences", "training", "inference", "flavour_name", "budget", "eager", "cell_seconds")
NOT_GRID = ("folder", "peers", "source", "vocabulary", "prompts", "contexts")
PEERS_ONLY = ("llama", "build", "only", "skip", "reuse", "footprint")


@click.command(
    cls=HelpPage,
    examples=(
        "oxfuse bench DIR",
        "oxfuse bench DIR --prompt 128 --prompt 2048 --context 4000",
        "oxfuse bench DIR --peers --source CHECKPOINT     # and transformers and llama.cpp, turn by turn",
        "oxfuse bench --peers --build-llama --work WORK --plot speed.png     # layers of gpt-oss-20b's shape, exact and not",
        "oxfuse bench --peers --llama VENV/bin/python --work WORK --reuse --only oxfuse-int8 --only llama-bf16",
        "oxfuse bench --grid --budget 7200 --markdown grid.md --json grid.json --plot grid.png",
        "oxfuse bench --grid --dtype bfloat16 --batch 1 --sequence 512 --no-training",
    ),
)
@click.argument("folder", metavar="[DIR]", type=FOLDER, required=False)
@option("--peers", is_flag=True, section="Model", help="Measure llama.cpp and transformers too, turn by turn in the same run.")
@option("--source", type=FOLDER, section="Model", help="The checkpoint that DIR was compiled from, for the peers.")
@option("--layers", type=int, metavar="N", section="Model", help="Without DIR: layers of the random model, 2, with peers 4.")
@option("--vocabulary", default=32000, show_default=True, metavar="N", section="Model", help="Without DIR: its tokens.")
@option("--work", type=FOLDER, section="Model", help="Where what is made is kept, for a later run; else a temporary folder.")
@option(
    "--prompt",
    "prompts",
    multiple=True,
    type=int,
    metavar="N",
    section="Run",
    help="Tokens of a prefill, 512; with peers 4096, too.",
)
@option(
    "--context",
    "contexts",
    multiple=True,
    type=int,
    metavar="N",
    section="Run",
    help="Tokens before decoding, 1000; with peers 128, 4096.",
)
@option("--tokens", type=int, metavar="N", section="Run", help="Tokens decoded a round, 64; with --grid 16.")
@option("--rounds", default=7, show_default=True, metavar="N", section="Run", help="Rounds; medians count.")
@option("--llama", type=FILE, metavar="PYTHON", section="Peers", help="An interpreter that has llama-cpp-python.")
@option("--build-llama", "build", is_flag=True, section="Peers", help="Build it first where there is none, in about 10 minutes.")
@option("--only", multiple=True, metavar="ENGINE", section="Peers", shell_complete=one_of(*NAMES), help=f"Of {', '.join(NAMES)}.")
@option("--skip", multiple=True, metavar="ENGINE", section="Peers", shell_complete=one_of(*NAMES), help="All engines but this.")
@option("--reuse", is_flag=True, section="Peers", help="Take artifacts that an earlier run left in --work as they are.")
@option("--footprint/--no-footprint", default=True, section="Peers", help="Memory and first token; measured by default.")
@option(
    "--grid", is_flag=True, section="Grid", help="Measure batches by sequences beside transformers' eager and SDPA attention."
)
@option(
    "--flavour", "flavour_name", default="pythia-410m", show_default=True, metavar="NAME", section="Grid", help="Whose shape."
)
@option("--batch", "batches", multiple=True, type=int, metavar="N", section="Grid", help="Sequences at once; 1, 2 and 4.")
@option("--sequence", "sequences", multiple=True, type=int, metavar="N", section="Grid", help="Their tokens; 128, 256, ... 2048.")
@option(
    "--dtype",
    "dtypes",
    multiple=True,
    metavar="DTYPE",
    section="Grid",
    shell_complete=one_of("float32", "bfloat16"),
    help="float32 or bfloat16; both by default.",
)
@option("--inference/--no-inference", default=True, section="Grid", help="Prefill and decode; measured by default.")
@option("--training/--no-training", default=True, section="Grid", help="Forward and backward; measured by default.")
@option("--eager/--no-eager", default=True, section="Grid", help="transformers' eager attention; measured by default.")
@option("--cell-seconds", type=float, metavar="S", section="Grid", help="Without a budget: for the rounds of a cell, 60.")
@option("--budget", type=float, metavar="S", section="Grid", help="Seconds for it all: fewer rounds, then fewer cells.")
@option("--threads", type=int, metavar="N", section="Run", help="Threads; by default as many as this process may use.")
@option("--wait", default=60.0, show_default=True, metavar="S", section="Run", help="Longest wait for a quiet machine, in all.")
@option(
    "--json", "json_path", type=FILE, metavar="FILE", section="Output", help="Write all samples as JSON; - is standard output."
)
@option("--markdown", type=FILE, metavar="FILE", section="Output", help="Write the table as Markdown.")
@option("--plot", type=FILE, metavar="FILE", section="Output", help="Draw the result, as FILE.png.")
def bench(
    folder: Path | None,
    peers: bool,
    source: Path | None,
    layers: int | None,
    vocabulary: int,
    work: Path | None,
    llama: Path | None,
    build: bool,
    only: tuple[str, ...],
    skip: tuple[str, ...],
    reuse: bool,
    footprint: bool,
    grid: bool,
    flavour_name: str,
    batches: tuple[int, ...],
    sequences: tuple[int, ...],
    dtypes: tuple[str, ...],
    inference: bool,
    training: bool,
    eager: bool,
    cell_seconds: float | None,
    budget: float | None,
    threads: int | None,
    json_path: Path | None,
    markdown: Path | None,
    plot: Path | None,
    **plan: Any,
) -> None:
    """Measure prefill and decode of the artifact in DIR, or of a random model, beside the floor that the machine sets.

    A sample during which other processes used the machine is taken again, and counted. The peers need oxfuse[bench], and
    llama.cpp an interpreter with llama-cpp-python. With --grid, measure a model of random weights over batches and sequences,
    inference and training, beside transformers.
    """
    _refuse_mixture(click.get_current_context(), grid, peers)
    if grid:
        cells = {"dtypes": dtypes, "batches": batches, "sequences": sequences}
        parts = tuple(name for name, wanted in (("inference", inference), ("training", training)) if wanted)
        options = {name: value for name, value in cells.items() if value} | {"parts": parts, "budget": budget, "threads": threads}
        options |= {"peers": ("eager",) * eager + ("sdpa",)}
        options |= {"cell_seconds": cell_seconds} if cell_seconds is not None else {}
        options |= {name: plan[name] for name in ("tokens", "rounds", "wait") if plan[name] is not None}
        found = _measure_grid(flavour_name, layers, work, options)
        from oxfuse.compiler.bench.chart import draw_grid

        _write(found, json_path, markdown)
        if plot is not None:
            draw_grid(found, plot)
        if Path("-") not in (json_path, markdown):
            click.echo(found.to_markdown(), nl=False)
        return
    from oxfuse.compiler.bench import speed
    from oxfuse.runtime.machine import processors
    from oxfuse.runtime.progress import PhaseLine

    given = {name: value for name, value in plan.items() if value not in ((), None)}
    sizes = PEER_SIZES if peers else {}
    chosen = speed.Plan(threads=processors().threads if threads is None else threads, **{**sizes, **given})
    if folder is not None:
        chosen = speed.fitted(chosen, read_manifest(folder).limits.max_context, keep=given)
    if folder is not None and peers and source is None:
        raise UserError("--peers needs the checkpoint: name it with --source, a folder.")
    if folder is None and source is not None:
        raise UserError("--source is the checkpoint of an artifact: name the artifact as well.")
    with ExitStack() as stack:
        progress = stack.enter_context(PhaseLine())
        place = work or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="oxfuse-bench-")))
        wanted = _wanted(folder, peers, only, skip)
        missing: dict[str, str] = {}
        if folder is None:
            source = _random_checkpoint(
                place, (PEER_LAYERS if peers else LAYERS) if layers is None else layers, vocabulary, progress
            )
        contenders, missing = _contenders(folder, source, place, wanted, chosen.longest, reuse, progress)
        if source is not None and peers:
            others, reasons = _peers(contenders, source, place, wanted, chosen.longest, llama, build, progress)
            contenders, missing = contenders + others, missing | reasons
        result = speed.measure_speed(
            contenders, chosen, missing=missing, wanted=wanted, with_footprints=peers and footprint, progress=progress
        )
    _write(result, json_path, markdown)
    if plot is not None:
        from oxfuse.compiler.bench.chart import draw_speed

        draw_speed(result, plot)
    if json_path != Path("-"):
        for line in speed.result_lines(result):
            click.echo(line)
        for key, reason in result.missing.items():
            click.echo(f"{result.engines[key].title} was not measured: {reason}", err=True)
        if result.discarded:
            click.echo(f"{result.discarded} samples were discarded: other processes used the machine meanwhile.", err=True)


def _refuse_mixture(context: click.Context, grid: bool, peers: bool) -> None:
    """Raise UserError for options that do not go with --grid, or only with it or with --peers."""
    given = [
        parameter
        for parameter in context.command.params
        if parameter.name and context.get_parameter_source(parameter.name) is ParameterSource.COMMANDLINE
    ]
    wrong = next((p for p in given if p.name in (NOT_GRID if grid else GRID_ONLY)), None)
    if wrong is not None:
        name = "DIR" if isinstance(wrong, click.Argument) else wrong.opts[0]
        raise UserError(f"{name} does not go with --grid: leave one of them out." if grid else f"{name} is for --grid: add it.")
    wrong = next((p for p in given if p.name in PEERS_ONLY), None)
    if wrong is not None and not peers:
        raise UserError(f"{wrong.opts[0]} is for --peers: add it.")


def _wanted(folder: Path | None, peers: bool, only: tuple[str, ...], skip: tuple[str, ...]) -> tuple[EngineSpec, ...]:
    """Return the engines that are to be measured: of a given artifact, the one that it is."""
    from oxfuse.compiler.bench.contenders import spec_of
    from oxfuse.compiler.bench.engines import OURS, PEERS, VARIANTS, chosen

    own = VARIANTS if folder is None else (spec_of(read_manifest(folder)),)
    if not peers:
        return own if folder is not None else tuple(spec for spec in own if spec.key == OURS)
    return chosen((*own, *PEERS), only, skip)


def _contenders(
    folder: Path | None,
    source: Path | None,
    place: Path,
    wanted: tuple[EngineSpec, ...],
    longest: int,
    reuse: bool,
    progress: Progress,
) -> tuple[list[Contender], dict[str, str]]:
    """Return the artifact in `folder`, or those that are compiled from `source`, and why some are missing."""
    from oxfuse.compiler.bench.contenders import compile_variants, of_artifact

    own = [spec for spec in wanted if spec.kind == "oxfuse"]
    if folder is not None:
        return [of_artifact(own[0], folder, required=True)], {}
    assert source is not None
    made, missing = compile_variants(source, place, own, longest, progress, again=not reuse)
    return [of_artifact(spec, made[spec.key]) for spec in own if spec.key in made], missing


def _peers(
    contenders: list[Contender],
    source: Path,
    place: Path,
    wanted: tuple[EngineSpec, ...],
    longest: int,
    llama: Path | None,
    build: bool,
    progress: Progress,
) -> tuple[list[Contender], dict[str, str]]:
    """Return the peers that can run the checkpoint in `source`, and why others cannot."""
    from oxfuse.compiler.bench.contenders import of_llama, of_transformers
    from oxfuse.compiler.bench.cost import cost_of
    from oxfuse.compiler.bench.llama import build_llama, find_llama

    cost = cost_of(read_manifest(contenders[0].path))
    found = [of_transformers(spec, source, cost) for spec in wanted if spec.kind == "transformers"]
    missing: dict[str, str] = {}
    if specs := [spec for spec in wanted if spec.kind == "llama"]:
        try:
            python = build_llama(progress=progress) if build and llama is None else find_llama(llama)
            found = [of_llama(spec, source, place, python, cost, longest, progress) for spec in specs] + found
        except UserError as error:
            missing = {spec.key: str(error) for spec in specs}
    return found, missing


def _measure_grid(name: str, layers: int | None, work: Path | None, options: dict[str, Any]) -> GridResult:
    """Measure the grid of a flavour, with its checkpoint and artifacts in `work`, or in a temporary folder."""
    from oxfuse.compiler.bench import grid
    from oxfuse.models.contract import flavour
    from oxfuse.runtime.machine import processors
    from oxfuse.runtime.progress import PhaseLine

    began = time.perf_counter()
    plan = grid.GridPlan(**{**options, "threads": processors().threads if options["threads"] is None else options["threads"]})
    config = flavour(name)
    shape = name if layers is None else f"{name}, {layers} layers"
    with ExitStack() as stack:
        progress = stack.enter_context(PhaseLine())
        place = work or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="oxfuse-bench-")))
        checkpoint, artifacts = _grid_artifacts(place, name, config, layers, plan, progress)
        return grid.measure_grid(plan, shape, checkpoint, artifacts, began=began, progress=progress)


def _grid_artifacts(
    place: Path, name: str, config: dict[str, Any], layers: int | None, plan: GridPlan, progress: Progress
) -> tuple[Path, dict[str, Path]]:
    """Return the checkpoint, made unless an earlier run left it, and for inference its artifact in each dtype, always made."""
    from oxfuse.compiler.bench.random_checkpoint import write_checkpoint
    from oxfuse.compiler.pipeline import compile as compile_checkpoint
    from oxfuse.models.contract import lookup

    if layers is not None and layers < 1:
        raise UserError(f"--layers is {layers}: give a number of at least 1.")
    parsed = lookup(config["model_type"]).parse_config(config)
    count, context = layers or parsed.num_hidden_layers, max(parsed.max_position_embeddings, plan.longest)
    checkpoint = place / f"random-{name}-{count}-layers-{context}"
    if not (checkpoint / "model.safetensors").exists():
        progress("writing a random checkpoint", None)
        write_checkpoint(checkpoint, count, **{**config, "max_position_embeddings": context})
    artifacts = {}
    for dtype in dict.fromkeys(plan.dtypes) if "inference" in plan.parts else ():
        artifacts[dtype] = place / f"{checkpoint.name}-{dtype}-cpu"
        compile_checkpoint(
            checkpoint,
            artifacts[dtype],
            dtype=dtype,
            max_context=plan.longest,
            max_batch=max(MAX_BATCH, *plan.batches),
            force=True,
            progress=progress,
        )
    return checkpoint, artifacts


def _random_checkpoint(place: Path, layers: int, vocabulary: int, progress: Progress) -> Path:
    """Return a random checkpoint, made unless an earlier run left it; it goes by its sizes."""
    from oxfuse.compiler.bench.random_checkpoint import write_checkpoint

    if layers < 1 or vocabulary < 1:
        raise UserError(f"--layers is {layers} and --vocabulary {vocabulary}: give numbers of at least 1.")
    checkpoint = place / f"random-gpt-oss-{layers}-layers-{vocabulary}"
    if not (checkpoint / "model.safetensors").exists():
        progress("writing a random checkpoint", None)
        write_checkpoint(checkpoint, layers, vocab_size=vocabulary, rope_parameters=ROTATION)
    return checkpoint


def _write(result: SpeedResult | GridResult, json_path: Path | None, markdown: Path | None) -> None:
    for path, made in ((json_path, result.to_json), (markdown, result.to_markdown)):
        if path is None:
            continue
        text = made()  # one by one: a run of half an hour is not lost to a fault in how one of them is told
        if path == Path("-"):
            click.echo(text, nl=False)
        else:
            try:
                path.write_text(text, "utf-8")
            except OSError as error:
                raise UserError(f"{path} cannot be written: {error}.") from error
