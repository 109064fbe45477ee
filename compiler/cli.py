"""The commands that need the compiler: compile, quickstart and doctor. Results go to stdout, progress to stderr."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shlex
import signal
import time
from collections.abc import Callable, Iterator
from importlib.resources import as_file, files
from pathlib import Path
from types import FrameType
from typing import Any

import click

from oxfuse.compiler.choices import DTYPE_NAMES, EXAMPLES, POLICIES, TARGETS
from oxfuse.compiler.report import REPORT_JSON, REPORT_MD, best_of, trial
from oxfuse.errors import UserError
from oxfuse.runtime.help_page import FOLDER, HelpPage, folders, one_of, option
from oxfuse.runtime.manifest import read_manifest
from oxfuse.runtime.progress import PhaseLine
from oxfuse.runtime.units import count_text, size_text

BUNDLED = "tiny-gpt-oss"
PROMPT = "def read_file(path):"
COLORS = {"ok": "green", "warning": "yellow", "missing": "red"}


@click.command(
    cls=HelpPage,
    examples=(
        "oxfuse compile openai/gpt-oss-20b -o gpt-oss-20b-cpu",
        "oxfuse compile openai/gpt-oss-20b@main -o short --max-context 8192 --max-batch 1",
        "oxfuse compile ./checkpoint -o artifact --dtype float32 --force",
        "oxfuse compile ./checkpoint -o portable --cpu-isa x86-64-v3      # runs on processors from 2013 on",
        "oxfuse compile ./checkpoint -o for-h100 --target cuda:sm_90      # no GPU need be here",
        "oxfuse compile ./checkpoint -o artifact --dump-graphs graphs     # every pass as text and picture",
    ),
)
@click.argument("source", metavar="SRC", shell_complete=folders)
@option("-o", "--output", required=True, type=FOLDER, section="Output", help="The artifact's folder; it may exist when empty.")
@option("--force", is_flag=True, section="Output", help="Replace an artifact that is there.")
@option(
    "--dump-graphs", type=FOLDER, section="Output", help="Write the graph after every pass into this folder, as text and SVG."
)
@option(
    "--emit-example",
    type=str,
    metavar="LANG",
    section="Output",
    shell_complete=one_of(*EXAMPLES),
    help="Add a folder with a program that runs the artifact, ready to build: cpp.",
)
@option("--json", "as_json", is_flag=True, section="Output", help="Print the report as JSON.")
@option(
    "--target",
    default="cpu",
    show_default=True,
    section="Program",
    shell_complete=one_of(*TARGETS),
    help="cpu, GPUs as cuda:sm_90 or cuda:sm_80,sm_90 (none need be here), onnx or onnx-portable.",
)
@option(
    "--cpu-isa",
    default="native",
    show_default=True,
    section="Program",
    shell_complete=one_of(*POLICIES["cpu_isa"]),
    help="native (on the host of a GPU x86-64-v3), x86-64-v3 (AVX2) or x86-64-v4 (AVX-512).",
)
@option(
    "--provider",
    default="cpu",
    show_default=True,
    section="Program",
    shell_complete=one_of(*POLICIES["provider"]),
    help="For target onnx: the part of onnxruntime that is to run it, cpu or cuda.",
)
@option("--max-context", type=int, metavar="N", section="Program", help="Longest sequence in tokens; by default the model's.")
@option("--max-batch", type=int, metavar="N", default=8, show_default=True, section="Program", help="Most sequences in one step.")
@option("--task", section="Model", help="By default the one that the checkpoint's architecture names.")
@option("--tokenizer", type=FOLDER, section="Model", help="Take the tokenizer from this folder.")
@option(
    "--dtype",
    default="auto",
    show_default=True,
    section="Numerics",
    shell_complete=one_of(*DTYPE_NAMES),
    help="float32, bfloat16, float16 (GPUs alone) or auto: the checkpoint's own.",
)
@option(
    "--experts",
    default="exact",
    show_default=True,
    section="Numerics",
    shell_complete=one_of(*POLICIES["experts"]),
    help="How experts are computed; int8 and int4 lose, and are for target onnx.",
)
@option(
    "--activations",
    default="exact",
    show_default=True,
    section="Numerics",
    shell_complete=one_of(*POLICIES["activations"]),
    help="How activations are computed; int8 loses, and is for target cpu: of what MXFP4 and dense weights of 8 bits multiply.",
)
@option(
    "--dense",
    default="exact",
    show_default=True,
    section="Numerics",
    shell_complete=one_of(*POLICIES["dense"]),
    help="How dense weights are stored; int8 loses: dense layers and head for target cpu, embeddings and head for onnx.",
)
def compile(source: str, output: Path, as_json: bool, **options: Any) -> None:
    """Compile the checkpoint SRC into an artifact.

    SRC is a folder, in Hugging Face's layout or OpenAI's original one, or a hub id such as openai/gpt-oss-20b, whose files are
    fetched into the hub's cache. Nothing is left behind by a compile that fails or is interrupted.
    """
    folder, seconds = _compile(source, output, options)
    report = json.loads((folder / REPORT_JSON).read_text("utf-8"))
    if as_json:
        click.echo(json.dumps(report))
        return
    click.echo(f"{folder}  ({size_text(sum(report['sizes'].values()))}, {seconds:.0f} s)")
    made = [f"{done['count']} {done['name']}" for done in report["passes"] if done["count"]]
    click.echo(f"Passes: {', '.join(made)}.")
    manifest = read_manifest(folder)
    click.echo(_parity(report, best_of(manifest.model)))
    click.echo(f"Report: {folder / REPORT_MD}")
    if manifest.tokenizer_files:
        click.echo(f"Try: {trial(manifest.model.task, shlex.quote(str(output)))}")


def _compile(source: str | Path, output: Path, options: dict[str, Any]) -> tuple[Path, float]:
    began = time.perf_counter()
    with PhaseLine() as line, _ended_by_signal() as check:

        def progress(phase: str, done: float | None) -> None:
            check()
            line(phase, done)

        progress("load the compiler", None)
        from oxfuse.compiler.pipeline import compile as compile_checkpoint

        folder = compile_checkpoint(source, output, progress=progress, **options)
    return folder, time.perf_counter() - began


@contextlib.contextmanager
def _ended_by_signal() -> Iterator[Callable[[], None]]:
    """Let SIGINT, SIGTERM and SIGHUP end the block with its clean-up; a signal that is ignored, as under nohup, stays so.

    Yields a function that ends the block if a signal has come: torch makes an exception that a handler raises inside its
    callbacks an error of its own, without a cause, or drops it.
    """
    came: list[int] = []

    def check() -> None:
        if came:
            raise KeyboardInterrupt if came[0] == signal.SIGINT else SystemExit(128 + came[0])

    def end(number: int, frame: FrameType | None) -> None:
        came.append(number)
        check()

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    taken = [number for number, handler in before.items() if handler in (signal.SIG_DFL, signal.default_int_handler)]
    for number in taken:
        signal.signal(number, end)
    try:
        yield check
    except Exception:
        check()
        raise
    finally:
        for number in taken:
            signal.signal(number, before[number])


def _parity(report: dict[str, Any], best: str | None) -> str:
    parity = report["parity"]
    if parity["reason"] is not None:
        return f"Not compared with the reference: {parity['reason']}"
    return (
        f"Against the float32 reference: RMS error {parity['rms']:.1e}, largest {parity['max']:.1e}"
        + (f", same best {best} in {parity['top1']:.0%} of" if best else ", over")
        + f" {parity['rows']} rows."
    )


@click.command(cls=HelpPage, examples=("oxfuse quickstart", "oxfuse quickstart -o /tmp/tiny -n 200"))
@option("-o", "--output", type=FOLDER, default=Path("tiny-gpt-oss-cpu"), show_default=True, help="Where the artifact goes.")
@option("-n", "--max-new-tokens", default=60, show_default=True, metavar="N", help="Most tokens to generate.")
def quickstart(output: Path, max_new_tokens: int) -> None:
    """Compile the bundled model, verify the artifact and generate text with it.

    The model is a small GPT-OSS that was trained on the Python library's source. Nothing is fetched. An artifact of an earlier
    quickstart is replaced, and no other folder.
    """
    if max_new_tokens < 1:
        raise UserError(f"--max-new-tokens is {max_new_tokens}: give a whole number >= 1.")
    with as_file(files("oxfuse.artifacts") / BUNDLED) as checkpoint:
        again = _is_from(checkpoint, output)
        size = size_text(sum(path.stat().st_size for path in checkpoint.iterdir()))
        click.echo(f"Compiling {BUNDLED}, a GPT-OSS of {size}, for this CPU: about a minute.")
        folder, seconds = _compile(checkpoint, output, {"force": again})
    click.echo(f"Compiled in {seconds:.0f} s. {_parity(json.loads((folder / REPORT_JSON).read_text('utf-8')), 'token')}")
    from oxfuse.runtime.artifact import load
    from oxfuse.runtime.verify import require_ok, verify_artifact

    require_ok(verify_artifact(folder))
    click.echo("Verified: every weight's hash, and the logits against the reference's.\n")
    model = load(folder)
    click.echo(PROMPT, nl=False)
    times = []
    for chunk in model.stream(PROMPT, max_new_tokens=max_new_tokens):
        click.echo(chunk.text, nl=False)
        times.append(time.perf_counter())
    rate = f" at {(len(times) - 1) / (times[-1] - times[0]):,.0f} tokens/s" if len(times) > 1 else ""
    click.echo(f"\n\n{count_text(len(times), 'token')}{rate}.")
    click.echo(f"The artifact is {folder}. Try:\n  oxfuse generate {output} -p 'class Stack:'\n  oxfuse inspect {output}")


def _is_from(checkpoint: Path, output: Path) -> bool:
    """Tell whether `output` holds an artifact of this checkpoint. Raises UserError where it holds anything else."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    config = hashlib.sha256((checkpoint / "config.json").read_bytes()).hexdigest()
    with contextlib.suppress(UserError):
        if read_manifest(output).source.get("config_sha256") == config:
            return True
    raise UserError(f"{output} exists, and an earlier quickstart did not make it. Name another folder with -o.")


@click.command(cls=HelpPage, examples=("oxfuse doctor", "oxfuse doctor --json | jq .can"))
@option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
@click.pass_context
def doctor(ctx: click.Context, as_json: bool) -> None:
    """Tell what this machine can compile and run, and why not.

    Looks at Python, its packages, torch, the C++ compiler, processor, memory, disks, GPU and the hub's settings. Exit code 0:
    this machine can compile and run; 2: it lacks something, and the line that says "missing" tells the remedy.
    """
    from oxfuse.compiler.doctor import examine, lines

    with PhaseLine() as line:
        line("examine this machine", None)
        diagnosis = examine(os.environ, Path.cwd())
    if as_json:
        click.echo(diagnosis.to_json())
    else:
        for status, text in lines(diagnosis):
            click.secho(text, fg=COLORS[status] if status != "ok" else None)
    ctx.exit(0 if diagnosis.can("compile") and diagnosis.can("run") else 2)
