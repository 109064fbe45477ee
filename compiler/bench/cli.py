"""The command `bench`: results go to stdout and the files that were asked for, progress to stderr."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from oxfuse.errors import UserError
from oxfuse.runtime.help_page import FILE, FOLDER, HelpPage, option
from oxfuse.runtime.manifest import read_manifest

if TYPE_CHECKING:
    from oxfuse.compiler.bench.speed import Plan, SpeedResult
    from oxfuse.compiler.phases import Progress


@click.command(
    cls=HelpPage,
    examples=(
        "oxfuse bench DIR",
        "oxfuse bench DIR --prompt 128 --prompt 2048 --context 4000",
        "oxfuse bench DIR --peers --source CHECKPOINT     # and transformers, turn by turn",
        "oxfuse bench --peers --plot speed.png            # layers of gpt-oss-20b's shape with random weights",
    ),
)
@click.argument("folder", metavar="[DIR]", type=FOLDER, required=False)
@option("--peers", is_flag=True, section="Model", help="Measure transformers too, turn by turn in the same run.")
@option("--source", type=FOLDER, section="Model", help="The checkpoint that DIR was compiled from, for the peers.")
@option("--layers", default=2, show_default=True, metavar="N", section="Model", help="Without DIR: layers of the random model.")
@option("--vocabulary", default=32000, show_default=True, metavar="N", section="Model", help="Without DIR: its tokens.")
@option("--work", type=FOLDER, section="Model", help="Without DIR: where it is made, and kept; else a temporary folder.")
@option("--prompt", "prompts", multiple=True, type=int, metavar="N", section="Run", help="Tokens of a prefill, 512 by default.")
@option("--context", "contexts", multiple=True, type=int, metavar="N", section="Run", help="Tokens before decoding, 1000.")
@option("--tokens", default=16, show_default=True, metavar="N", section="Run", help="Tokens decoded a turn.")
@option("--rounds", default=7, show_default=True, metavar="N", section="Run", help="Turns; the median counts.")
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
    layers: int,
    vocabulary: int,
    work: Path | None,
    threads: int | None,
    json_path: Path | None,
    markdown: Path | None,
    plot: Path | None,
    **plan: Any,
) -> None:
    """Measure prefill and decode of the artifact in DIR, or of a random model, beside the floor that the machine sets.

    A sample during which other processes used the machine is taken again, and counted. The peers need oxfuse[bench].
    """
    from oxfuse.compiler.bench import speed
    from oxfuse.runtime.machine import processors
    from oxfuse.runtime.progress import PhaseLine

    given = {name: value for name, value in plan.items() if value != ()}
    chosen = speed.Plan(threads=processors().threads if threads is None else threads, **given)
    if folder is not None:
        chosen = speed.fitted(chosen, read_manifest(folder).limits.max_context, keep=given)
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
