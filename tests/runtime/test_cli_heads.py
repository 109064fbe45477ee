"""The commands classify, tag, answer and embed: where texts come from, what is printed, and how it ends."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from oxfuse.runtime.model import CompiledModel

from .commands import run
from .head_models import LABELS, TASKS, byte_tokenizer, spec, table_head, toy_head

TEXT = "Ada 👩‍👧 Löwe"
COMMANDS = {name: task for task, name in TASKS.items() if name != "generate"}
WIDTHS = {"classify": 5, "tag": 5, "answer": 2, "embed": 7}


def head(command: str, **options: Any) -> CompiledModel:
    task = COMMANDS[command]
    model = spec(task, LABELS if "classification" in task else (), pad=1)
    return toy_head(model, WIDTHS[command], **{"tokenizer": byte_tokenizer(), **options})[0]


Serve = Callable[..., CompiledModel]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    """Make `load` return a model; afterwards its blocks must be free."""
    served: list[CompiledModel] = []

    def make(model: str | CompiledModel, **options: Any) -> CompiledModel:
        served.append(head(model, **options) if isinstance(model, str) else model)
        monkeypatch.setattr("oxfuse.runtime.artifact.load", lambda folder, **_: served[-1])
        return served[-1]

    yield make
    assert all(model.scheduler.engine.used_blocks == 0 for model in served)


@pytest.mark.parametrize("command", ["classify", "tag", "embed"])
@pytest.mark.parametrize("given", ["-p", "-f", "-f -", "-", "newline", "byte order mark"])
def test_the_text_comes_from_anywhere(serve: Serve, tmp_path: Path, command: str, given: str) -> None:
    serve(command)
    file = tmp_path / "text.txt"
    file.write_bytes({"newline": b"%s\n", "byte order mark": b"\xef\xbb\xbf%s"}.get(given, b"%s") % TEXT.encode())
    args = {"-p": ["-p", TEXT], "-f -": ["-f", "-"], "-": ["-"]}.get(given, ["-f", file])
    plain = run(command, "DIR", "-p", TEXT)
    ran = run(command, "DIR", *args, stdin=TEXT)
    assert plain.code == ran.code == 0 and ran.out == plain.out != "" and "Traceback" not in ran.err
    assert json.loads(run(command, "DIR", *args, "--json", stdin=TEXT).out)["text"] == TEXT
    assert run(command, "DIR", *args, "-q", stdin=TEXT).err == ""


def test_classify_prints_a_line_a_label(serve: Serve) -> None:
    (found,) = serve("classify").classify(TEXT)
    lines = run("classify", "DIR", "-p", TEXT).out.splitlines()
    ranked = sorted(found.scores.items(), key=lambda item: -item[1])
    assert [line.split() for line in lines] == [[f"{score:.4f}", label] for label, score in ranked]
    assert lines[0].endswith(found.label)
    told = json.loads(run("classify", "DIR", "-p", TEXT, "--json").out)
    assert told == {
        "text": TEXT,
        "label": found.label,
        "score": found.score,
        "labels": [found.label],
        "scores": found.scores,
    }


def test_tag_prints_entities_or_tokens(serve: Serve) -> None:
    tokenizer = byte_tokenizer()
    values = dict.fromkeys(tokenizer.encode("A")[1:], (0.0, 5.0, 0.0, 0.0, 0.0))
    values |= dict.fromkeys(tokenizer.encode("da")[1:], (0.0, 0.0, 5.0, 0.0, 0.0))
    (found,) = serve(table_head(spec("token-classification", LABELS), values, 5, tokenizer)).tag(TEXT)
    assert [(span.text, span.label) for span in found.entities] == [("Ada", "PER")]
    (line,) = run("tag", "DIR", "-p", TEXT).out.splitlines()
    assert line.split() == ["0–3", "PER", f"{found.entities[0].score:.4f}", "'Ada'"]
    lines = run("tag", "DIR", "-p", TEXT, "--tokens").out.splitlines()
    assert len(lines) == len(found.tokens) == len(TEXT.encode())
    assert lines[0].split() == ["0–1", "B-PER", f"{found.tokens[0].score:.4f}", "'A'"]
    told = json.loads(run("tag", "DIR", "-p", TEXT, "--json").out)
    assert told["text"] == TEXT and len(told["tokens"]) == len(lines)
    assert told["entities"] == [{"text": "Ada", "start": 0, "end": 3, "label": "PER", "score": found.entities[0].score}]
    assert all(TEXT[span["start"] : span["end"]] == span["text"] for span in told["tokens"])
    nothing = run("tag", "DIR", "-p", "xyz")
    assert (nothing.code, nothing.out) == (0, "")


@pytest.mark.parametrize("pool", ["mean", "last", "none", None])
def test_embed_prints_arrays(serve: Serve, pool: str | None) -> None:
    (found,) = serve("embed").embed(TEXT)
    expected = (found.hidden if pool == "none" else found.last if pool == "last" else found.mean).tolist()
    args = ["--pool", pool] if pool else []
    array = json.loads(run("embed", "DIR", "-p", TEXT, *args).out)
    told = json.loads(run("embed", "DIR", "-p", TEXT, *args, "--json").out)
    for got in (array, told.pop("embedding")):
        assert len(got) == len(expected)
        if pool == "none":
            assert all(row == pytest.approx(other, abs=1e-5) for row, other in zip(got, expected, strict=True))
        else:
            assert got == pytest.approx(expected, abs=1e-5)
    assert told == {"text": TEXT, "token_ids": found.token_ids, "offsets": [list(place) for place in found.offsets]}


@pytest.mark.parametrize("command", ["classify", "tag", "embed"])
def test_several_texts_are_told_apart(serve: Serve, tmp_path: Path, command: str) -> None:
    serve(command)
    texts = ["one", "two\nlines", "one"]
    ran = run(command, "DIR", *[part for text in texts for part in ("-p", text)])
    alone = [run(command, "DIR", "-p", text).out for text in texts]
    if command == "embed":  # an array a line
        arrays = [json.loads(line) for line in ran.out.splitlines()]
        assert arrays == [pytest.approx(json.loads(each), abs=1e-5) for each in alone]
    else:
        parts = ran.out.split("==> ")[1:]
        assert [part.partition(" <==\n")[0] for part in parts] == ["1", "2", "3"]
        assert [part.partition(" <==\n")[2] for part in parts] == alone
    for number, text in enumerate(texts):
        (tmp_path / str(number)).write_text(text)
    files = [part for number in range(3) for part in ("-f", tmp_path / str(number))]
    assert run(command, "DIR", *files).out == ran.out
    told = [json.loads(line) for line in run(command, "DIR", *files, "--json").out.splitlines()]
    assert [each["text"] for each in told] == texts


def test_answer_prints_the_best_or_several(serve: Serve, tmp_path: Path) -> None:
    model = serve("answer")
    context = "Ada Löwe\n lebte in 東京."
    found = model.answer("Who?", context, top_k=3)
    (tmp_path / "context.txt").write_text(context + "\n")
    for args in (["-c", context], ["--context", context], ["-f", tmp_path / "context.txt"], ["-f", "-"]):
        ran = run("answer", "DIR", "-p", "Who?", *args, stdin=context)
        assert (ran.code, ran.out) == (0, f"{found.text}\n")
        lines = run("answer", "DIR", "-p", "Who?", *args, "--top-k", "3", stdin=context).out.splitlines()
        each = (found, *found.alternatives)
        assert len(lines) == 3
        for line, span in zip(lines, each, strict=True):
            assert line.split(maxsplit=2) == [f"{span.start}–{span.end}", f"{span.score:.4f}", repr(span.text)]
    told = json.loads(run("answer", "DIR", "-p", "Who?", "-c", context, "--top-k", "3", "--json").out)
    assert told["question"] == "Who?" and told["text"] == found.text == context[told["start"] : told["end"]]
    assert [other["text"] for other in told["alternatives"]] == [other.text for other in found.alternatives]
    short = json.loads(run("answer", "DIR", "-p", "Who?", "-c", context, "--max-answer-tokens", "1", "--json").out)
    assert len(short["text"]) == 1
    assert run("answer", "DIR", "-p", "Who?", "-c", context, "-q").err == ""


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_page_has_examples_that_parse(
    serve: Serve, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(command)
    monkeypatch.chdir(tmp_path)
    for name in ("review.txt", "letter.txt", "report.txt", "one.txt", "two.txt"):
        (tmp_path / name).write_text("Ada wrote it in 1843.")
    page = run(command, "--help")
    assert page.code == 0 and page.err == ""
    for words in ("Usage: oxfuse", "DIR", "--threads", "--json", "--quiet", "-p, --prompt", "-f, --file", "Examples:"):
        assert words in page.out, words
    examples = [line.strip() for line in page.out.partition("Examples:\n")[2].splitlines() if line.strip()]
    assert len(examples) >= 2
    for example in examples:
        words = shlex.split(example.partition(" | ")[0].partition(" > ")[0])
        assert words[:2] == ["oxfuse", command]
        ran = run(*words[1:])
        assert ran.code == 0 and ran.out, example
    assert f"  {command} " in run("--help").out


TEXTS = [command for command in COMMANDS if command != "answer"]
WRONG: list[tuple[str, list[str], str]] = [
    *((command, [], "in one way") for command in TEXTS),
    *((command, ["-p", "x", "-"], "in one way") for command in TEXTS),
    *((command, ["x"], "Unexpected argument 'x'") for command in TEXTS),
    *((command, ["-f", "nowhere"], "nowhere cannot be read") for command in TEXTS),
    *((command, ["-p", ""], "no tokens") for command in TEXTS),
    *((command, ["-p", "a\udcff"], "not UTF-8") for command in TEXTS),
    *((command, ["-p", "x" * 96], "The text has 97 tokens, max_context is 96") for command in TEXTS),
    ("tag", ["-p", "x", "--token"], "--tokens"),
    ("embed", ["-p", "x", "--pool", "max"], "'mean', 'last', 'none'"),
    ("answer", [], "--prompt"),
    ("answer", ["-p", "Who?"], "in one way: --context TEXT, or -f FILE"),
    ("answer", ["-p", "Who?", "-c", "x", "-f", "y"], "in one way: --context TEXT, or -f FILE"),
    ("answer", ["-p", "Who?", "-f", "nowhere"], "nowhere cannot be read"),
    ("answer", ["-p", "Who?", "-c", ""], "context is empty"),
    ("answer", ["-p", "", "-c", "x"], "question is empty"),
    ("answer", ["-p", "Who?", "-c", "a\udcff"], "UTF-8"),
    ("answer", ["-p", "a\udcff", "-c", "x"], "UTF-8"),
    ("answer", ["-p", "Who?" * 30, "-c", "x"], "no room for the context"),
    ("answer", ["-p", "Who?", "-c", "x", "--top-k", "0"], "top_k is 0"),
    ("answer", ["-p", "Who?", "-c", "x", "--max-answer-tokens", "-1"], "max_answer_tokens is -1"),
    ("answer", ["-p", "Who?", "-c", "x", "--top-k", "few"], "'few'"),
]


@pytest.mark.parametrize(("command", "args", "message"), WRONG)
def test_what_a_user_gets_wrong_is_one_line(serve: Serve, command: str, args: list[str], message: str) -> None:
    tokenizer = byte_tokenizer(special=args != ["-p", ""])  # else <s> is a token
    serve(command, tokenizer=tokenizer)
    ran = run(command, "DIR", *args)
    assert ran.code == 2 and ran.out == "" and ran.err.startswith("oxfuse: error: ")
    assert message in ran.err and ran.err.count("\n") == 1 and "Traceback" not in ran.err


@pytest.mark.parametrize("command", COMMANDS)
def test_an_artifact_for_another_task(serve: Serve, command: str) -> None:
    text = ["-p", "Who?", *(["-c", "Ada."] if command == "answer" else [])]
    for other, task in COMMANDS.items():
        if other != command:
            serve(other)
            ran = run(command, "DIR", *text)
            assert ran.code == 2 and ran.out == "" and ran.err.count("\n") == 1
            assert f"is for {task}" in ran.err and f"--task {COMMANDS[command]}" in ran.err


@pytest.mark.parametrize("command", COMMANDS)
def test_without_a_tokenizer(serve: Serve, command: str) -> None:
    serve(command, tokenizer=None)
    ran = run(command, "DIR", "-p", "x", *(["-c", "Ada."] if command == "answer" else []))
    assert ran.code == 2 and "no tokenizer" in ran.err and "--tokenizer" in ran.err and ran.err.count("\n") == 1


@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_that_is_no_artifact(tmp_path: Path, command: str) -> None:
    ran = run(command, tmp_path, "-p", "x", *(["-c", "Ada."] if command == "answer" else []))
    assert ran.code == 2 and "not an oxfuse artifact" in ran.err and ran.err.count("\n") == 1


def test_bytes_that_are_no_text(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "bad").write_bytes(b"ab\xff")
    serve("tag")
    for ran in (run("tag", "DIR", "-f", tmp_path / "bad"), run("tag", "DIR", "-", stdin=b"ab\xff")):
        assert ran.code == 2 and "byte 2 is 0xff" in ran.err and ran.err.count("\n") == 1
    serve("answer")
    ran = run("answer", "DIR", "-p", "x", "-f", tmp_path / "bad")
    assert ran.code == 2 and "byte 2 is 0xff" in ran.err and ran.err.count("\n") == 1


def test_a_manifest_whose_head_is_not_its_programs(copy: Path) -> None:
    """The tiny artifact gives 4096 logits a token; its manifest now says that they are two labels."""
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["model"] |= {"task": "text-classification", "labels": ["good", "bad"], "pooling": "rightmost"}
    (copy / "manifest.json").write_text(json.dumps(manifest))
    ran = run("classify", copy, "-p", "x")
    assert ran.code == 2 and "gives 4096 values" in ran.err and "expected 2" in ran.err and ran.err.count("\n") == 1
