"""Two processes on one artifact: each adds its caches and what a process needs, and the weights are there once."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import oxfuse

from ..checkpoints import random_gpt_oss
from .builds import Driver, ids_text

pytestmark = pytest.mark.slow
OTHER_BYTES = 6 << 20
"""What a process has besides: relocated pages of the programs, the buffers of a step. Seen: 0.4 MB after a load, 8 MB
after 920 tokens, their caches included."""


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of 130 MB, so that a copy of them could not hide."""
    place = tmp_path_factory.mktemp("large")
    checkpoint = random_gpt_oss(place / "checkpoint", vocab_size=64_000, hidden_size=256, head_dim=32)
    return oxfuse.compile(checkpoint, place / "artifact", max_context=1024)


def rollup(process: Driver) -> dict[str, int]:
    text = Path(f"/proc/{process.process.pid}/smaps_rollup").read_text()
    return {name: int(kilobytes) << 10 for name, kilobytes in re.findall(r"^(\w+):\s+(\d+) kB", text, re.MULTILINE)}


def weights_of(process: Driver) -> dict[str, int]:
    """Return the sizes of the mapping of the weights."""
    text = Path(f"/proc/{process.process.pid}/smaps").read_text()
    (entry,) = re.findall(r"^[0-9a-f]+-[0-9a-f]+ r--s.*weights\.safetensors\n((?:^\w+:.*\n)+)", text, re.MULTILINE)
    return {name: int(kilobytes) << 10 for name, kilobytes in re.findall(r"^(\w+):\s+(\d+) kB", entry, re.MULTILINE)}


def test_a_second_process_adds_its_caches_alone(library, artifact):
    ids = ids_text(range(1, 901))
    with Driver(library) as first, Driver(library) as second:
        grown = []
        for process in (first, second):
            process.call("sampler", "x")  # answers when torch's own libraries are loaded
            empty = rollup(process)
            process.call("load", "m", artifact)
            loaded = rollup(process)
            process.call("open", "s", "m")
            process.call("prefill", "s", ids)
            for _ in range(20):
                process.call("decode", "s", 5)
            full = rollup(process)
            grown.append((loaded["Anonymous"] - empty["Anonymous"], full["Anonymous"] - empty["Anonymous"]))
        info = first.info()
        weights, held = int(info["weight_bytes"]), int(info["cache_bytes"])
        assert weights > 120e6
        maps = [weights_of(process) for process in (first, second)]
        print(
            f"\nweights {weights:,}, caches {held:,}; anonymous memory after load and after 920 tokens: {grown}; mappings {maps}"
        )
        for after_load, after_run in grown:
            assert after_load < OTHER_BYTES
            assert after_run < OTHER_BYTES + held
        for mapped in maps:
            assert mapped["Rss"] > 60e6, "the weights are in use"
            assert mapped["Anonymous"] == mapped["Private_Dirty"] == mapped["Private_Clean"] == 0, mapped
            assert mapped["Pss"] < 0.6 * mapped["Rss"], "each process is charged half"
