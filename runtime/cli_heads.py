"""The commands of models with other heads: classify, tag, answer, embed. Results go to stdout, progress to stderr."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from oxfuse.runtime.cli import read_prompts, read_text, usable_threads
from oxfuse.runtime.errors import UserError
from oxfuse.runtime.help_page import FILE, FOLDER, HelpPage, option
from oxfuse.runtime.progress import PhaseLine

if TYPE_CHECKING:
    from oxfuse.runtime.model import CompiledModel


def _inputs(command: Callable[..., None]) -> Callable[..., None]:
    """Add what all of the commands take."""
    decorators = (
        click.argument("folder", metavar="DIR", type=FOLDER),
        click.argument("stdin", metavar="[-]", required=False),
        option("-p", "--prompt", "texts", multiple=True, section="Text", help="A text; repeat it for several."),
        option(
            "-f", "--file", "files", type=FILE, multiple=True, section="Text", help="Read a text from a file; may be repeated."
        ),
        *_COMMON,
    )
    for decorator in reversed(decorators):
        command = decorator(command)
    return command


_COMMON = (
    option(
        "--threads", type=int, help="Threads to compute with; by default the processor's cores, or a container's share of them."
    ),
    option("--json", "as_json", is_flag=True, help="Print one JSON object a line for each text."),
    option("-q", "--quiet", is_flag=True, help="Show no progress."),
)


def _run(folder: Path, threads: int | None, quiet: bool, what: Callable[[CompiledModel], Any]) -> Any:
    with PhaseLine(quiet=quiet) as line:
        line("load", None)
        from oxfuse.runtime.artifact import load

        model = load(folder, threads=usable_threads(threads), progress=partial(line, "load"))
        line("run", None)
        return what(model)


def _print(texts: list[str], results: list[Any], as_json: bool, lines: Callable[[Any], list[str]]) -> None:
    """Write the results: an object a line, or lines, under a heading `==> N <==` where there are several texts."""
    for number, (text, result) in enumerate(zip(texts, results, strict=True), 1):
        if as_json:
            click.echo(json.dumps({"text": text, **result}, ensure_ascii=False))
            continue
        if len(texts) > 1:
            click.echo(f"==> {number} <==")
        for line in lines(result):
            click.echo(line)


@click.command(
    cls=HelpPage,
    examples=(
        'oxfuse classify DIR -p "What a film."',
        "oxfuse classify DIR -f review.txt --json | jq -r .label",
    ),
)
@_inputs
def classify(
    folder: Path,
    stdin: str | None,
    texts: tuple[str, ...],
    files: tuple[Path, ...],
    threads: int | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Tell the label of a text, with the artifact in DIR; one line a label, the likeliest first."""
    given = read_prompts(stdin, texts, files)
    results = _run(folder, threads, quiet, lambda model: [dataclasses.asdict(found) for found in model.classify(given)])
    _print(given, results, as_json, _scores)


def _scores(result: dict[str, Any]) -> list[str]:
    ranked = sorted(result["scores"].items(), key=lambda item: -item[1])
    return [f"{score:8.4f}  {label}" for label, score in ranked]


@click.command(
    cls=HelpPage,
    examples=(
        'oxfuse tag DIR -p "Ada Lovelace lived in London."',
        "oxfuse tag DIR -f letter.txt --tokens",
        "oxfuse tag DIR -f letter.txt --json | jq -c '.entities[]'",
    ),
)
@_inputs
@option("--tokens", is_flag=True, help="Show every token, not the entities that they make up.")
def tag(
    folder: Path,
    stdin: str | None,
    texts: tuple[str, ...],
    files: tuple[Path, ...],
    threads: int | None,
    as_json: bool,
    quiet: bool,
    tokens: bool,
) -> None:
    """Find the labelled stretches of a text, with the artifact in DIR: place, label, probability and text of each."""
    given = read_prompts(stdin, texts, files)
    results = _run(folder, threads, quiet, lambda model: [dataclasses.asdict(found) for found in model.tag(given)])
    _print(given, results, as_json, lambda result: [_span(span) for span in result["tokens" if tokens else "entities"]])


def _span(span: dict[str, Any]) -> str:
    return f"{span['start']:6}–{span['end']:<6} {span['label']:<16} {span['score']:6.4f}  {span['text']!r}"


@click.command(
    cls=HelpPage,
    examples=(
        'oxfuse answer DIR -p "Who wrote it?" -f report.txt',
        'oxfuse answer DIR -p "Since when?" --context "It opened in 1884." --top-k 3 --json',
    ),
)
@click.argument("folder", metavar="DIR", type=FOLDER)
@option("-p", "--prompt", "question", required=True, section="Text", help="The question.")
@option("-c", "--context", "context", section="Text", help="The text in which the answer is to be found.")
@option("-f", "--file", "file", type=FILE, section="Text", help="Read that text from a file; - is standard input.")
@option("--top-k", default=1, show_default=True, metavar="K", help="Show the K best answers.")
@option("--max-answer-tokens", default=30, show_default=True, metavar="N", help="Longest answer.")
@_COMMON[0]
@_COMMON[1]
@_COMMON[2]
def answer(
    folder: Path,
    question: str,
    context: str | None,
    file: Path | None,
    top_k: int,
    max_answer_tokens: int,
    threads: int | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Find the answer to a question in a text, with the artifact in DIR: the best span, its place and probability."""
    if (context is None) == (file is None):
        raise UserError("Give the context in one way: --context TEXT, or -f FILE.")
    text = context if file is None else read_text(str(file), None if str(file) == "-" else file)
    assert text is not None
    found = _run(
        folder,
        threads,
        quiet,
        lambda model: model.answer(question, text, max_answer_tokens=max_answer_tokens, top_k=top_k),
    )
    if as_json:
        click.echo(json.dumps({"question": question, **dataclasses.asdict(found)}, ensure_ascii=False))
        return
    for each in (found, *found.alternatives):
        click.echo(f"{each.start:6}–{each.end:<6} {each.score:6.4f}  {each.text!r}" if top_k > 1 else each.text)


@click.command(
    cls=HelpPage,
    examples=(
        'oxfuse embed DIR -p "a text" | jq length',
        "oxfuse embed DIR -f one.txt -f two.txt --pool last > vectors.jsonl",
    ),
)
@_inputs
@option(
    "--pool",
    type=click.Choice(["mean", "last", "none"]),
    default="mean",
    show_default=True,
    help="The mean over the tokens, the last token's state, or every token's.",
)
def embed(
    folder: Path,
    stdin: str | None,
    texts: tuple[str, ...],
    files: tuple[Path, ...],
    threads: int | None,
    as_json: bool,
    quiet: bool,
    pool: str,
) -> None:
    """Print the last hidden state of a text, with the artifact in DIR, as a JSON array, or with --json as part of an object."""
    given = read_prompts(stdin, texts, files)
    found = _run(folder, threads, quiet, lambda model: model.embed(given))
    for text, each in zip(given, found, strict=True):
        vector = (each.hidden if pool == "none" else getattr(each, pool)).tolist()
        if as_json:
            vector = {"text": text, "token_ids": each.token_ids, "offsets": each.offsets, "embedding": vector}
        click.echo(json.dumps(vector, ensure_ascii=False))
