"""`oxfuse chat`: what a turn runs, what is shown where, and that Ctrl-C ends a reply and nothing else."""

from __future__ import annotations

import gc
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import oxfuse
import oxfuse.runtime.artifact
import oxfuse.runtime.chat
from oxfuse.runtime.chat import Chat
from oxfuse.runtime.errors import UserError
from oxfuse.runtime.generate import Chunk
from oxfuse.runtime.model import CompiledModel

from .scripted import THOUGHT, Script, scripted
from .speaking import TEMPLATE, harmony_tokenizer

LONG = "I think about it for much longer than the sliding layers remember what was before. " * 2
REPLIES = {
    "Hello": THOUGHT.format("They greet.", "Good day, 世界!"),
    "Why?": THOUGHT.format(LONG, "Because."),
    "Weather": "<|channel|>analysis<|message|>A tool.<|end|><|start|>assistant to=functions.weather<|channel|>commentary json"
    '<|message|>{"place": "Ulm"}<|call|>',
    "Both": "<|channel|>analysis<|message|>A tool.<|end|><|start|>assistant<|channel|>final<|message|>Let me see.<|end|>"
    "<|start|>assistant to=functions.weather<|channel|>commentary json<|message|>not JSON<|call|>",
    "Rain": THOUGHT.format("They know it.", "It rains."),
    "Broken": "No markers at all.<|return|>",
    "Markers": THOUGHT.format("Hm.", "A <|cha" + "nnel|> in text"),
    "Thoughts": f"<|channel|>analysis<|message|>{LONG}<|end|>",
}
PLAIN = (
    "{% for m in messages %}{% if m.role == 'user' %}<|start|>user<|message|>{{ m.content }}<|end|><|start|>assistant{% else %}"
    "<|message|>{{ m.content }}{% endif %}{% endfor %}"
)
"""A template without channels, whose next prompt begins with the last one and its whole reply."""


def nothing(chunk: Chunk) -> None:
    pass


@pytest.fixture
def talk() -> Iterator[Callable[..., tuple[Chat, CompiledModel, Script]]]:
    """Make chats with the scripted model; afterwards all of its blocks must be free."""
    made: list[tuple[Chat, CompiledModel]] = []

    def make(replies: dict[str, str] = REPLIES, max_new_tokens: int | None = None, **options: object) -> tuple:
        model, script = scripted(replies, **options)  # type: ignore[arg-type]
        chat = Chat(model, system=None, reasoning=None, max_new_tokens=max_new_tokens, stop=())
        made.append((chat, model))
        return chat, model, script

    yield make
    for chat, model in made:
        chat.close()
        assert model.scheduler.engine.used_blocks == 0 and not model.scheduler.running


def common(one: Sequence[int], other: Sequence[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def test_a_turn_runs_what_is_new(talk: Callable[..., tuple[Chat, CompiledModel, Script]]) -> None:
    """Also after a thought that is far longer than window and reserve: the prompt before it is still in the cache.

    Only what the template changes further back than the reserve makes everything run again: the thought before a call, once the
    call is answered.
    """
    chat, _, script = talk()
    before: list[int] = []
    reply: list[int] = []
    dropped = again = 0
    for said in ("Hello", "Why?", "Hello", "Weather", "Rain", "Broken", "Why?", "Hello"):
        ran, turn = script.ran, chat.turn(said, nothing)
        prompt, tokens = turn.generation.prompt_token_ids, turn.generation.token_ids
        shared = common([*before, *reply], prompt)
        if shared >= len(before):  # what the reply has in common, a marker as a rule, may be forgotten
            assert turn.reused in (shared, len(before))
        else:
            assert turn.reused in (shared, 0)
            again += not turn.reused
        dropped += shared < len(before) + len(reply) - 100
        assert script.ran - ran == len(prompt) - turn.reused + len(tokens) - 1
        assert script.encode(REPLIES[said])[: len(tokens)] == tokens
        before, reply = prompt, tokens[:-1]  # the stop token has not been run
    assert (dropped, again) == (2, 1)


def test_a_reply_that_the_template_keeps_is_not_run_again(talk: Callable[..., tuple[Chat, CompiledModel, Script]]) -> None:
    replies = {"Hello": "<|message|>Good day!<|return|>", "Why?": f"<|message|>{LONG}<|return|>"}
    chat, _, script = talk(replies, tokenizer=harmony_tokenizer(template=PLAIN))
    before: list[int] = []
    for said in ("Hello", "Why?", "Hello"):
        ran, turn = script.ran, chat.turn(said, nothing)
        found = turn.generation
        assert turn.reused == len(before) and found.channels is None and found.text == found.answer != ""
        assert script.ran - ran == len(found.prompt_token_ids) - len(before) + len(found.token_ids) - 1
        before = [*found.prompt_token_ids, *found.token_ids[:-1]]  # the stop token has not been run


def test_a_cache_without_room_for_a_copy(talk: Callable[..., tuple[Chat, CompiledModel, Script]]) -> None:
    """The reply may need every block: then the prompt is not kept aside, and the next turn runs more."""
    chat, model, script = talk(max_batch=1)
    chat.turn("Hello", nothing)
    chat.turn("Why?", nothing)
    ran, turn = script.ran, chat.turn("Hello", nothing)
    assert turn.reused == 0 and script.ran - ran == len(turn.generation.prompt_token_ids) + len(turn.generation.token_ids) - 1
    assert turn.generation.answer == "Good day, 世界!" and model.scheduler.engine.used_blocks


def test_the_context_fills_up(talk: Callable[..., tuple[Chat, CompiledModel, Script]]) -> None:
    chat, _, _ = talk(max_context=200)
    cut = chat.turn("Why?", nothing).generation
    assert cut.finish_reason == "length" and len(cut.prompt_token_ids) + len(cut.token_ids) == 200
    for said in ("Hello" * 20, "Hello" * 40):
        with pytest.raises(UserError, match=r"context of 200: begin a new one \(in a chat: /reset\)"):
            chat.turn(said, nothing)
    assert chat.turn("Hello", nothing).generation.answer, "the refused messages are forgotten"
    chat.reset()
    fresh = chat.turn("Hello", nothing)
    assert fresh.reused == 0 and fresh.generation.answer == "Good day, 世界!"


def test_a_template_that_refuses_leaves_the_chat_as_it_was(talk: Callable[..., tuple[Chat, CompiledModel, Script]]) -> None:
    chat, _, _ = talk()
    chat.turn("Hello", nothing)
    kept = [*chat._messages]
    with pytest.raises(UserError, match="no character"):
        chat.turn("\ud800", nothing)
    assert chat._messages == kept and chat.turn("Rain", nothing).generation.answer == "It rains."


def test_what_the_next_prompt_says_of_a_reply(talk: Callable[..., tuple[Chat, CompiledModel, Script]]) -> None:
    chat, _, script = talk()
    prompts = [chat.turn(said, nothing).generation.prompt_token_ids for said in ("Hello", "Weather", "Rain", "Hello")]
    texts = [script.tokenizer.decode(prompt, skip_special_tokens=False) for prompt in prompts]
    assert "<|channel|>final<|message|>Good day, 世界!<|end|>" in texts[1] and "They greet" not in texts[1]
    call = '<|start|>assistant to=functions.weather<|channel|>commentary json<|message|>{"place": "Ulm"}<|call|>'
    assert "<|channel|>analysis<|message|>A tool.<|end|>" + call in texts[2], "thoughts that led to an open call stay"
    assert call in texts[3] and "A tool." not in texts[3]
    assert chat.turn("Both", nothing).generation.answer == "Let me see."
    last = script.tokenizer.decode(chat.turn("Hello", nothing).generation.prompt_token_ids)
    assert 'commentary json"not JSON"' in last and "Let me see." not in last, "such templates take thoughts or text with a call"


def test_what_a_chat_needs() -> None:
    model, _ = scripted(REPLIES, tokenizer=harmony_tokenizer())
    options = {"system": None, "reasoning": None, "max_new_tokens": None}
    for template, wrong, reason in [
        (None, {}, "no chat template.*--tokenizer.*oxfuse generate"),
        (PLAIN, {"reasoning": "low"}, "takes no reasoning effort"),
        (TEMPLATE, {"max_new_tokens": 0}, "max_new_tokens"),
        (TEMPLATE, {"temperature": -1.0}, "temperature"),
    ]:
        model.tokenizer = harmony_tokenizer(template=template)
        with pytest.raises(UserError, match=reason):
            Chat(model, **{**options, "stop": (), **wrong})  # type: ignore[arg-type]
    model.tokenizer = None
    with pytest.raises(UserError, match="no tokenizer"):
        Chat(model, **options, stop=())  # type: ignore[arg-type]
    model.tokenizer = harmony_tokenizer()
    chat = Chat(model, system="Be brief.", reasoning="high", max_new_tokens=3, stop=())
    turn = chat.turn("Hello", nothing)
    said = model.tokenizer.decode(turn.generation.prompt_token_ids, skip_special_tokens=False)
    assert "Reasoning: high" in said and "<|start|>developer<|message|>Be brief.<|end|>" in said
    assert len(turn.generation.token_ids) == 3
    del chat, turn
    gc.collect()
    assert model.scheduler.engine.used_blocks == 0, "a forgotten chat keeps its blocks"


@pytest.fixture
def piped(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Run the command with lines in a pipe."""
    monkeypatch.setattr(oxfuse.runtime.chat, "read_manifest", lambda folder: None)
    monkeypatch.setattr(oxfuse.runtime.artifact, "load", lambda folder, **options: scripted(REPLIES)[0])

    def run(lines: str | bytes, *args: str) -> Result:
        result = CliRunner().invoke(oxfuse.runtime.chat.chat, ["somewhere", *args], input=lines)
        if result.exception:
            raise result.exception
        return result

    return run


def test_in_a_pipe_answers_come_alone(piped: Callable[..., Result]) -> None:
    result = piped("Hello\n\n  \nWeather\nBroken\n/help\n/nothing\n/reset\nHello")
    answers = ["Good day, 世界!", 'call functions.weather {"place": "Ulm"}', "No markers at all.", "Good day, 世界!"]
    assert result.stdout == "\n".join(answers) + "\n" and "\x1b" not in result.output
    assert "(text where a header should be" in result.stderr and "There is no command /nothing" in result.stderr
    assert "tokens/s" not in result.stderr and result.stderr.count("/reset") == 2
    assert piped("Hello\n/exit\nWhy?\n").stdout == "Good day, 世界!\n"
    cut = piped("Why?\n", "-n", "9")
    assert cut.stdout == "\n" and "cut off after 9 tokens" in cut.stderr


def test_json_in_a_pipe(piped: Callable[..., Result]) -> None:
    lines = [json.loads(line) for line in piped("Hello\nWeather\n", "--json", "--reasoning", "low").stdout.splitlines()]
    first, second = lines
    assert first["prompt"] == "Hello" and first["answer"] == first["channels"]["final"] == "Good day, 世界!"
    assert first["channels"]["analysis"] == "They greet." and first["finish_reason"] == "stop" and first["notes"] == []
    assert second["tool_calls"][0]["arguments"] == '{"place": "Ulm"}' and second["reused_tokens"] > 10
    assert second["prompt_tokens"] == len(second["prompt_token_ids"]) > second["reused_tokens"]


def test_what_is_wrong_in_a_pipe_ends_it(piped: Callable[..., Result]) -> None:
    with pytest.raises(UserError, match="Line 2 of standard input is not UTF-8 text: byte 1 is 0xff"):
        piped(b"Hello\nx\xff\n")
    with pytest.raises(UserError, match="fill the context"):
        piped("Hello" * 500)
    assert piped(b"\xef\xbb\xbfHello\r\n").stdout == "Good day, 世界!\n"


@pytest.mark.slow
def test_the_bundled_checkpoint_speaks_in_channels(tmp_path: Path) -> None:
    """Compiled, and asked through the command line as a user would."""
    checkpoint = Path(__file__).parents[2] / "artifacts" / "tiny-gpt-oss"
    artifact = oxfuse.compile(
        checkpoint, tmp_path / "artifact", dtype="float32"
    )  # in 16 bits what it says depends on the kernels
    messages = [{"role": "user", "content": "Write add(a, b)"}]
    model = oxfuse.load(artifact)
    (found,) = model.generate(messages, max_new_tokens=300)
    assert found.channels and found.channels.keys() == {"analysis", "final"} and found.answer.startswith("def ")
    assert found.finish_reason == "stop" and not found.notes
    chunks = [*model.stream(messages, max_new_tokens=300)]
    for channel, text in found.channels.items():
        assert "".join(chunk.text for chunk in chunks if chunk.channel == channel) == text
    (plain,) = model.generate("def read_file(path):", max_new_tokens=20)
    assert plain.channels is None and plain.text == model.tokenizer.decode(plain.token_ids)
    command = [sys.executable, "-m", "oxfuse", "chat", str(artifact), "--json", "-n", "300"]
    said = "Write add(a, b)\nWrite close(self)\n"
    done = subprocess.run(command, input=said, capture_output=True, text=True, check=True)
    first, second = map(json.loads, done.stdout.splitlines())
    assert first["channels"] == found.channels and first["token_ids"] == found.token_ids
    assert second["reused_tokens"] >= first["prompt_tokens"] < second["prompt_tokens"]


class Terminal:
    """A program at a terminal of its own."""

    def __init__(self, *args: str) -> None:
        self.screen = ""
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            root = Path(__file__).parents[2]
            os.chdir(root)
            os.environ["TERM"] = "xterm"
            os.execv(sys.executable, [sys.executable, "-m", "tests.runtime.scripted", *args])

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def until(self, pattern: str, timeout: float = 60.0) -> str:
        """What is on the screen from here to where `pattern` ends; that is then passed."""
        end = time.monotonic() + timeout
        while not (found := re.search(pattern, self.screen, re.DOTALL)):
            assert time.monotonic() < end, f"{pattern!r} does not come: {self.screen!r}"
            if select.select([self.fd], [], [], 0.2)[0]:
                try:
                    self.screen += os.read(self.fd, 65536).decode(errors="replace")
                except OSError:  # the program has ended
                    assert re.search(pattern, self.screen, re.DOTALL), f"ended without {pattern!r}: {self.screen!r}"
        shown, self.screen = self.screen[: found.end()], self.screen[found.end() :]
        return shown

    def end(self) -> int:
        """Wait for the program and return its exit code."""
        for _ in range(300):
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                os.close(self.fd)
                return os.waitstatus_to_exitcode(status)
            if select.select([self.fd], [], [], 0.1)[0]:
                try:
                    os.read(self.fd, 65536)
                except OSError:
                    time.sleep(0.1)
        os.kill(self.pid, signal.SIGKILL)
        raise AssertionError("the program does not end")


DIM, RESET = re.escape("\x1b[2m"), re.escape("\x1b[0m")


def test_at_a_terminal() -> None:
    """Replies with dimmed thoughts, Ctrl-C in the middle of one, the next turn, commands, and the end."""
    terminal = Terminal()
    terminal.until(r"scripted, context of 400 tokens.*\r\n> $")
    terminal.type("Hello\n")
    reply = terminal.until(r"tokens/s\)\)" + RESET + r"\r\n> $")
    assert re.search(f"{DIM}T.*{RESET}\r\nGood day to you!\r\n{DIM}\\(prompt .*; generated", reply, re.DOTALL)
    terminal.type("Count\n")
    terminal.until(" 4 5 ")
    terminal.type("\x03")
    rest = terminal.until(r"\(stopped\).*\r\n> $")
    assert " 59" not in rest and "Traceback" not in rest
    terminal.type("Hello \\\n")
    terminal.until(r"\. $")
    terminal.type("again\n")
    assert "Two lines." in terminal.until(r"tokens/s\)\)" + RESET + r"\r\n> $")
    terminal.type("/help\n")
    terminal.until(r"/exit   leave.*\r\n> $")
    terminal.type("/reset\n")
    terminal.until("> $")
    terminal.type("Hello\n")
    assert "Good day to you!" in terminal.until(r"tokens/s\)\)" + RESET + r"\r\n> $")
    time.sleep(0.5)  # Python misses a signal that comes between the prompt and the wait for a key
    terminal.type("\x03")
    assert terminal.end() == 0


def test_hidden_thoughts_and_the_end_of_input() -> None:
    terminal = Terminal("--hide-thinking")
    terminal.until(r"commands\..*\r\n> $")
    terminal.type("Hello\n")
    assert "greet" not in terminal.until(r"you!.*tokens/s\)\)" + RESET + r"\r\n> $")
    terminal.type("\x04")
    assert terminal.end() == 0


def test_ctrl_c_in_a_pipe_ends_the_program() -> None:
    program = subprocess.Popen(
        [sys.executable, "-m", "tests.runtime.scripted"],
        cwd=Path(__file__).parents[2],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert program.stdin and program.stdout and program.stderr
    program.stdin.write(b"Count\n")
    program.stdin.flush()
    assert program.stdout.read(4) == b"0 1 "
    program.send_signal(signal.SIGINT)
    assert program.wait(timeout=60) == 130 and b"Traceback" not in program.stderr.read()
