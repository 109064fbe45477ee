"""An engine in a process of its own, as the benchmarks' own process sees it, and samples taken while nobody else works.

In: what the worker is started with (`worker.py` says how it talks). Out: its answers, and values with a count of disturbances.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from oxfuse.compiler.bench.probe import ForeignLoad
from oxfuse.errors import UserError

if TYPE_CHECKING:
    from oxfuse.compiler.bench.contenders import Contender

DISTURBED = 0.15  # cores that others may use during a sample
ATTEMPTS = 3  # to take a sample undisturbed
TRIAL_TOKENS = 4  # decoded to find an engine's best implementation
WORKER = "oxfuse.compiler.bench.worker"

T = TypeVar("T")


class Worker:
    """An engine in a process of its own."""

    def __init__(
        self,
        engine: str,
        folder: Path,
        threads: int,
        *more: str,
        module: str = WORKER,
        program: Sequence[str] | None = None,
    ) -> None:
        """Start it; `more` are further arguments of the `module`, or of the command `program` for another interpreter.

        Raises UserError with the reason if it cannot run here.
        """
        command = [*(program or (sys.executable, "-m", module)), engine, str(folder), str(threads), *more]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
        )
        self.engine = engine
        try:
            told = self._read()
        except UserError:
            self.close()
            raise
        self.name, self.implementations = str(told["name"]), tuple(told["implementations"])

    @classmethod
    def of(cls, contender: Contender, threads: int) -> Worker:
        """Start the worker of a contender of the comparison; raises as the constructor does."""
        return cls(contender.spec.kind, contender.path, threads, *contender.arguments, program=contender.program)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send a request and return the answer. Raises UserError with the engine's own words if it could not do it."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # then the missing answer tells
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise UserError(f"the {self.engine} process ended with code {self.process.wait()}")
        try:
            answer: dict[str, Any] = json.loads(line)
        except ValueError as error:  # what a library prints while it ends the process
            raise UserError(f"the {self.engine} process said {line.strip()[:200]!r} where an answer was expected") from error
        if "error" in answer:
            raise UserError(answer["error"])
        return answer

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it may be gone
            self.process.stdin.close()
        self.process.stdout.close()
        self.process.terminate()
        self.process.wait()


def best_implementation(worker: Worker, phase: str, size: int) -> str:
    """Try the engine's implementations and return the fastest one's name; "" where it has but one."""
    seconds = {}
    for implementation in worker.implementations:
        with contextlib.suppress(UserError):  # one that cannot do it is not the best
            worker.ask(do="choose", implementation=implementation)
            if phase == "prefill":
                seconds[implementation] = worker.ask(do="prefill", tokens=size)["seconds"]
            else:
                worker.ask(do="context", tokens=1)
                worker.ask(do="decode", tokens=1)
                seconds[implementation] = min(worker.ask(do="decode", tokens=TRIAL_TOKENS)["seconds"])
    return min(seconds, key=seconds.__getitem__) if seconds else ""


def take_quietly(take: Callable[[], T], load: ForeignLoad, attempts: int = ATTEMPTS) -> tuple[T, int]:
    """Take a sample; another for each that was disturbed, up to `attempts`. Return the last, and how many were disturbed."""
    for disturbed in range(attempts):
        load.wait(DISTURBED)
        value = take()
        foreign = load.look()
        if foreign is None or foreign < DISTURBED:
            return value, disturbed
    return value, attempts  # the machine does not get quieter: the count of disturbed ones says so
