"""The parts of the memory benchmark: the kernel's figures are read right, trees are whole, checkpoints are whole and valid."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from oxfuse.compiler.bench.memory import MemoryResult
from oxfuse.compiler.bench.random_checkpoint import layers_of, write_checkpoint
from oxfuse.compiler.process_memory import MemoryUse, MemoryWatch, memory_of, process_tree
from oxfuse.models.load import load_reference

pytestmark = pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux's /proc")
MB = 1 << 20
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "head_dim": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "vocab_size": 101,
}


def test_anonymous_memory_is_counted() -> None:
    before = memory_of(os.getpid())
    held = bytearray(b"x") * (64 * MB)
    after = memory_of(os.getpid())
    assert 60 * MB < after.anonymous - before.anonymous < 80 * MB
    assert abs(after.file - before.file) < 16 * MB
    del held


def test_mapped_file_is_counted_apart(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * (32 * MB))
    before = memory_of(os.getpid())
    storage = torch.UntypedStorage.from_file(str(tmp_path / "file"), shared=False, nbytes=32 * MB)
    torch.tensor([], dtype=torch.uint8).set_(storage).sum()
    after = memory_of(os.getpid())
    assert 30 * MB < after.file - before.file < 40 * MB
    assert after.unavoidable - before.unavoidable < 16 * MB


def test_a_process_that_is_gone_has_nothing() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    assert memory_of(process.pid) == MemoryUse()


GRANDCHILD = """
import subprocess, sys, time
code = "x = b'x' * (50 << 20); print('ready', flush=True); import time; time.sleep(60)"
child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
child.stdout.readline()
print("ready", flush=True)
time.sleep(60)
"""


def test_watch_sees_the_whole_tree() -> None:
    process = subprocess.Popen([sys.executable, "-c", GRANDCHILD], stdout=subprocess.PIPE, start_new_session=True)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        assert len(process_tree(process.pid)) == 2
        assert process.pid in process_tree(os.getpid())
        with MemoryWatch(root=process.pid, interval=0.05) as watch:
            time.sleep(0.3)
    finally:
        os.killpg(process.pid, 9)
        process.wait()
    assert watch.samples >= 2
    assert watch.peak.anonymous > 50 * MB
    assert watch.processes[0][1] > 50 * MB
    assert len(watch.processes) == 2
    assert watch.peak_file > 0


def test_watch_keeps_the_peak() -> None:
    watch = MemoryWatch()
    held = bytearray(b"x") * (64 * MB)
    watch.look()
    del held
    peak = watch.peak
    watch.look()
    assert watch.peak == peak
    assert peak.anonymous - memory_of(os.getpid()).anonymous > 50 * MB


@torch.no_grad()
def test_checkpoint_is_one_that_the_reference_reads(tmp_path: Path) -> None:
    layers = layers_of(200_000, **SMALL)
    body = write_checkpoint(tmp_path / "checkpoint", layers, **SMALL)
    size = sum(file.stat().st_size for file in (tmp_path / "checkpoint").iterdir())
    assert layers > 2
    assert 200_000 <= body < size
    logits = load_reference(tmp_path / "checkpoint")(input_ids=torch.arange(60)[None]).logits
    assert logits.isfinite().all()
    assert logits.std() > 0.01


def test_text_tells_the_verdict() -> None:
    result = MemoryResult(
        layers=7,
        body_bytes=3_200_000_000,
        checkpoint_bytes=5_500_000_000,
        weight_bytes=5_400_000_000,
        program_bytes=2_000_000,
        bare_torch=MemoryUse(anonymous=100_000_000),
        compile_seconds=120.0,
        compile_peak=MemoryUse(anonymous=1_000_000_000, shared=5, file=9),
        compile_peak_at=60.0,
        compile_peak_processes=(("python", 700_000_000), ("cc1plus", 300_000_000)),
        compile_over_torch=900_000_000,
        compile_file_backed=3_000_000_000,
        load_seconds=0.5,
        load_growth=MemoryUse(anonymous=300_000_000),
        first_logits_seconds=2.0,
        first_logits_growth=MemoryUse(anonymous=310_000_000, file=4_000_000_000),
    )
    assert result.compile_holds and not result.load_holds
    text = result.to_markdown()
    assert "peak **900 MB** over a bare `import torch`, limit 1.5 GB: holds" in text
    assert "5.56% of the weights, limit 5%: DOES NOT HOLD" in text
    assert "python 700 MB, cc1plus 300 MB" in text
