"""The commands that need no compiler: generate, inspect, verify. Results go to stdout, progress bars to stderr.

Errors are raised; the root command turns a UserError into one line and exit code 2. What is heavy is imported by the command that
needs it, so that `inspect` opens no library.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from oxfuse.runtime.errors import UserError
from oxfuse.runtime.manifest import Manifest, read_manifest

if TYPE_CHECKING:
    from oxfuse.runtime.generate import GenerationJob

VERIFY_REPORT = "verify.json"
FOLDER = click.Path(path_type=Path)


@click.command()
@click.argument("folder", metavar="DIR", type=FOLDER)
@click.argument("stdin", metavar="[-]", required=False)
@click.option("-p", "--prompt", "texts", multiple=True, help="The prompt; repeat it for several at once.")
@click.option("-f", "--file", type=FOLDER, help="Read the prompt from a file.")
@click.option("-n", "--max-new-tokens", default=128, show_default=True, help="Most tokens to generate.")
@click.option("--temperature", default=0.0, show_default=True, help="0 takes the most likely token.")
@click.option("--top-k", default=0, help="Sample from the K most likely tokens; 0 is off.")
@click.option("--top-p", default=1.0, help="Sample from the likeliest tokens that have probability P together.")
@click.option("--min-p", default=0.0, help="Leave out tokens less likely than P times the likeliest.")
@click.option("--repetition-penalty", default=1.0, help="Above 1 makes repetition less likely.")
@click.option("--seed", type=int, help="Seed of the random numbers; by default a new one each time.")
@click.option("--stop", multiple=True, metavar="STR", help="Stop before this text; may be repeated.")
@click.option("--threads", type=int, help="Threads to compute with.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per prompt.")
def generate(
    folder: Path,
    stdin: str | None,
    texts: tuple[str, ...],
    file: Path | None,
    threads: int | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Continue a prompt with the artifact in DIR; `-` reads the prompt from standard input."""
    from oxfuse.runtime.model import load

    prompts = _prompts(stdin, texts, file)
    model = load(folder, threads=threads)
    jobs = model.generation_jobs(prompts, stop_token_ids=None, logprobs=False, **options)
    show = not as_json and len(jobs) == 1
    _run_with_progress(model.scheduler.run, jobs, options["max_new_tokens"], show)
    for job in jobs:
        if as_json:
            click.echo(json.dumps(dataclasses.asdict(job.result()), ensure_ascii=False))
        elif len(jobs) > 1:
            click.echo(job.result().text)


def _prompts(stdin: str | None, texts: tuple[str, ...], file: Path | None) -> list[str]:
    if stdin not in (None, "-"):
        raise UserError(f"Unexpected argument {stdin!r}: give the prompt with -p, a file with -f, or - for standard input.")
    if bool(texts) + (file is not None) + (stdin is not None) != 1:
        raise UserError("Give the prompt in one way: -p PROMPT, -f FILE, or - for standard input.")
    if file is not None:
        try:
            return [file.read_text("utf-8")]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{file} cannot be read as a prompt: {error}.") from error
    return list(texts) or [sys.stdin.read()]


def _run_with_progress(run: Callable[..., None], jobs: list[GenerationJob], max_new_tokens: int, show: bool) -> None:
    """Run the jobs with a bar over their tokens; with `show`, over the prompt only, and the text is written as it comes."""
    from tqdm import tqdm

    prompt = sum(job.sequence.pending for job in jobs)
    total = prompt if show else prompt + max_new_tokens * len(jobs)
    with tqdm(total=total, unit="tok", desc="prompt" if show else "tokens", leave=False, disable=None) as bar:

        def on_step() -> None:
            bar.update(min(total, sum(len(job.sequence.tokens) if job.done else job.sequence.cached for job in jobs)) - bar.n)
            while show and jobs[0].chunks:
                bar.close()
                click.echo(jobs[0].chunks.popleft().text, nl=False)

        run([job for job in jobs if not job.done], on_step)
    if show:
        click.echo()


@click.command()
@click.argument("folder", metavar="DIR", type=FOLDER)
@click.option("--json", "as_json", is_flag=True, help="Print the manifest as it is.")
def inspect(folder: Path, as_json: bool) -> None:
    """Show what the artifact in DIR holds and needs. Executes nothing of it."""
    manifest = read_manifest(folder)
    click.echo(manifest.to_json() if as_json else "\n".join(_summary(manifest)), nl=not as_json)


def _summary(manifest: Manifest) -> list[str]:
    model, need, limits = manifest.model, manifest.requirements, manifest.limits
    weights = sum(file.bytes for file in manifest.weights)
    lines = [
        f"{manifest.name}: {model.model_type}, {model.task}, {model.dtype}, vocabulary {model.vocab_size}",
        f"made by    {', '.join(f'{k} {v}' for k, v in manifest.created_by.items())}",
        f"from       {', '.join(f'{k} {v}' for k, v in manifest.source.items())}",
        f"limits     sequences of {limits.max_context} tokens",
        f"steps      {limits.max_batch} sequences, {limits.max_step_tokens} tokens",
        f"needs      torch {need.torch}, {need.platform} {need.machine}, glibc {need.glibc}",
        f"processor  {need.cpu_isa}: {' '.join(need.cpu_features)}",
        f"weights    {weights:,} bytes in {sum(len(file.tensors) for file in manifest.weights)} tensors",
    ]
    for group in manifest.cache.groups:
        seen = f"window {group.window}" if group.window else "full attention"
        lines.append(
            f"cache      {seen}: {len(group.layers)} layers, blocks of {manifest.cache.block_size} tokens, {manifest.cache.dtype}"
        )
    for program in manifest.programs:
        lines.append(f"program    {program.name} for {program.target}, {len(program.constants)} constants, in {program.path}")
    for record in manifest.passes:
        error = "not checked" if record.max_error is None else f"{record.checked} kinds checked, error {record.max_error:.1e}"
        lines.append(f"pass       {record.name}: {record.count} ({error})")
    lines += [f"numerics   {key}: {value}" for key, value in manifest.numerics.items()]
    lines.append(f"tokenizer  {', '.join(manifest.tokenizer_files) or 'none'}")
    return lines


@click.command()
@click.argument("folder", metavar="DIR", type=FOLDER)
@click.option("--threads", type=int, help="Threads to compute with.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def verify(folder: Path, threads: int | None, as_json: bool) -> None:
    """Hash the weights of the artifact in DIR and compare its logits here with the reference's. Writes DIR/verify.json."""
    from tqdm import tqdm

    from oxfuse.runtime.verify import require_ok, verify_artifact

    total = sum(file.bytes for file in read_manifest(folder).weights)
    with tqdm(total=total, unit="B", unit_scale=True, desc="weights", leave=False, disable=None) as bar:
        result = verify_artifact(folder, threads=threads, progress=bar.update)
    text = json.dumps(result, indent=1) + "\n"
    try:
        (folder / VERIFY_REPORT).write_text(text, "utf-8")
    except OSError as error:
        click.echo(f"{folder / VERIFY_REPORT} was not written: {error}", err=True)
    if as_json:
        click.echo(text, nl=False)
    require_ok(result)
    if not as_json:
        weights, golden = result["weights"], result["golden"]
        click.echo(f"weights    {weights['tensors']} tensors, {weights['bytes']:,} bytes: intact")
        if golden is None:
            click.echo("logits     not compared: the artifact has no golden file")
        else:
            click.echo(
                f"logits     {golden['rows']} rows of {golden['tokens']} tokens: rms error {golden['rms_error']:.2e}, max "
                f"{golden['max_error']:.2e} (reference rms {golden['reference_rms']:.2e}, max {golden['reference_max']:.2e}), "
                f"top-1 agreement {golden['top1_agreement']:.1%}"
            )
