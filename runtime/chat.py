"""`oxfuse chat`: a conversation at a terminal, or line by line in a pipe.

The reply streams; thoughts are dimmed at a terminal and left out in a pipe. Ctrl-C ends the reply and not the program, because a
step that was interrupted would lose its cache. The whole chat is rendered anew for each turn by the checkpoint's own template,
which drops what it wants to (earlier thoughts, as a rule), and the conversation runs what differs from the turn before.
"""

from __future__ import annotations

import dataclasses
import json
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from oxfuse.runtime.cli import usable_threads
from oxfuse.runtime.errors import UserError
from oxfuse.runtime.help_page import FOLDER, HelpPage, option
from oxfuse.runtime.manifest import read_manifest
from oxfuse.runtime.progress import PhaseLine

if TYPE_CHECKING:
    from oxfuse.runtime.generate import Chunk, Generation, Message, Stream
    from oxfuse.runtime.model import CompiledModel

PROMPT, CONTINUED = "> ", ". "
HELP = """\
/reset  begin a new conversation
/help   show this
/exit   leave, as Ctrl-D does
A line that ends with \\ goes on in the next one. Ctrl-C stops a reply."""


@click.command(
    cls=HelpPage,
    examples=(
        "oxfuse chat DIR",
        'oxfuse chat DIR --system "Answer in one sentence." --reasoning low',
        "oxfuse chat DIR --temperature 0.7 --top-p 0.9 --hide-thinking",
        "oxfuse chat DIR --json < questions.txt | jq -r .answer",
    ),
)
@click.argument("folder", metavar="DIR", type=FOLDER)
@option("--system", metavar="TEXT", section="Chat", help="Instructions to stand before the conversation.")
@option("--reasoning", type=click.Choice(["low", "medium", "high"]), section="Chat", help="How much to think before answering.")
@option("--hide-thinking", is_flag=True, section="Chat", help="Show the answers only; in a pipe it is always so.")
@option("-n", "--max-new-tokens", type=int, metavar="N", section="Length", help="Most tokens of a reply; by default what fits.")
@option("--stop", multiple=True, metavar="STR", section="Length", help="Stop before this text; may be repeated.")
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
@option("--json", "as_json", is_flag=True, help="Print one JSON object a line for each turn, with token counts and seconds.")
def chat(
    folder: Path,
    system: str | None,
    reasoning: str | None,
    hide_thinking: bool,
    max_new_tokens: int | None,
    threads: int | None,
    prefix_cache_bytes: int | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Talk with the artifact in DIR, turn by turn.

    Each line is a message; in a pipe, lines come from standard input, and replies go to standard output without thoughts. Ctrl-C
    stops a reply, Ctrl-D leaves, /help shows more. A turn runs only what is new: the conversation stays in the cache.
    """
    if sys.stdin is None:
        raise UserError("Standard input is closed, so there is nobody to talk with: leave it open, or give it lines.")
    read_manifest(folder)  # before torch is imported: a wrong folder is told at once
    with PhaseLine() as line:
        line("load", None)
        from oxfuse.runtime.artifact import load

        model = load(
            folder,
            threads=usable_threads(threads),
            prefix_cache_bytes=prefix_cache_bytes,
            progress=partial(line, "load"),
        )
    talk = Chat(model, system=system, reasoning=reasoning, max_new_tokens=max_new_tokens, **options)
    at_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if at_terminal:
        click.secho(
            f"{model.manifest.name}, context of {model.max_context:,} tokens. /help shows the commands.", dim=True, err=True
        )
    try:
        for said in _lines(at_terminal):
            if re.fullmatch(r"\s*/[a-z]+\s*", said):
                if not _obey(said.strip(), talk):
                    break
            elif said.strip():
                show = _ignore if as_json else Display(hide=hide_thinking or not sys.stdout.isatty())
                try:
                    turn = talk.turn(said, show, stoppable=at_terminal)
                except UserError as error:
                    if not at_terminal:
                        raise
                    click.secho(str(error), fg="red", err=True)
                    continue
                if as_json:
                    click.echo(json.dumps(turn.as_dict(), ensure_ascii=False))
                else:
                    click.echo()
                    _report(turn, model.max_context)
    finally:
        talk.close()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Turn:
    """One message, the reply to it, and what it took."""

    prompt: str
    generation: Generation
    stopped: bool
    reused: int
    prompt_seconds: float
    decode_seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Return it for JSON: the generation's fields, as `generate --json` has them, and this turn's own."""
        found = self.generation
        return {
            "prompt": self.prompt,
            **dataclasses.asdict(found),
            "answer": found.answer,
            "prompt_tokens": len(found.prompt_token_ids),
            "reused_tokens": self.reused,
            "new_tokens": len(found.token_ids),
            "seconds": round(self.prompt_seconds + self.decode_seconds, 4),
        }


class Chat:
    """The messages of a conversation and the options of its replies."""

    def __init__(
        self, model: CompiledModel, *, system: str | None, reasoning: str | None, max_new_tokens: int | None, **options: Any
    ) -> None:
        """Prepare the conversation; `options` are those of `generate`.

        Raises UserError where the checkpoint has no chat template, its template takes no reasoning effort, or an option is wrong.
        """
        from oxfuse.runtime.conversation import Conversation

        tokenizer = model.tokenizer
        if tokenizer is None or not tokenizer.has_chat_template:
            raise UserError(
                f"The artifact has no {'tokenizer' if tokenizer is None else 'chat template'}, which a chat needs: compile with "
                "--tokenizer and a folder that has one, or continue plain text with `oxfuse generate`."
            )
        if reasoning is not None and "reasoning_effort" not in (tokenizer.template or ""):
            raise UserError("The checkpoint's chat template takes no reasoning effort: leave --reasoning out.")
        self._model, self._tokenizer = model, tokenizer
        self._variables = {} if reasoning is None else {"reasoning_effort": reasoning}
        self._options = model.generation_options(
            max_new_tokens=model.max_context if max_new_tokens is None else max_new_tokens,
            stop_token_ids=None,
            logprobs=False,
            **options,
        )
        self._beginning: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self._messages = [*self._beginning]
        self._conversation = Conversation(model)

    def turn(self, said: str, show: Callable[[Chunk], object], *, stoppable: bool = False) -> Turn:
        """Reply to `said`, calling `show` with each chunk; with `stoppable`, SIGINT ends the reply.

        Raises UserError where there is no room for it or the template refuses it; the conversation is then as before.
        """
        from oxfuse.runtime.inputs import token_list

        messages: list[Message] = [*self._messages, {"role": "user", "content": said}]
        prompt = token_list(self._tokenizer.chat(messages, **self._variables), self._model.vocab_size)
        began = time.perf_counter()
        stream = self._conversation.stream(prompt, self._options)
        first: float | None = None
        with _interruptible(stream) if stoppable else _uninterrupted() as interrupted:
            for chunk in stream:
                first = time.perf_counter() if first is None else first
                show(chunk)
        now = time.perf_counter()
        generation = stream.job.result()
        self._messages = [*messages, _spoken(generation)]
        return Turn(
            prompt=said,
            generation=generation,
            stopped=bool(interrupted),
            reused=generation.reused_tokens,
            prompt_seconds=(first or now) - began,
            decode_seconds=now - (first or now),
        )

    def reset(self) -> None:
        """Begin a new conversation."""
        self._messages = [*self._beginning]
        self._conversation.close()

    def close(self) -> None:
        """Give the cache's blocks back."""
        self._conversation.close()


def _spoken(generation: Generation) -> Message:
    """Return a reply as templates want it in the next turn.

    Thoughts belong to a turn and are dropped after it, except those that led to a call of a tool, which is still to be answered.
    Templates of harmony take a call with thoughts or with content, not with both.
    """
    if not generation.tool_calls:
        return {"role": "assistant", "content": generation.answer}
    calls = [{"name": call.name, "arguments": _parsed(call.arguments)} for call in generation.tool_calls]
    return {
        "role": "assistant",
        "content": "",
        "thinking": (generation.channels or {}).get("analysis", ""),
        "tool_calls": [{"type": "function", "function": call} for call in calls],
    }


def _parsed(arguments: str) -> Any:
    try:
        return json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments


class Display:
    """Writes a reply to the terminal while it comes: thoughts dimmed or left out, calls of tools with their recipient."""

    def __init__(self, *, hide: bool) -> None:
        """Show thoughts unless `hide`."""
        self._hide = hide
        self._last: tuple[str | None, str | None] | None = None

    def __call__(self, chunk: Chunk) -> None:
        """Write one chunk."""
        if not chunk.text or (self._hide and chunk.thinking and chunk.recipient is None):
            return
        voice = chunk.channel, chunk.recipient
        if voice != self._last:
            click.echo("\n" if self._last else "", nl=False)
            if chunk.recipient is not None:
                click.secho(f"call {chunk.recipient} ", fg="cyan", nl=False)
            self._last = voice
        click.echo(click.style(chunk.text, dim=True) if chunk.thinking else chunk.text, nl=False)


def _ignore(chunk: Chunk) -> None:
    """Show nothing."""


def _report(turn: Turn, max_context: int) -> None:
    """Say on stderr what the reply alone does not tell; at a terminal also how fast it was."""
    from oxfuse.runtime.speed import Speed

    found, remarks = turn.generation, list(turn.generation.notes)
    new, prompt = len(found.token_ids), len(found.prompt_token_ids)
    if turn.stopped:
        remarks.append("stopped")
    elif found.finish_reason == "length":
        full = f"the context of {max_context:,} tokens is full: /reset begins a new conversation"
        remarks.append(full if prompt + new >= max_context else f"cut off after {new} tokens, see -n")
    if sys.stderr.isatty():
        speed = Speed(
            prompt_tokens=prompt,
            reused_tokens=turn.reused,
            prompt_seconds=turn.prompt_seconds,
            new_tokens=new,
            decode_tokens=max(0, new - 1),
            decode_seconds=turn.decode_seconds,
        )
        remarks.append(speed.text())
    for remark in remarks:
        click.secho(f"({remark})", dim=True, err=True)


def _obey(command: str, talk: Chat) -> bool:
    """Do what a line such as /reset says. Return whether to go on."""
    if command == "/reset":
        talk.reset()
    elif command != "/exit":
        known = command == "/help"
        click.secho(HELP if known else f"There is no command {command}.\n{HELP}", dim=True, err=True)
    return command != "/exit"


def _lines(at_terminal: bool) -> Iterator[str]:
    """Yield what the user says, until there is no more."""
    if at_terminal:
        with suppress(ImportError):
            import readline  # noqa: F401 - gives `input` its editing and history
        while (line := _ask(PROMPT)) is not None:
            while line.endswith("\\") and (more := _ask(CONTINUED)) is not None:
                line = f"{line[:-1]}\n{more}"
            yield line
        return
    for number, data in enumerate(sys.stdin.buffer, 1):
        try:
            yield data.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise UserError(
                f"Line {number} of standard input is not UTF-8 text: byte {error.start} is 0x{data[error.start]:02x}. "
                "Convert it, as with `iconv -t utf-8`."
            ) from error


def _ask(prompt: str) -> str | None:
    try:
        return input(prompt)
    except (EOFError, KeyboardInterrupt):
        click.echo()
        return None


@contextmanager
def _interruptible(stream: Stream) -> Iterator[list[int]]:
    """Let SIGINT end the stream after the step that runs. Yields a list that holds the signal once it has come."""
    came: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        came.append(number)
        stream.abandon()

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield came
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _uninterrupted() -> Iterator[list[int]]:
    yield []
