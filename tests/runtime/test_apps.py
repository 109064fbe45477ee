"""Models inside other people's programs: many threads, many sessions, several models and processes, nothing on stdout."""

from __future__ import annotations

import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import oxfuse
from oxfuse.errors import UserError

THREADS, REQUESTS = 8, 20


def prompt(thread: int, request: int) -> list[int]:
    generator = torch.Generator().manual_seed(1000 * thread + request)
    length = 1 + int(torch.randint(0, 40, (1,), generator=generator))
    return torch.randint(0, 200, (length,), generator=generator).tolist()


def test_eight_threads_get_the_tokens_of_one(compiled) -> None:
    """Each of 160 requests, which share steps, against the same request alone."""
    _, _, artifact = compiled("base")
    model = oxfuse.load(artifact)

    def ask(thread: int) -> list[list[int]]:
        prompts = [prompt(thread, request) for request in range(REQUESTS)]
        return [list(model.generate(ids, max_new_tokens=6, stop_token_ids=[])[0].token_ids) for ids in prompts]

    with ThreadPoolExecutor(THREADS) as pool:
        together = [*pool.map(ask, range(THREADS))]
    assert model.scheduler.engine.used_blocks == 0
    alone = oxfuse.load(artifact)
    for thread, found in enumerate(together):
        for request, tokens in enumerate(found):
            (expected,) = alone.generate(prompt(thread, request), max_new_tokens=6, stop_token_ids=[])
            assert tokens == list(expected.token_ids), (thread, request)
    assert len({tuple(tokens) for found in together for tokens in found}) > 0.9 * THREADS * REQUESTS


def test_a_model_closes(compiled, tmp_path: Path) -> None:
    """Its weights are no longer mapped; what runs ends with an error, and so does what comes later."""
    place = shutil.copytree(compiled("base")[2], tmp_path / "copy")
    with oxfuse.load(place) as model:
        session, stream = model.session(), model.stream([1, 2, 3], max_new_tokens=50, stop_token_ids=[])
        session.prefill([4, 5])
        next(stream)
    for use in (lambda: model.generate([1]), lambda: next(stream), lambda: session.decode(1), lambda: model.logits([[1, 2]])):
        with pytest.raises(UserError, match="The model is closed"):
            use()
    session.close()
    model.close()
    assert model.scheduler.engine.used_blocks == 0
    assert str(place / "weights.safetensors") not in Path("/proc/self/maps").read_text()


SESSIONS = """
import sys
import oxfuse

def anonymous():
    with open("/proc/self/smaps_rollup") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith("Anonymous:"))

def use(count):
    for number in range(count):
        with model.session() as session:
            session.prefill([number % 200, 7, 9])
            session.decode(5)

model = oxfuse.load(sys.argv[1])
use(100)  # what is allocated once
before = anonymous()
use(1000)
print(anonymous() - before, model.scheduler.engine.used_blocks)
"""


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux's /proc")
def test_a_thousand_sessions_leave_nothing(compiled) -> None:
    """In a process of its own, in which nothing else takes memory."""
    command = [sys.executable, "-c", SESSIONS, str(compiled("base")[2])]
    growth, blocks = map(int, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
    assert growth < 1 << 20 and blocks == 0


KEPT = """
import sys
import oxfuse

def anonymous():
    with open("/proc/self/smaps_rollup") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith("Anonymous:"))

def use(begin, end):
    for number in range(begin, end):
        with model.session() as session:
            session.prefill([number % 200, number // 200, *range(120)])

bound = int(sys.argv[2])
model = oxfuse.load(sys.argv[1], prefix_cache_bytes=bound)
use(0, 20)
before, engine = anonymous(), model.scheduler.engine
use(20, 1000)
print(anonymous() - before, engine.used_blocks, engine.prefixes.kept_bytes, sum(engine.block_bytes))
"""


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux's /proc")
def test_what_sessions_leave_for_others_is_bounded(compiled) -> None:
    """A thousand prompts, none of which begins as another, and 30 MB of keys and values."""
    bound = 6 << 20
    command = [sys.executable, "-c", KEPT, str(compiled("base")[2]), str(bound)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    growth, blocks, kept, pair = map(int, done.stdout.split())
    assert blocks == 0 and bound - 2 * pair < kept <= bound
    assert growth < bound + (4 << 20), "the blocks, and what is known of each"


def test_requests_that_are_given_up_return_their_memory(compiled) -> None:
    model = oxfuse.load(compiled("base")[2])
    for number in range(50):
        stream = model.stream(prompt(0, number), max_new_tokens=30, stop_token_ids=[])
        for _ in range(number % 3):
            next(stream)
        stream.close()
        assert model.scheduler.engine.used_blocks == 0, number


WORKER = """
import sys
import oxfuse
first, second = (oxfuse.load(path) for path in sys.argv[1:])
for model in (first, second):
    for ids in ([1, 2, 3], list(range(40))):
        model.generate(ids, max_new_tokens=4, stop_token_ids=[])
print("ready", file=sys.stderr, flush=True)
sys.stdin.readline()
"""


def mapped(pid: int, file: Path) -> dict[str, int]:
    """Return the bytes of a file's pages that a process has, by kind, as Linux tells in smaps."""
    found: dict[str, int] = {}
    inside = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        name, _, value = line.partition(":")
        if value.strip().endswith("kB") and inside:
            found[name] = found.get(name, 0) + 1024 * int(value.split()[0])
        elif "-" in name.split(" ")[0] and not value.strip().endswith("kB"):
            inside = line.endswith(str(file))
    return found


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux's /proc")
def test_two_models_in_each_of_two_processes_share_weights(compiled) -> None:
    """Through the page cache: no process has a page of them for itself. Nothing goes to stdout."""
    places = [compiled(name)[2] for name in ("base", "mxfp4")]
    command = [sys.executable, "-c", WORKER, *map(str, places)]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    workers = [subprocess.Popen(command, **pipes) for _ in "ab"]  # type: ignore[call-overload]
    try:
        for worker in workers:
            lines = iter(worker.stderr.readline, "")
            assert any(line == "ready\n" for line in lines)
        for place in places:
            file = place / "weights.safetensors"
            for worker in workers:
                pages = mapped(worker.pid, file)
                assert pages["Rss"] > 0.5 * file.stat().st_size
                assert pages["Private_Dirty"] == pages["Private_Clean"] == pages["Anonymous"] == 0
                assert pages["Pss"] < 0.75 * pages["Rss"]
    finally:
        outs = [worker.communicate("\n")[0] for worker in workers]
    assert outs == ["", ""] and [worker.returncode for worker in workers] == [0, 0]
