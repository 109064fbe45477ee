"""The commands that need no compiler: generate, inspect, verify. Results go to stdout, progress and speed to stderr.

Errors are raised; the root command turns a UserError into one line and exit code 2. What is heavy is imported by the command that
needs it, so that `inspect` and the completion of options open no library.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from oxfuse.runtime.errors import UserError
from oxfuse.runtime.help_page import FILE, FOLDER, HelpPage, option
from oxfuse.runtime.machine import processors
from oxfuse.runtime.manifest import read_manifest
from oxfuse.runtime.progress import PhaseLine

if TYPE_CHECKING:
    from oxfuse.runtime.generate import GenerationJob, Message
    from oxfuse.runtime.model import CompiledModel

VERIFY_REPORT = "verify.json"
LARGEST_PROMPT = 1 << 24
"""Bytes of a prompt that are read: more than any model's context holds, little enough to be refused before memory runs out."""


@click.command(
    cls=HelpPage,
    examples=(
        'oxfuse generate DIR -p "Once upon a time" -n 200',
        'oxfuse generate DIR -p "Why is the sky blue?" --chat --temperature 0.7 --top-p 0.9',
        "oxfuse generate DIR -f prompt.txt --stop $'\\n\\n' > continued.txt",
        'git diff | oxfuse generate DIR --chat --system "Describe this change in one line." -',
        'oxfuse generate DIR -p "def main():" -p "class Stack:" --json | jq -r .text',
    ),
)
@click.argument("folder", metavar="DIR", type=FOLDER)
@click.argument("stdin", metavar="[-]", required=False)
@option("-p", "--prompt", "texts", multiple=True, section="Prompt", help="The text to continue; repeat it for a batch.")
@option(
    "-f",
    "--file",
    "files",
    type=FILE,
    multiple=True,
    section="Prompt",
    help="Read the prompt from a file; repeat it for a batch.",
)
@option("--chat", is_flag=True, section="Prompt", help="Answer the prompt, through the model's chat template.")
@option("--system", metavar="TEXT", section="Prompt", help="Instructions to stand before the message; implies --chat.")
@option("-n", "--max-new-tokens", default=128, show_default=True, metavar="N", section="Length", help="Most tokens to generate.")
@option("--stop", multiple=True, metavar="STR", section="Length", help="Stop before this text; may be repeated.")
@option("--stop-token", type=int, multiple=True, metavar="ID", section="Length", help="Stop at this token as well.")
@option("--ignore-eos", is_flag=True, section="Length", help="Do not stop at the model's own end of text.")
@option("--temperature", default=0.0, show_default=True, section="Sampling", help="0 takes the most likely token.")
@option("--top-k", default=0, section="Sampling", help="Sample from the K most likely tokens; 0 is off.")
@option("--top-p", default=1.0, section="Sampling", help="Sample from the likeliest tokens that have probability P together.")
@option("--min-p", default=0.0, section="Sampling", help="Leave out tokens less likely than P times the likeliest.")
@option("--repetition-penalty", default=1.0, section="Sampling", help="Above 1 makes repetition less likely.")
@option("--seed", type=int, section="Sampling", help="Seed of the random numbers; by default a new one each time.")
@option("--threads", type=int, help="Threads to compute with; by default the processor's cores, or a container's share of them.")
@option(
    "--prefix-cache-bytes",
    type=int,
    metavar="N",
    help="Most bytes of earlier prompts' cache to keep for prompts that begin alike; 0 for none. Default: 1 GiB, on a GPU all.",
)
@option("--json", "as_json", is_flag=True, help="Print one JSON object a line for each prompt, with token counts and seconds.")
@option("--logprobs", is_flag=True, help="With --json: each token's log-probability.")
@option("-q", "--quiet", is_flag=True, help="Show neither progress nor speed.")
def generate(
    folder: Path,
    stdin: str | None,
    texts: tuple[str, ...],
    files: tuple[Path, ...],
    chat: bool,
    system: str | None,
    stop: tuple[str, ...],
    stop_token: tuple[int, ...],
    ignore_eos: bool,
    threads: int | None,
    prefix_cache_bytes: int | None,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Continue a prompt with the artifact in DIR.

    The prompt stands in -p or in a file, or is read from standard input (-), where one newline at the end is dropped. The text is
    written as it comes; several prompts run as one batch, and each text follows a line `==> N <==`. Speed goes to stderr.

    With --chat the prompt is a user's message, and the answer is written without the thoughts that led to it.
    """
    prompts = read_prompts(stdin, texts, files)
    if options["logprobs"] and not as_json:
        raise UserError("--logprobs are written with --json only: add it.")
    with PhaseLine(quiet=quiet) as line:
        line("load", None)
        from oxfuse.runtime.artifact import load

        model = load(
            folder,
            threads=usable_threads(threads),
            prefix_cache_bytes=prefix_cache_bytes,
            progress=partial(line, "load"),
        )
        ends = [*(() if ignore_eos else model.manifest.generation.eos_token_ids), *stop_token]
        requests = [_messages(prompt, system) for prompt in prompts] if chat or system is not None else prompts
        stops = ends if ignore_eos or stop_token else None  # None: also those of the chat format
        jobs = model.generation_jobs(requests, stop=stop, stop_token_ids=stops, **options)
        _run(model, jobs, line, prompts if as_json else None, most=options["max_new_tokens"], quiet=quiet)


def _run(
    model: CompiledModel, jobs: Sequence[GenerationJob], line: PhaseLine, prompts: list[str] | None, *, most: int, quiet: bool
) -> None:
    """Run the jobs and print what becomes of them as it comes: text, or with `prompts` an object for each in their order."""
    from oxfuse.runtime.speed import Stopwatch

    watch, output = Stopwatch(jobs), _Output(jobs, line, prompts)
    total = sum(job.sequence.pending for job in jobs)

    def on_step() -> None:
        watch.step()
        output.update(watch.seconds)
        read, new = watch.speed.prompt_tokens, watch.speed.new_tokens
        if read < total:
            line("read prompt", read / total)
        elif not output.occupies_terminal:
            line("generate", min(1.0, new / (most * len(jobs))))

    line("read prompt", None)
    interrupted: KeyboardInterrupt | None = None
    try:
        model.scheduler.run([job for job in jobs if not job.done], on_step)
        output.update(watch.seconds)
    except KeyboardInterrupt as error:
        interrupted = error
    line.clear()
    if output.streams:
        click.echo()
    results = [job.result() for job in jobs]
    if not quiet:
        end = f"; {'interrupted' if interrupted else results[0].finish_reason}" if len(jobs) == 1 else ""
        click.echo(f"{watch.speed.text()}{end}", err=True)
    if interrupted:
        raise interrupted
    if prompts is None and any(result.text and not result.answer for result in results):
        click.echo("No answer: the tokens were spent on thoughts, which --json shows. Allow more with -n.", err=True)


class _Output:
    """Writes results to stdout as they come: the one text piece by piece, several whole and in their order."""

    def __init__(self, jobs: Sequence[GenerationJob], line: PhaseLine, prompts: list[str] | None) -> None:
        self._jobs, self._line, self._prompts = jobs, line, prompts
        self._terminal, self._written, self._printed = sys.stdout.isatty(), False, 0
        self.streams = prompts is None and len(jobs) == 1

    @property
    def occupies_terminal(self) -> bool:
        """Whether the terminal's last line is a text that has begun, where progress has no place."""
        return self._terminal and self.streams and self._written

    def update(self, seconds: Sequence[float | None]) -> None:
        """Write what is new; `seconds` are those of the jobs that are done."""
        if self.streams:
            chunks = [self._jobs[0].chunks.popleft() for _ in range(len(self._jobs[0].chunks))]
            if text := "".join(chunk.text for chunk in chunks if not chunk.thinking):
                self._write(text, newline=False)
            return
        while (number := self._printed) < len(self._jobs) and self._jobs[number].done and self._jobs[number].error is None:
            if self._prompts is None:
                self._write(f"==> {number + 1} <==\n{self._jobs[number].result().answer}")
            else:
                self._write(_as_json(self._jobs[number], self._prompts[number], seconds[number] or 0.0))
            self._printed += 1

    def _write(self, text: str, newline: bool = True) -> None:
        if self._terminal:
            self._line.clear()
        click.echo(text, nl=newline)
        self._written = True


def _as_json(job: GenerationJob, prompt: str, seconds: float) -> str:
    result = job.result()
    counts = {"prompt_tokens": len(result.prompt_token_ids), "new_tokens": len(result.token_ids), "seconds": round(seconds, 4)}
    return json.dumps({"prompt": prompt, **dataclasses.asdict(result), "answer": result.answer, **counts}, ensure_ascii=False)


def _messages(prompt: str, system: str | None) -> list[Message]:
    before = [] if system is None else [{"role": "system", "content": system}]
    return [*before, {"role": "user", "content": prompt}]


def read_prompts(stdin: str | None, texts: tuple[str, ...], files: tuple[Path, ...]) -> list[str]:
    """Return the texts that a command line gives in one of three ways. Raises UserError if it gives none, or uses two ways."""
    if stdin not in (None, "-"):
        raise UserError(f"Unexpected argument {stdin!r}: give the prompt with -p, a file with -f, or - for standard input.")
    if bool(texts) + bool(files) + (stdin is not None) != 1:
        raise UserError("Give the prompt in one way: -p PROMPT, -f FILE, or - for standard input.")
    if stdin is not None:
        return [read_text("standard input", None)]
    if files:
        return [read_text(str(path), None if str(path) == "-" else path) for path in files]
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError:  # Python keeps stray bytes of an argument as lone surrogates
            raise UserError(f"The prompt {text!r:.60} is not UTF-8 text: convert it, as with iconv.") from None
    return list(texts)


def read_text(name: str, path: Path | None) -> str:
    """Return the text of a file, or of standard input, without a byte order mark and the newline that editors and echo add."""
    try:
        if path is None:
            if sys.stdin is None:
                raise UserError(f"{name} is closed: give the prompt with -p or -f.")
            data = sys.stdin.buffer.read(LARGEST_PROMPT + 1)
        else:
            with path.open("rb") as file:
                data = file.read(LARGEST_PROMPT + 1)
        if len(data) > LARGEST_PROMPT:
            raise UserError(f"{name} has more than {LARGEST_PROMPT:,} bytes, which no context holds: shorten the prompt.")
        return data.decode("utf-8-sig").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{name} is not UTF-8 text: byte {error.start} is 0x{data[error.start]:02x} ({error.reason}). "
            "Convert it, as with `iconv -t utf-8`."
        ) from error
    except OSError as error:
        raise UserError(f"{name} cannot be read as a prompt: {error.strerror}.") from error


def usable_threads(asked: int | None) -> int | None:
    """Return `asked`, else the container's share where torch would use more: threads that wait for each other are slow.

    None is torch's own number.
    """
    here = processors()
    if asked is not None or here.quota is None:
        return asked
    import torch

    return here.threads if here.threads < torch.get_num_threads() else None


@click.command(
    cls=HelpPage,
    examples=(
        "oxfuse inspect DIR",
        "oxfuse inspect DIR --context 4096 --batch 16",
        "oxfuse inspect DIR --json | jq .computed.memory",
    ),
)
@click.argument("folder", metavar="DIR", type=FOLDER)
@option("--context", type=int, multiple=True, metavar="N", help="Tell the memory at N tokens; may be repeated. Default: a table.")
@option("--batch", type=int, metavar="N", help="Tell it for N sequences at once; by default the most in one step.")
@option("--json", "as_json", is_flag=True, help="Print the manifest, with the computed figures under `computed`.")
def inspect(folder: Path, context: tuple[int, ...], batch: int | None, as_json: bool) -> None:
    """Show what the artifact in DIR holds and needs, and whether it fits this machine. Executes nothing of it."""
    from oxfuse.runtime.summary import summarize

    manifest = read_manifest(folder)
    summary = summarize(folder, manifest, contexts=context, batch=batch)
    if as_json:
        click.echo(json.dumps({**dataclasses.asdict(manifest), "computed": dataclasses.asdict(summary)}, indent=1))
    else:
        click.echo("\n".join(summary.lines(manifest)))


@click.command(
    cls=HelpPage,
    examples=("oxfuse verify DIR", "oxfuse verify DIR --quiet && rsync -a DIR server:", "oxfuse verify DIR --json | jq .golden"),
)
@click.argument("folder", metavar="DIR", type=FOLDER)
@option("--threads", type=int, help="Threads to compute with; by default the processor's cores, or a container's share of them.")
@option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@option("-q", "--quiet", is_flag=True, help="Print nothing but errors: the exit code tells.")
def verify(folder: Path, threads: int | None, as_json: bool, quiet: bool) -> None:
    """Check the artifact in DIR: every hash, and its logits on this machine against the reference's.

    Exit code 0: intact and right; 2: not, and stderr tells what is wrong. The result is also written to DIR/verify.json.
    """
    # Before torch is imported: a wrong folder is told at once. Of spans and hidden states no value is the best.
    ranked = read_manifest(folder).model.task not in ("question-answering", "feature-extraction")
    with PhaseLine(quiet=quiet) as line:
        line("load", None)
        from oxfuse.runtime.verify import require_ok, verify_artifact

        result = verify_artifact(folder, threads=usable_threads(threads), progress=line)
    text = json.dumps(result, indent=1) + "\n"
    try:
        (folder / VERIFY_REPORT).write_text(text, "utf-8")
    except OSError as error:  # an artifact may lie where nothing can be written
        if not quiet:
            click.echo(f"{folder / VERIFY_REPORT} was not written: {error.strerror}.", err=True)
    if as_json:
        click.echo(text, nl=False)
    require_ok(result)
    if as_json or quiet:
        return
    weights, golden = result["weights"], result["golden"]
    click.echo(f"weights    {weights['tensors']} tensors, {weights['bytes']:,} bytes: intact")
    if golden is None:
        click.echo("logits     not compared: the artifact has no golden file")
    else:
        click.echo(
            f"logits     {golden['rows']} rows of {golden['tokens']} tokens: rms error {golden['rms_error']:.2e}, max "
            f"{golden['max_error']:.2e} (reference rms {golden['reference_rms']:.2e}, max {golden['reference_max']:.2e})"
            + (f", top-1 agreement {golden['top1_agreement']:.1%}" if ranked else "")
        )
