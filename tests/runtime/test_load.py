"""A mixed load of 200 requests gives what each gives alone, and leaves nothing behind: no block, no memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import oxfuse

from ..checkpoints import random_gpt_oss
from .load import ENDINGS, VOCAB, Request, ask, checksum_model, requests


def run(*args: str | Path) -> dict:
    """Run the load in a process of its own, whose malloc keeps all memory in one place, so that what it keeps can be told."""
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1"}
    command = [sys.executable, "-m", "tests.runtime.load", *map(str, args)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def grown(memory: list[int], slack: float) -> bool:
    """Tell whether memory grows from load to load. The first makes threads and buffers; what is idle may be kept for a while."""
    return min(memory[-2:]) - memory[0] > slack


def test_the_load_is_mixed() -> None:
    load = requests(200, 2000, VOCAB, seed=1)
    lengths = sorted(len(request.prompt) for request in load)
    assert (lengths[0], lengths[-1]) == (1, 2000) and lengths[60] < 20 and lengths[140] > 100 and lengths[180] > 700
    assert {request.ending for request in load} == {*ENDINGS}


def test_a_mixed_load_leaves_nothing_behind() -> None:
    found = run()
    assert not any(found["used"]) and found["steps"] > 300
    assert found["cache"] > 40e6, "too small to be noticed"
    assert not grown(found["memory"], 6e6), found["memory"]


@pytest.mark.slow
def test_a_mixed_load_on_a_compiled_artifact(tmp_path: Path) -> None:
    folder = random_gpt_oss(tmp_path / "checkpoint", max_position_embeddings=4096, dtype=torch.float32)
    found = run(oxfuse.compile(folder, tmp_path / "artifact", max_context=2048))
    assert not any(found["used"]) and found["steps"] > 300
    assert not grown(found["memory"], 16e6), found["memory"]


def test_idle_caches_take_no_memory() -> None:
    """Their pages are given back when the last block is, and what is written there next is as it should be."""
    model = checksum_model(8192)
    engine = model.scheduler.engine
    long = Request(prompt=[n % VOCAB for n in range(6000)], new=3, ending="whole", after=0)
    first = ask(model, long)
    assert all(pool.touched == 0 for pool in engine.pools) and not any(cache.any() for cache in engine.caches)
    with model.session() as session:
        session.prefill([5, 6, 7])
        assert ask(model, long) == first
        assert engine.pools[0].touched > 100, "memory was given back while a session was open"
        assert int(session.decode(8).argmax()) == ask(model, Request(prompt=[5, 6, 7, 8], new=1, ending="whole", after=0))[0]
    assert all(pool.touched == 0 for pool in engine.pools)
    assert ask(model, Request(prompt=[5], new=2, ending="stream", after=0)) and engine.pools[0].touched == 1
