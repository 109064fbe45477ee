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
from oxfuse.compiler.process_memory import MemoryUse, MemoryWatch, memory_of, peak_resident, process_tree, reset_peak, resident
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


HOLDER = """
import mmap, sys
held = None
for line in sys.stdin:
    if line == "anonymous\\n":
        held = mmap.mmap(-1, 64 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        for page in range(0, len(held), 4096):
            held[page] = 1
    elif line == "nothing\\n":
        held.close()
    else:
        with open(line.strip(), "rb") as file:
            held = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        sum(held[page] for page in range(0, len(held), 4096))
    print("done", flush=True)
"""


class Holder:
    """A process that holds what it is told and does nothing else: this one's threads and allocator have lives of their own."""

    def __enter__(self) -> Holder:
        self.process = subprocess.Popen([sys.executable, "-c", HOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        return self

    def __exit__(self, *exception: object) -> None:
        self.process.kill()
        self.process.communicate()

    def hold(self, what: str) -> None:
        """Hold 64 MB of "anonymous" memory, "nothing", or a file's pages, and return when they are all touched."""
        assert self.process.stdin is not None and self.process.stdout is not None
        print(what, file=self.process.stdin, flush=True)
        assert self.process.stdout.readline() == "done\n"


def test_anonymous_memory_is_counted(tmp_path: Path) -> None:
    with Holder() as holder:
        (tmp_path / "file").write_bytes(b"x" * 4096)
        holder.hold(str(tmp_path / "file"))
        before = memory_of(holder.process.pid)
        holder.hold("anonymous")
        after = memory_of(holder.process.pid)
    assert 63 * MB < after.anonymous - before.anonymous < 66 * MB
    assert abs(after.file - before.file) < MB


def test_mapped_file_is_counted_apart(tmp_path: Path) -> None:
    (tmp_path / "small").write_bytes(b"x" * 4096)
    (tmp_path / "file").write_bytes(b"x" * (32 * MB))
    with Holder() as holder:
        holder.hold(str(tmp_path / "small"))
        before = memory_of(holder.process.pid)
        holder.hold(str(tmp_path / "file"))
        after = memory_of(holder.process.pid)
    assert 31 * MB < after.file - before.file < 33 * MB
    assert abs(after.unavoidable - before.unavoidable) < MB


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
    with Holder() as holder:
        watch = MemoryWatch(root=holder.process.pid)
        holder.hold("anonymous")
        watch.look()
        holder.hold("nothing")
        peak = watch.peak
        watch.look()
        assert watch.peak == peak
        assert peak.anonymous - memory_of(holder.process.pid).anonymous > 60 * MB


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


GROWS = """
import sys
print("ready", flush=True)
for line in sys.stdin:
    block = b"x" * (60 << 20)
    del block
    print("done", flush=True)
"""


def test_kernel_keeps_the_peak_that_no_sample_sees() -> None:
    with subprocess.Popen([sys.executable, "-c", GROWS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdin is not None and child.stdout is not None
        child.stdout.readline()
        before = resident(child.pid)
        child.stdin.write("\n")
        child.stdin.flush()
        child.stdout.readline()
        after, peak = resident(child.pid), peak_resident(child.pid)
        assert before is not None and after is not None and peak is not None
        assert after - before < 30 << 20 and peak - before > 50 << 20
        if reset_peak(child.pid):
            again = peak_resident(child.pid)
            assert again is not None and again - before < 30 << 20
        child.stdin.close()
    assert resident(child.pid) is None and peak_resident(child.pid) is None and not reset_peak(child.pid)
