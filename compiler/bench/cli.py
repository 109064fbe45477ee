"""The command `bench`: results go to stdout and the files that were asked for, progress to stderr."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from oxfuse.errors import UserError

if TYPE_CHECKING:
    from oxfuse.compiler.bench.speed import Plan, SpeedResult
    from oxfuse.compiler.phases import Progress

PATH = click.Path(path_type=Path)
EPILOG = """\b
Examples:
  oxfuse bench gpt-oss-20b-cpu                               an artifact alone
  oxfuse bench gpt-oss-20b-cpu --peers --source gpt-oss-20b  and transformers on the same checkpoint
  oxfuse bench --peers --plot speed.png                      layers of gpt-oss-20b's shape with random weights
"""


@click.command(epilog=EPILOG)
@click.argument("folder", metavar="[DIR]", type=PATH, required=False)
@click.option("--peers", is_flag=True, help="Measure transformers too, turn by turn in the same run.")
@click.option("--source", type=PATH, help="The checkpoint that DIR was compiled from, for the peers.")
@click.option("--layers", default=2, show_default=True, help="Without DIR: layers of the random model.")
@click.option("--vocabulary", default=32000, show_default=True, help="Without DIR: tokens of the random model.")
@click.option("--work", type=PATH, help="Without DIR: where checkpoint and artifact are made, and kept; else a temporary folder.")
@click.option("--prompt", "prompts", multiple=True, type=int, default=(512,), show_default=True, help="Tokens of a prefill.")
@click.option(
    "--context", "contexts", multiple=True, type=int, default=(1000,), show_default=True, help="Tokens before decoding."
)
@click.option("--tokens", default=16, show_default=True, help="Tokens decoded a turn.")
@click.option("--rounds", default=7, show_default=True, help="Turns; the median counts.")
@click.option("--threads", type=int, help="Threads to compute with; by default all cores that this process may use.")
@click.option("--wait", default=30.0, show_default=True, help="Seconds to wait for a quiet machine before a turn.")
@click.option("--json", "json_path", type=PATH, metavar="FILE", help="Write all samples as JSON, or - for standard output.")
@click.option("--markdown", type=PATH, metavar="FILE", help="Write the table as Markdown.")
@click.option("--plot", type=PATH, metavar="FILE", help="Draw the result, as FILE.png.")
def bench(
    folder: Path | None,
    peers: bool,
    source: Path | None,
    layers: int,
    vocabulary: int,
    work: Path | None,
    threads: int | None,
    json_path: Path | None,
    markdown: Path | None,
    plot: Path | None,
    **plan: Any,
) -> None:
    """Measure prefill and decode of the artifact in DIR, or of a random model, beside the floor that the machine sets."""
    from oxfuse.compiler.bench import speed
    from oxfuse.runtime.machine import processors
    from oxfuse.runtime.progress import PhaseLine

    chosen = speed.Plan(threads=processors().threads if threads is None else threads, **plan)
    if folder is not None and peers and source is None:
        raise UserError("--peers needs the checkpoint: name it with --source, a folder.")
    if folder is None and source is not None:
        raise UserError("--source is the checkpoint of an artifact: name the artifact as well.")
    with ExitStack() as stack:
        progress = stack.enter_context(PhaseLine())
        if folder is None:
            place = work or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="oxfuse-bench-")))
            folder, source = _random_artifact(place, layers, vocabulary, chosen, progress)
        result = speed.measure_speed(folder, chosen, checkpoint=source if peers else None, progress=progress)
    _write(result, json_path, markdown, plot)
    if json_path != Path("-"):
        for line in speed.result_lines(result):
            click.echo(line)
        for name, reason in result.missing.items():
            click.echo(f"{name} was not measured: {reason}", err=True)
        if dirty := sum(figure.discarded for figure in result.figures):
            click.echo(f"{dirty} samples were discarded: other processes used the machine meanwhile.", err=True)


def _random_artifact(place: Path, layers: int, vocabulary: int, plan: Plan, progress: Progress) -> tuple[Path, Path]:
    """Return the artifact and the checkpoint in `place`, made there unless an earlier run left them; both go by their sizes."""
    from oxfuse.compiler.bench.random_checkpoint import write_checkpoint
    from oxfuse.compiler.pipeline import compile as compile_checkpoint

    if layers < 1 or vocabulary < 1:
        raise UserError(f"--layers is {layers} and --vocabulary {vocabulary}: give numbers of at least 1.")
    checkpoint = place / f"random-gpt-oss-{layers}-layers-{vocabulary}"
    artifact = place / f"{checkpoint.name}-cpu"
    if not (checkpoint / "model.safetensors").exists():
        progress("writing a random checkpoint", None)
        write_checkpoint(checkpoint, layers, vocab_size=vocabulary)
    compile_checkpoint(checkpoint, artifact, max_context=plan.longest, force=True, progress=progress)
    return artifact, checkpoint


def _write(result: SpeedResult, json_path: Path | None, markdown: Path | None, plot: Path | None) -> None:
    for path, text in ((json_path, result.to_json()), (markdown, result.to_markdown())):
        if path == Path("-"):
            click.echo(text, nl=False)
        elif path is not None:
            try:
                path.write_text(text, "utf-8")
            except OSError as error:
                raise UserError(f"{path} cannot be written: {error}.") from error
    if plot is not None:
        from oxfuse.compiler.bench.chart import draw_speed

        draw_speed(result, plot)
