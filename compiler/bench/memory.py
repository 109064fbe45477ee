"""Measures that compiling a checkpoint, and loading the artifact, costs no memory in proportion to the weights.

In: the size of a model's body. A random MXFP4/bf16 GPT-OSS at the 20b layer shape is streamed to disk, compiled in a process of
its own whose whole tree is sampled, and loaded in another. Out: JSON and Markdown with peaks over a bare `import torch`, which is
measured the same way.

    python -m oxfuse.compiler.bench.memory --body-gb 3 --json memory.json --markdown memory.md
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from oxfuse.compiler.bench.random_checkpoint import layers_of, write_checkpoint
from oxfuse.compiler.process_memory import MemoryUse, MemoryWatch, memory_of
from oxfuse.runtime.units import size_text

COMPILE_LIMIT = 1_500_000_000  # bytes of anonymous and shared memory over a bare `import torch`
LOAD_LIMIT = 0.05  # of the weights' bytes
BARE = "import torch, sys; print('{}', flush=True); sys.stdin.read()"
LOAD = """
import json, os, sys, time
import oxfuse
from oxfuse.runtime.artifact import load  # the public names are lazy: what importing costs is not what loading costs
print("{}", flush=True)
sys.stdin.readline()
began = time.perf_counter()
model = load(sys.argv[1])
print(json.dumps({"load_seconds": time.perf_counter() - began}), flush=True)
sys.stdin.readline()
began = time.perf_counter()
model.logits([list(range(8))])
print(json.dumps({"first_logits_seconds": time.perf_counter() - began}), flush=True)
sys.stdin.read()
"""


@dataclass(frozen=True, kw_only=True)
class MemoryResult:
    """Figures in bytes and seconds. `compile_over_torch` is the peak of anonymous and shared memory minus a bare torch's."""

    layers: int
    body_bytes: int
    checkpoint_bytes: int
    weight_bytes: int
    program_bytes: int
    bare_torch: MemoryUse
    compile_seconds: float
    compile_peak: MemoryUse
    compile_peak_at: float
    compile_peak_processes: tuple[tuple[str, int], ...]
    compile_over_torch: int
    compile_file_backed: int
    load_seconds: float
    load_growth: MemoryUse
    first_logits_seconds: float
    first_logits_growth: MemoryUse

    @property
    def compile_holds(self) -> bool:
        """Tell whether compiling stayed within its limit."""
        return self.compile_over_torch < COMPILE_LIMIT

    @property
    def load_holds(self) -> bool:
        """Tell whether loading stayed within its limit."""
        return self.load_growth.unavoidable < LOAD_LIMIT * self.weight_bytes

    def to_markdown(self) -> str:
        """Return a short text with the figures and the limits."""
        size, verdict = size_text, {True: "holds", False: "DOES NOT HOLD"}
        peak = ", ".join(f"{name} {size(held)}" for name, held in self.compile_peak_processes[:3])
        grown, used = self.load_growth, self.first_logits_growth
        lines = [
            f"A random MXFP4/bf16 GPT-OSS of {self.layers} layers at the 20b shape: body {size(self.body_bytes)}, checkpoint "
            f"{size(self.checkpoint_bytes)}. Figures are anonymous and shared memory, all processes together; a bare "
            f"`import torch` has {size(self.bare_torch.unavoidable)}. Linux {os.uname().release}, torch {torch.__version__}.",
            f"- Compile: peak **{size(self.compile_over_torch)}** over a bare `import torch`, limit {size(COMPILE_LIMIT)}: "
            f"{verdict[self.compile_holds]}. It came {self.compile_peak_at:.0f} s into {self.compile_seconds:.0f} s ({peak}). "
            f"Mapped files besides: at most {size(self.compile_file_backed)}.",
            f"- Programs: {size(self.program_bytes)}; weights: {size(self.weight_bytes)}.",
            f"- Load: grows by **{size(grown.unavoidable)}**, {grown.unavoidable / self.weight_bytes:.2%} of the weights, limit "
            f"{LOAD_LIMIT:.0%}: {verdict[self.load_holds]}. {self.load_seconds:.1f} s; mapped files grow by {size(grown.file)}.",
            f"- First logits: {self.first_logits_seconds:.1f} s; since before loading it has grown by {size(used.unavoidable)}, "
            f"mapped files by {size(used.file)}.",
        ]
        return "# Memory\n\n" + lines[0] + "\n\n" + "\n".join(lines[1:]) + "\n"


@contextlib.contextmanager
def _talk(code: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Run Python code in a process that is talked to by lines; it is ended with the block."""
    process = subprocess.Popen([sys.executable, "-c", code, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.terminate()
        process.wait()


def _answer(process: subprocess.Popen[str]) -> dict[str, float]:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"The measured process ended with code {process.wait()}; see its messages above.")
    answer = json.loads(line)
    assert isinstance(answer, dict)
    return answer


def _go(process: subprocess.Popen[str]) -> dict[str, float]:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()
    return _answer(process)


def measure_bare_torch() -> MemoryUse:
    """Return the memory of a process that has done nothing but `import torch`."""
    with _talk(BARE) as process:
        _answer(process)
        return memory_of(process.pid)


def measure_compile(source: Path, output: Path, *options: str, interval: float = 0.1) -> tuple[MemoryWatch, float]:
    """Run `oxfuse compile` in a session of its own; return what was watched, and seconds. Raises RuntimeError if it fails."""
    command = [sys.executable, "-m", "oxfuse", "compile", str(source), "-o", str(output), *options]
    began = time.perf_counter()
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL)
    with MemoryWatch(root=process.pid, interval=interval) as watch:
        code = process.wait()
    if code:
        raise RuntimeError(f"{' '.join(command)} ended with code {code}; see its messages above.")
    return watch, time.perf_counter() - began


def measure_load(artifact: Path) -> tuple[dict[str, float], MemoryUse, MemoryUse]:
    """Load an artifact in a new process; return seconds, and the growth of its memory by loading and by the first logits."""
    with _talk(LOAD, str(artifact)) as process:
        _answer(process)
        before = memory_of(process.pid)
        seconds = _go(process)
        loaded = memory_of(process.pid)
        seconds |= _go(process)
        return seconds, _growth(before, loaded), _growth(before, memory_of(process.pid))


def _growth(before: MemoryUse, after: MemoryUse) -> MemoryUse:
    return MemoryUse(
        anonymous=after.anonymous - before.anonymous, shared=after.shared - before.shared, file=after.file - before.file
    )


def measure(work: Path, body_bytes: int, *options: str, **config: Any) -> MemoryResult:
    """Make a checkpoint in the folder `work`, compile it, load it; return the figures. `options` go to `oxfuse compile`."""
    checkpoint, artifact = work / "checkpoint", work / "artifact"
    layers = layers_of(body_bytes, **config)
    body = write_checkpoint(checkpoint, layers, **config)
    bare = measure_bare_torch()
    watch, seconds = measure_compile(checkpoint, artifact, *options)
    loading, load_growth, logits_growth = measure_load(artifact)
    return MemoryResult(
        layers=layers,
        body_bytes=body,
        checkpoint_bytes=sum(file.stat().st_size for file in checkpoint.iterdir()),
        weight_bytes=sum(file.stat().st_size for file in artifact.glob("weights*.safetensors")),
        program_bytes=sum(file.stat().st_size for file in (artifact / "programs").rglob("*") if file.is_file()),
        bare_torch=bare,
        compile_seconds=seconds,
        compile_peak=watch.peak,
        compile_peak_at=watch.peak_at,
        compile_peak_processes=watch.processes,
        compile_over_torch=watch.peak.unavoidable - bare.unavoidable,
        compile_file_backed=watch.peak_file,
        load_growth=load_growth,
        first_logits_growth=logits_growth,
        load_seconds=loading["load_seconds"],
        first_logits_seconds=loading["first_logits_seconds"],
    )


def main() -> int:
    """Measure and print; return 1 if a limit does not hold."""
    parser = argparse.ArgumentParser(description="Memory of compiling and loading a large checkpoint.")
    parser.add_argument("--body-gb", type=float, default=3.0, help="size of the layers in GB (default 3)")
    parser.add_argument("--work", type=Path, help="where checkpoint and artifact go, and are left; a temporary folder by default")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--markdown", type=Path, help="write the text to this file")
    parser.add_argument("options", nargs="*", help="more options for oxfuse compile, after --")
    arguments = parser.parse_args()
    with contextlib.ExitStack() as stack:
        work = arguments.work or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="oxfuse-memory-")))
        result = measure(work, int(arguments.body_gb * 1e9), *arguments.options)
    text = result.to_markdown()
    print(text)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(dataclasses.asdict(result), indent=1) + "\n")
    if arguments.markdown is not None:
        arguments.markdown.write_text(text)
    return 0 if result.compile_holds and result.load_holds else 1


if __name__ == "__main__":
    sys.exit(main())
