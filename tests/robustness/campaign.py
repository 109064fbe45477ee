"""Runs mutants in a process of their own that is watched: a crash, a hang or too much memory belongs to one mutant.

    python -m tests.robustness.campaign [--count 2000] [--first 0] [--artifact DIR] [--only SUBJECT]

runs mutants by number and prints the faults; each can be run again alone by `--first NUMBER --count 1`.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
SECONDS = 10.0
"""Most processor time that a mutant may take: a hundred times what the slowest usually does."""
BYTES = 2 << 30
"""Most memory that the worker may have while it runs a mutant, all it has imported included."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a mutant. `text` is "fine", "refused: ...", or what went wrong, where `fault` is true."""

    seed: int
    fault: bool
    text: str
    seconds: float = 0.0


def run_mutants(seeds: Iterable[int], base: Path, work: Path) -> Iterator[Outcome]:
    """Run the mutants one after another; yield an outcome for each. A worker that dies is replaced."""
    waiting = [*seeds]
    while waiting:
        with _Worker(base, work) as worker:
            while waiting:
                outcome = worker.run(waiting.pop(0))
                yield outcome
                if not worker.alive:
                    break


class _Worker:
    def __init__(self, base: Path, work: Path) -> None:
        command = [sys.executable, "-m", "tests.robustness.campaign", "--worker", str(base), str(work)]
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the worker
        self._process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, start_new_session=True
        )
        self._read(600)  # it says that it has imported everything

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._errors.close()

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def run(self, seed: int) -> Outcome:
        assert self._process.stdin is not None
        began, before = time.monotonic(), self._processor_time()
        try:
            self._process.stdin.write(b"%d\n" % seed)
            self._process.stdin.flush()
            while (line := self._read(0.05)) is None:
                if self._memory() > BYTES:
                    return self._kill(seed, f"took more than {BYTES:,} bytes")
                if self._processor_time() - before > SECONDS or time.monotonic() - began > 20 * SECONDS:
                    return self._kill(seed, f"ran for more than {SECONDS:.0f} s")
        except (EOFError, OSError):
            self._process.wait()
            self._errors.seek(0)
            tail = self._errors.read().decode("utf-8", "replace")[-2000:]
            return Outcome(seed=seed, fault=True, text=f"the process died of {self._process.returncode}: {tail}")
        return Outcome(**json.loads(line))

    def _read(self, seconds: float) -> bytes | None:
        """Return a line of the worker's, None if none comes in time. Raises EOFError where it has ended."""
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], seconds)[0]:
            return None
        line = self._process.stdout.readline()
        if not line:
            raise EOFError
        return line

    def _kill(self, seed: int, text: str) -> Outcome:
        self._process.kill()
        self._process.wait()
        return Outcome(seed=seed, fault=True, text=text)

    def _memory(self) -> int:
        return int(Path(f"/proc/{self._process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")

    def _processor_time(self) -> float:
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _work(base: Path, work: Path) -> None:
    """Take seeds from stdin, one a line, and write an outcome for each to stdout."""
    from . import subjects

    out, _ = os.fdopen(os.dup(1), "w"), os.dup2(2, 1)  # what a library prints must not get between the outcomes
    print("ready", file=out, flush=True)
    for line in sys.stdin:
        seed, began = int(line), time.process_time()
        try:
            text, fault = subjects.run(seed, subjects.stage(seed, base, work)), False
        except BaseException as error:  # a panic of Rust is none of Exception's
            if isinstance(error, KeyboardInterrupt):
                raise
            text, fault = "".join(traceback.format_exception(error))[-3000:], True
        outcome = {"seed": seed, "fault": fault, "text": text, "seconds": time.process_time() - began}
        print(json.dumps(outcome), file=out, flush=True)


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--only", help="one subject")
    parser.add_argument("--artifact", type=Path, help="an artifact, for the manifest's mutants")
    parser.add_argument("--show", action="store_true", help="print every outcome")
    parser.add_argument("--worker", nargs=2, type=Path)
    args = parser.parse_args()
    if args.worker:
        return _work(*args.worker)
    from .subjects import prepare, subject_of

    with tempfile.TemporaryDirectory() as place:
        prepare(Path(place) / "base", args.artifact)
        seeds = [s for s in range(args.first, args.first + args.count) if args.only in (None, subject_of(s))]
        if args.artifact is None:
            seeds = [s for s in seeds if subject_of(s) != "manifest"]
        counts: Counter[str] = Counter()
        slowest = Outcome(seed=-1, fault=False, text="")
        began = time.monotonic()
        for outcome in run_mutants(seeds, Path(place) / "base", Path(place) / "work"):
            counts[f"{subject_of(outcome.seed)} {'FAULT' if outcome.fault else outcome.text.partition(':')[0]}"] += 1
            slowest = max(slowest, outcome, key=lambda o: o.seconds)
            if outcome.fault or args.show:
                text = outcome.text if args.show else " | ".join(outcome.text.strip().splitlines()[-3:])[-400:]
                print(f"{outcome.seed} {subject_of(outcome.seed)}: {text}", flush=True)
        for what, count in sorted(counts.items()):
            print(f"{count:5} {what}")
        print(f"{time.monotonic() - began:.0f} s; the slowest, {slowest.seed}, took {slowest.seconds:.2f} s")
    return None


if __name__ == "__main__":
    _main()
