"""Kills compiles at points spread over them, and looks at what is left.

    python -m tests.robustness.kills [--points 50]

Half of the points are spread evenly over the time that a compile takes, half follow what it writes: a file that appears, the
rename at the end. Every second compile replaces an artifact (--force), which a reader checks all the time.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from oxfuse.runtime.artifact import check_files, check_weights
from oxfuse.runtime.manifest import read_manifest

from ..checkpoints import random_gpt_oss

ROOT = Path(__file__).parents[2]
SIGNS = (
    "programs/cpu/oxfuse_ops.so",
    "programs/cpu/step",
    "weights.safetensors",
    "golden.safetensors",
    "manifest.json",
    "report.json",
    "report.md",
)
"""What appears in the folder as a compile goes on."""
DELAYS = (0.0, 0.002, 0.02, 0.2)


@dataclass(kw_only=True)
class Killed:
    """What happened at one point: `finished` says that the compile was over before, `faults` what was not as it should be."""

    point: str
    forced: bool
    finished: bool = False
    faults: list[str] = field(default_factory=list)


def start_compile(checkpoint: Path, output: Path, *options: str) -> subprocess.Popen[bytes]:
    """Start a compile in a process group of its own, g++ included."""
    command = [sys.executable, "-m", "oxfuse", "compile", str(checkpoint), "-o", str(output), *options]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True, cwd=output.parent)


def kill(process: subprocess.Popen[bytes]) -> bool:
    """Kill the process group; return whether it was over before."""
    finished = process.poll() is not None
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    return finished


def whole(artifact: Path) -> str | None:
    """Return what is wrong with an artifact, or None: manifest, programs, tokenizer and every weight's hash are looked at."""
    try:
        manifest = read_manifest(artifact)
        check_files(artifact, manifest)
        check_weights(artifact, manifest)
    except Exception as error:
        return f"{artifact.name} is not whole: {error}"
    return None


class Reader(threading.Thread):
    """Opens an artifact again and again while it is replaced: at any moment its name must lead to a whole one."""

    def __init__(self, artifact: Path) -> None:
        super().__init__(daemon=True)
        self.artifact, self.looks, self.faults, self._ended = artifact, 0, list[str](), threading.Event()

    def run(self) -> None:
        try:
            self._look_again_and_again()
        except OSError as error:  # such as: there is nothing of that name
            self.faults.append(f"the reader met {error!r}")

    def _look_again_and_again(self) -> None:
        while not self._ended.wait(0.05):
            # Names are looked up in the folder that was there when it was opened. If that is no longer the artifact by the end of
            # the look, it has been replaced meanwhile, and what it lacks now says nothing.
            folder = os.open(self.artifact, os.O_RDONLY | os.O_DIRECTORY)
            fault = whole(Path(f"/proc/self/fd/{folder}"))
            if fault and os.path.samestat(os.fstat(folder), self.artifact.stat()):
                self.faults.append(fault)
            os.close(folder)
            self.looks += 1

    def finish(self) -> list[str]:
        """Stop, and return what was seen."""
        self._ended.set()
        self.join()
        return self.faults


def points(count: int, seconds: float) -> Iterator[tuple[str, Callable[[Path, float], bool]]]:
    """Yield names and tests: a test gets the folder that is filled and the seconds since the start, and tells when to kill."""
    timed = count - count // 2
    for index in range(timed):
        at = seconds * (index + 0.5) / timed
        yield f"{at:.1f} s", lambda folder, now, at=at: now >= at
    for index in range(count // 2):
        sign, delay = SIGNS[index % len(SIGNS)], DELAYS[index // len(SIGNS) % len(DELAYS)]
        seen: list[float] = []

        def after(folder: Path, now: float, sign: str = sign, delay: float = delay, seen: list[float] = seen) -> bool:
            if not seen and (folder / sign).exists():
                seen.append(now)
            return bool(seen) and now >= seen[0] + delay

        yield f"{delay:.3f} s after {sign}", after


def kill_compiles(count: int, work: Path, say: Callable[[str], object] = lambda text: None) -> list[Killed]:
    """Kill `count` compiles; a last one, which must succeed, follows. Returns what happened at each point."""
    checkpoint = random_gpt_oss(work / "checkpoint", num_hidden_layers=2)
    place = work / "place"
    place.mkdir()
    artifact, fresh = place / "kept", place / "fresh"
    began = time.perf_counter()
    _, errors = (first := start_compile(checkpoint, artifact)).communicate()
    assert first.returncode == 0, errors
    seconds = time.perf_counter() - began
    killed = []
    for number, (name, reached) in enumerate(points(count, seconds)):
        forced = number % 2 == 0
        target = artifact if forced else fresh
        result = Killed(point=name, forced=forced)
        folder = place / f".{target.name}.partial" / target.name
        reader = Reader(artifact)
        reader.start()
        process = start_compile(checkpoint, target, *(["--force"] if forced else []))
        began = time.perf_counter()
        while process.poll() is None and not reached(folder, time.perf_counter() - began):
            time.sleep(0.001)
        result.finished = kill(process)
        result.faults += reader.finish()
        if not forced and fresh.exists():  # it was renamed before the kill: then it must be whole
            result.faults += filter(None, [whole(fresh)])
            shutil.rmtree(fresh)
        left = {path.name for path in place.iterdir()} - {artifact.name, f".{artifact.name}.partial", f".{fresh.name}.partial"}
        if left:
            result.faults.append(f"left behind: {sorted(left)}")
        result.faults += filter(None, [whole(artifact)])
        killed.append(result)
        how = f"{'--force' if forced else 'new':8} {'finished' if result.finished else 'killed':9}"
        say(f"{number + 1:3}/{count} {name:45} {how}{'; '.join(result.faults)}")
    for target, options in ((artifact, ["--force"]), (fresh, [])):
        last = start_compile(checkpoint, target, *options)
        _, errors = last.communicate()
        result = Killed(point=f"the last compile, to {target.name}", forced=bool(options), finished=True)
        if last.returncode or (fault := whole(target)):
            result.faults.append(errors.decode() if last.returncode else str(fault))
        killed.append(result)
    if sorted(path.name for path in place.iterdir()) != sorted([artifact.name, fresh.name]):
        killed[-1].faults.append(f"left behind: {sorted(path.name for path in place.iterdir())}")
    return killed


def main() -> int:
    """Print what happened at each point; return 1 if anything was not as it should be."""
    parser = argparse.ArgumentParser(description="Kill compiles and look at what is left.")
    parser.add_argument("--points", type=int, default=50)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="oxfuse-kills-") as work:
        killed = kill_compiles(arguments.points, Path(work), lambda text: print(text, flush=True))
    faults = [fault for result in killed for fault in result.faults]
    ended = sum(result.finished for result in killed[:-2])
    print(f"{len(killed) - 2} points, {ended} of them after the compile's end; {len(faults)} faults")
    print("\n".join(faults))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
