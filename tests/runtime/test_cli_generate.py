"""`oxfuse generate`: where prompts come from, what is printed where, and how it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from oxfuse.runtime import cli, load
from oxfuse.runtime.machine import Processors

from .commands import OXFUSE, finish, run
from .tiny_artifact import digest

PROMPT = "w17 w4"
SPEED = "tokens/s"

SLOW = """
import sys, time
from oxfuse.runtime.program import Program
call = Program.__call__
def slow(self, inputs):
    time.sleep(0.2)
    return call(self, inputs)
Program.__call__ = slow
from oxfuse.__main__ import main
main()
"""
"""The command line, every step made slow enough to be interrupted in between."""


@pytest.fixture(scope="module")
def text(worded: Path) -> str:
    return load(worded).generate(PROMPT, max_new_tokens=6)[0].text


@pytest.mark.parametrize("given", ["-p", "-f", "-f -", "-", "newline", "byte order mark"])
def test_the_prompt_comes_from_anywhere(worded: Path, tmp_path: Path, given: str, text: str) -> None:
    file = tmp_path / "prompt.txt"
    file.write_bytes({"newline": b"%s\n", "byte order mark": b"\xef\xbb\xbf%s"}.get(given, b"%s") % PROMPT.encode())
    args = {"-p": ["-p", PROMPT], "-f -": ["-f", "-"], "-": ["-"]}.get(given, ["-f", file])
    ran = run("generate", worded, *args, "-n", "6", stdin=PROMPT)
    assert (ran.code, ran.out) == (0, text + "\n")
    assert "prompt 2 tokens in" in ran.err and "generated 6 tokens in" in ran.err and ran.err.endswith("; length\n")
    assert json.loads(run("generate", worded, *args, "-n", "1", "--json", stdin=PROMPT).out)["prompt"] == PROMPT


def test_only_the_last_newline_is_dropped(worded: Path) -> None:
    assert json.loads(run("generate", worded, "-", "-n", "1", "--json", stdin="w1\n\n").out)["prompt"] == "w1\n"


def test_quiet_leaves_stderr_empty(worded: Path, text: str) -> None:
    assert run("generate", worded, "-p", PROMPT, "-n", "6", "-q").err == ""
    assert SPEED in run("generate", worded, "-p", PROMPT, "-n", "6").err


def test_several_prompts_are_told_apart(worded: Path, tmp_path: Path, text: str) -> None:
    ran = run("generate", worded, "-p", PROMPT, "-p", PROMPT, "-n", "6")
    assert ran.out == f"==> 1 <==\n{text}\n==> 2 <==\n{text}\n" and "length" not in ran.err
    for name in ("a", "b"):
        (tmp_path / name).write_text(PROMPT)
    assert run("generate", worded, "-f", tmp_path / "a", "-f", tmp_path / "b", "-n", "6").out == ran.out


def test_prompts_that_begin_alike_are_told(worded: Path) -> None:
    prompt = " ".join(f"w{n}" for n in range(9))
    twice = ["generate", worded, "-p", prompt, "-p", prompt, "-n", "2"]
    ran = run(*twice)
    assert "prompt 10 tokens in" in ran.err and "8 of 18 prompt tokens reused" in ran.err
    off = run(*twice, "--prefix-cache-bytes", "0")
    assert off.out == ran.out and "prompt 18 tokens in" in off.err and "reused" not in off.err
    found = [json.loads(line)["reused_tokens"] for line in run(*twice, "--json").out.splitlines()]
    assert found == [0, 8]
    refused = run(*twice, "--prefix-cache-bytes", "-1")
    assert refused.code == 2 and "prefix_cache_bytes is -1" in refused.err


def test_json_has_a_line_for_each_prompt_in_order(worded: Path, text: str) -> None:
    ran = run("generate", worded, "-p", PROMPT, "-p", "w5", "-p", PROMPT, "-n", "6", "--json", "--logprobs")
    first, second, third = map(json.loads, ran.out.splitlines())
    assert first["text"] == third["text"] == text and first["prompt"] == PROMPT and second["prompt"] == "w5"
    assert first["finish_reason"] == "length" and first["prompt_tokens"] == 2 and first["new_tokens"] == 6
    assert len(first["prompt_token_ids"]) == 2 and len(first["token_ids"]) == len(first["logprobs"]) == 6
    assert 0 < first["seconds"] < 60
    alone = load(worded).generate("w5", max_new_tokens=6, logprobs=True)[0].logprobs
    assert second["logprobs"] == pytest.approx(alone, abs=1e-4)


def test_a_prompt_that_fills_the_context_has_no_reply(worded: Path) -> None:
    found = json.loads(run("generate", worded, "-p", " ".join(["w9"] * 48), "--json").out)
    assert found["prompt_tokens"] == 48 and found["new_tokens"] == 0 and found["finish_reason"] == "length"


def test_stop_tokens_and_the_end_of_text(copy: Path) -> None:
    ids = load(copy).generate(PROMPT, max_new_tokens=6)[0].token_ids
    stopped = json.loads(run("generate", copy, "-p", PROMPT, "--stop-token", str(ids[2]), "--json").out)
    assert stopped["token_ids"] == ids[:3] and stopped["finish_reason"] == "stop"
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["generation"]["eos_token_ids"] = [ids[1]]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    for extra, expected in (
        ([], ids[:2]),
        (["--stop-token", str(ids[2])], ids[:2]),
        (["--ignore-eos"], ids),
        (["--ignore-eos", "--stop-token", str(ids[2])], ids[:3]),
    ):
        assert json.loads(run("generate", copy, "-p", PROMPT, "-n", "6", "--json", *extra).out)["token_ids"] == expected


def test_stop_strings(worded: Path, text: str) -> None:
    part = text[3:8]
    ran = run("generate", worded, "-p", PROMPT, "-n", "6", "--stop", part, "--stop", "never")
    assert ran.out == text.partition(part)[0] + "\n" and ran.err.endswith("; stop\n")


def test_chat_goes_through_the_template(copy: Path) -> None:
    (copy / "chat_template.jinja").write_text("{% for m in messages %}[{{ m.role }}:{{ m.content }}]{% endfor %}")
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["tokenizer_files"]["chat_template.jinja"] = digest(copy / "chat_template.jinja")
    (copy / "manifest.json").write_text(json.dumps(manifest))
    tokenizer = load(copy).tokenizer
    assert tokenizer is not None
    for extra, rendered in ((["--chat"], "[user:hi]"), (["--system", "be"], "[system:be][user:hi]")):
        found = json.loads(run("generate", copy, "-p", "hi", "-n", "2", "--json", *extra).out)
        assert found["prompt"] == "hi" and found["prompt_token_ids"] == tokenizer.encode(rendered)
    assert json.loads(run("generate", copy, "-p", "hi", "-n", "2", "--json").out)["prompt_token_ids"] == tokenizer.encode("hi")


def test_the_same_seed_gives_the_same_text(worded: Path) -> None:
    options = ["generate", worded, "-p", PROMPT, "-n", "12", "--temperature", "1.5", "--top-k", "50", "--top-p", "0.9"]
    options += ["--min-p", "0.001", "--repetition-penalty", "1.1", "-q"]
    one, again, other = (run(*options, "--seed", seed).out for seed in "778")
    assert one == again != other


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "in one way"),
        (["-p", "x", "-"], "in one way"),
        (["-p", "x", "-f", "y"], "in one way"),
        (["x"], "Unexpected argument 'x'"),
        (["-f", "nowhere"], "nowhere cannot be read as a prompt: No such file"),
        (["-f", "."], "Is a directory"),
        (["-p", ""], "no tokens"),
        (["-p", "a\udcff"], "not UTF-8"),
        (["-p", " ".join(["w9"] * 49)], "max_context is 48"),
        (["-p", "x", "--top-p", "7"], "top_p"),
        (["-p", "x", "--temperature", "-1"], "temperature"),
        (["-p", "x", "--temperature", "nan"], "temperature"),
        (["-p", "x", "-n", "0"], "max_new_tokens"),
        (["-p", "x", "-n", "many"], "not a valid integer"),
        (["-p", "x", "--stop", ""], "stop"),
        (["-p", "x", "--stop-token", "99999"], "99999"),
        (["-p", "x", "--threads", "0"], "threads"),
        (["-p", "x", "--logprobs"], "--json"),
        (["-p", "x", "--chat"], "chat template"),
        (["-p", "x", "--temprature", "1"], "--temperature"),
    ],
)
def test_what_a_user_gets_wrong_is_one_line(worded: Path, args: list[str], message: str) -> None:
    ran = run("generate", worded, *args)
    assert ran.code == 2 and ran.out == "" and ran.err.startswith("oxfuse: error: ")
    assert message in ran.err and ran.err.count("\n") == 1 and "Traceback" not in ran.err


def test_bytes_that_are_no_text(worded: Path, tmp_path: Path) -> None:
    (tmp_path / "bad").write_bytes(b"ab\xff")
    for ran in (run("generate", worded, "-f", tmp_path / "bad"), run("generate", worded, "-", stdin=b"ab\xff")):
        assert ran.code == 2 and "byte 2 is 0xff" in ran.err and ran.err.count("\n") == 1


def test_a_prompt_without_end_is_refused(worded: Path) -> None:
    ran = run("generate", worded, "-f", "/dev/zero")
    assert ran.code == 2 and f"{cli.LARGEST_PROMPT:,}" in ran.err


def test_a_folder_that_is_no_artifact(tmp_path: Path) -> None:
    ran = run("generate", tmp_path, "-p", "x")
    assert ran.code == 2 and "not an oxfuse artifact" in ran.err


def test_an_interrupt_keeps_what_was_written(worded: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, "generate", str(worded), "-p", PROMPT], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    first = os.read(process.stdout.fileno(), 1)
    process.send_signal(signal.SIGINT)
    ran = finish(process)
    whole = load(worded).generate(PROMPT)[0].text
    written = first.decode() + ran.out
    assert ran.code == 130 and written.endswith("\n") and whole.startswith(written[:-1]) and len(written) < len(whole)
    assert "; interrupted\n" in ran.err and ran.err.endswith("oxfuse: interrupted\n") and "Traceback" not in ran.err


@pytest.mark.parametrize("extra", [[], ["--json", "-p", "w2", "-p", "w3", "-n", "3"]])
def test_a_closed_pipe_ends_it_silently(worded: Path, extra: list[str]) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, "generate", str(worded), "-p", PROMPT, *extra],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()  # as `| head -0` does
    err = process.stderr.read()
    assert process.wait(60) == 1 and err == b""


def test_a_closed_standard_input(worded: Path) -> None:
    command = " ".join([*OXFUSE, "generate", str(worded), "- <&-"])
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode == 2 and "standard input is closed" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("asked", "quota", "torch_takes", "used"),
    [(None, None, 8, None), (None, 2.0, 8, 2), (None, 2.0, 1, None), (5, 2.0, 8, 5), (None, 0.5, 8, 1)],
)
def test_threads_stay_within_the_container(
    monkeypatch: pytest.MonkeyPatch, asked: int | None, quota: float | None, torch_takes: int, used: int | None
) -> None:
    monkeypatch.setattr(cli, "processors", lambda: Processors(model="x", count=8, quota=quota))
    monkeypatch.setattr(torch, "get_num_threads", lambda: torch_takes)
    assert cli.usable_threads(asked) == used
