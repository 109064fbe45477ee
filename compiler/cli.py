"""The commands that need the compiler: compile and quickstart. Results go to stdout, progress to stderr."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import click
from tqdm import tqdm

from oxfuse.compiler.report import REPORT_MD

FOLDER = click.Path(path_type=Path)
BUNDLED = "tiny-gpt-oss"
PROMPT = "def read_file(path):"


class _Bar:
    """One line on stderr for the running phase, with a bar where the phase tells how far it is; nothing in a pipe."""

    def __init__(self) -> None:
        self._bar: tqdm[Any] | None = None
        self._phase = ""

    def __call__(self, phase: str, done: float | None) -> None:
        if phase != self._phase:
            self.close()
            self._phase = phase
            self._bar = tqdm(total=100, desc=phase, leave=False, disable=None, bar_format="{desc} [{elapsed}]")
        if done is not None and self._bar is not None:
            self._bar.bar_format = "{desc} {percentage:3.0f}% |{bar}| [{elapsed}]"
            self._bar.update(round(100 * done) - self._bar.n)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


@click.command(
    epilog="Example: oxfuse compile openai/gpt-oss-20b -o gpt-oss-20b-cpu",
)
@click.argument("source", metavar="SRC")
@click.option("-o", "--output", required=True, type=FOLDER, help="The artifact's folder; it may exist when empty.")
@click.option("--target", default="cpu", show_default=True, help="What to compile for.")
@click.option("--dtype", default="auto", show_default=True, help="float32, bfloat16 or auto: the checkpoint's own.")
@click.option("--task", help="By default the one that the checkpoint's architecture names.")
@click.option("--max-context", type=int, help="Longest sequence in tokens; by default the model's.")
@click.option("--max-batch", type=int, default=8, show_default=True, help="Most sequences in one step.")
@click.option("--tokenizer", type=FOLDER, help="Take the tokenizer from this folder.")
@click.option("--cpu-isa", default="native", show_default=True, help="native, x86-64-v3 (AVX2) or x86-64-v4 (AVX-512).")
@click.option("--experts", default="exact", show_default=True, help="How experts are computed.")
@click.option("--activations", default="exact", show_default=True, help="How activations are computed.")
@click.option("--dense", default="exact", show_default=True, help="How dense weights are stored.")
@click.option("--dump-graphs", type=FOLDER, help="Write the graph after every pass into this folder, as text and SVG.")
@click.option("--force", is_flag=True, help="Replace an artifact that is there.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def compile(source: str, output: Path, as_json: bool, **options: Any) -> None:
    """Compile the checkpoint SRC, a folder or a hub id, into an artifact."""
    folder, seconds = _compile(source, output, options)
    report = json.loads((folder / "report.json").read_text("utf-8"))
    if as_json:
        click.echo(json.dumps(report))
        return
    click.echo(f"{folder}  ({_megabytes(sum(report['sizes'].values()))}, {seconds:.0f} s)")
    click.echo(_parity(report))
    click.echo(f"Report: {folder / REPORT_MD}")


def _compile(source: str | Path, output: Path, options: dict[str, Any]) -> tuple[Path, float]:
    from oxfuse.compiler.pipeline import compile as compile_checkpoint

    bar, began = _Bar(), time.perf_counter()
    try:
        folder = compile_checkpoint(source, output, progress=bar, **options)
    finally:
        bar.close()
    return folder, time.perf_counter() - began


def _parity(report: dict[str, Any]) -> str:
    parity = report["parity"]
    if parity["reason"] is not None:
        return f"Not compared with the reference: {parity['reason']}"
    return (
        f"Against the float32 reference: RMS error {parity['rms']:.1e}, largest {parity['max']:.1e}, "
        f"same best token in {parity['top1']:.0%} of {parity['rows']} rows"
    )


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB"


@click.command()
@click.option("-o", "--output", type=FOLDER, default=Path("tiny-gpt-oss-cpu"), show_default=True, help="Where the artifact goes.")
@click.option("-n", "--max-new-tokens", default=60, show_default=True, help="Most tokens to generate.")
def quickstart(output: Path, max_new_tokens: int) -> None:
    """Compile the bundled checkpoint, verify the artifact and generate text with it."""
    from importlib.resources import as_file, files

    from oxfuse.runtime.model import load
    from oxfuse.runtime.verify import require_ok, verify_artifact

    with as_file(files("oxfuse.artifacts") / BUNDLED) as checkpoint:
        click.echo(
            f"Compiling {BUNDLED}, a GPT-OSS of {_megabytes(sum(p.stat().st_size for p in checkpoint.iterdir()))}, for this CPU."
        )
        folder, seconds = _compile(checkpoint, output, {"force": True})
    click.echo(f"Compiled in {seconds:.0f} s. {_parity(json.loads((folder / 'report.json').read_text('utf-8')))}.")
    require_ok(verify_artifact(folder))
    click.echo("Verified: every weight's hash, and the logits against the reference's.\n")
    model = load(folder)
    click.echo(PROMPT, nl=False)
    began, count = time.perf_counter(), 0
    for chunk in model.stream(PROMPT, max_new_tokens=max_new_tokens):
        click.echo(chunk.text, nl=False)
        sys.stdout.flush()
        count += chunk.token_id is not None
    click.echo(f"\n\n{count} tokens at {count / (time.perf_counter() - began):.0f} tokens/s.")
    click.echo(f"The artifact is {folder}. Try: oxfuse generate {output} -p 'class Stack:'")
