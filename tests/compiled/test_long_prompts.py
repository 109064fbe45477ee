"""Long prompts run in chunks: beside the caches they take no more memory than short ones, and come again for nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import oxfuse
from oxfuse.runtime.cache_size import PREFILL_CHUNK

from ..checkpoints import random_gpt_oss

LONG = 24 * PREFILL_CHUNK

PEAKS = """
import ctypes, json, sys
import oxfuse

def figure(name):
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(name))

model = oxfuse.load(sys.argv[1], prefix_cache_bytes=0)
engine, found = model.scheduler.engine, []
for length in map(int, sys.argv[2:]):
    with model.session() as session:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # VmHWM begins anew
        before = figure("VmRSS:")
        session.prefill([7 * n % 200 for n in range(length)])
        caches = sum(pool.touched * size for pool, size in zip(engine.pools, engine.block_bytes))
        found.append([figure("VmHWM:") - before, caches])
print(json.dumps(found))
"""
"""A process of its own: the growth of its peak in a prefill of each length, and the bytes of the caches that it wrote."""


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("long")
    return oxfuse.compile(random_gpt_oss(place / "checkpoint", max_position_embeddings=32768), place / "artifact", max_batch=2)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_peak_memory_grows_with_the_caches_alone(artifact: Path) -> None:
    lengths = [2 * PREFILL_CHUNK] * 2 + [LONG]  # the first makes buffers
    command = [sys.executable, "-c", PEAKS, str(artifact), *map(str, lengths)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (_, (short, short_caches), (long, long_caches)) = json.loads(done.stdout.splitlines()[-1])
    print(f"\npeaks: {short:,} with caches of {short_caches:,}; {long:,} with caches of {long_caches:,}")
    assert long_caches > 4 * short_caches > 0
    assert long - long_caches < short - min(short, short_caches) + 4e6


@pytest.mark.slow
def test_a_long_prompt_that_comes_again(artifact: Path) -> None:
    """Across windows and chunks: the tokens that it gets without a prefix cache."""
    ids = [(7 * n + n * n // 13) % 200 for n in range(5 * PREFILL_CHUNK + 100)]
    expected = oxfuse.load(artifact, prefix_cache_bytes=0).generate(ids, max_new_tokens=8, stop_token_ids=[])[0]
    assert expected.reused_tokens == 0 and len(set(expected.token_ids)) > 1
    with oxfuse.load(artifact) as model:
        for reused in (0, len(ids) - 1):
            (found,) = model.generate(ids, max_new_tokens=8, stop_token_ids=[])
            assert found.token_ids == expected.token_ids
            assert found.reused_tokens == reused // 16 * 16
