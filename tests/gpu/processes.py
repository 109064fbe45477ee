"""The processes of the report: the worker of the moment, and what is prepared in the background."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .checkout import ROOT, command
from .document import ItemResult, Row

START_SECONDS = 180.0
"""Most that a worker may take to import everything and make its context on the GPU."""
MOST_STARTS = 15
"""Workers in one report: a machine whose GPU is gone shall not be asked for ever."""
LOG_LINES = 6
THREADS = "4"
"""Of each process in the background."""

Message = dict[str, Any]


class Workers:
    """One worker at a time. A new one is started when it is needed; each gets the facts that are known by then."""

    def __init__(self, module: str, sections: Sequence[str], work: Path) -> None:
        """Remember what workers are for; none is started yet."""
        self._module, self._sections, self._work = module, sections, work
        self._process: subprocess.Popen[bytes] | None = None
        self._buffer, self._starts = b"", 0
        self._log = work / "worker.log"

    def listing(self) -> tuple[dict[str, list[tuple[str, float]]], dict[str, str]]:
        """Return the items by section, with the seconds they are believed to take, and why a section has none.

        Raises RuntimeError where the first worker does not come up: nothing will.
        """
        ready = self._start({})
        if ready is None:
            raise RuntimeError(f"The worker does not start: {self._last_words()}")
        return {name: [(item, seconds) for item, seconds in items] for name, items in ready["items"].items()}, ready["errors"]

    def run(self, section: str, item: str, limit: float, on_found: Callable[[Message], None], facts: Mapping[str, Any]) -> str:
        """Run an item for at most `limit` seconds; `on_found` gets each message. Return why it failed, "" where it did not."""
        if self._process is None and self._start(facts) is None:
            return f"No worker could be started: {self._last_words()}"
        process = self._process
        assert process is not None and process.stdin is not None
        until = time.monotonic() + limit
        try:
            process.stdin.write(json.dumps({"section": section, "item": item}).encode() + b"\n")
            process.stdin.flush()
            while (message := self._next(until)) is not None:
                if message["event"] == "end":
                    error: str = message["error"]
                    return error
                on_found(message)
        except (EOFError, OSError):
            code = process.wait()
            how = f"died of signal {-code} ({signal.strsignal(-code)})" if code < 0 else f"ended with {code}"
            self._process = None
            return f"The process {how}. {self._last_words()}"
        self.close()
        return f"It ran for more than {limit:.0f} s and was ended. {self._last_words()}"

    def record(self, message: Message, item: ItemResult, facts: dict[str, Any]) -> None:
        """Put what a message says where it belongs."""
        kind = message.pop("event")
        if kind == "row":
            item.rows.append(Row(**message))
        elif kind == "note":
            item.notes.append(message["text"])
        else:
            facts[message["name"]] = message["value"]

    def close(self) -> None:
        """End the worker at once."""
        if self._process is not None:
            _kill(self._process)
            self._process = None

    def _start(self, facts: Mapping[str, Any]) -> Message | None:
        """Start a worker and return its first message, None where it fails."""
        if self._starts >= MOST_STARTS:
            return None
        self._starts, self._buffer = self._starts + 1, b""
        arguments = command("worker", self._module, str(self._work), json.dumps(dict(facts)), *self._sections)
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                arguments, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, start_new_session=True
            )
        try:
            ready = self._next(time.monotonic() + START_SECONDS)
        except EOFError:
            ready = None
        if ready is None:
            self.close()
        return ready

    def _next(self, until: float) -> Message | None:
        """Return the worker's next message, None if none comes in time. Raises EOFError where it has ended.

        It notices an end by a closed pipe; where the worker says after an item that it ends, the next item finds that.
        """
        assert self._process is not None and self._process.stdout is not None
        pipe = self._process.stdout.fileno()
        while b"\n" not in self._buffer:
            left = until - time.monotonic()
            if left <= 0 or not select.select([pipe], [], [], left)[0]:
                return None
            data = os.read(pipe, 1 << 16)
            if not data:
                raise EOFError
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        message: Message = json.loads(line)
        if message["event"] == "end" and not message.get("fine", True):
            self.close()
        return message

    def _last_words(self) -> str:
        try:
            text = self._log.read_bytes()[-4000:].decode("utf-8", "replace")
        except OSError:
            return ""
        return " | ".join(line.strip()[:300] for line in text.strip().splitlines()[-LOG_LINES:])


class Background:
    """Processes that prepare things beside the report: what they make is used where it is there in time."""

    def __init__(self, commands: Mapping[str, Sequence[str]], work: Path) -> None:
        """Remember the commands by name; none is started yet."""
        self._commands, self._work = commands, work
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Start them, once, each with a log of its own."""
        if self._processes:
            return
        for name, arguments in self._commands.items():
            with (self._work / f"{name}.log").open("wb") as log:
                self._processes[name] = subprocess.Popen(
                    arguments,
                    cwd=ROOT,
                    env={**os.environ, "OMP_NUM_THREADS": THREADS},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )

    def wait(self, seconds: float) -> list[str]:
        """Wait until all have ended, `seconds` at most; return the names of those that still run."""
        until = time.monotonic() + seconds
        while (running := [n for n, process in self._processes.items() if process.poll() is None]) and time.monotonic() < until:
            time.sleep(0.2)
        return running

    def end(self) -> None:
        """End what still runs."""
        for process in self._processes.values():
            _kill(process)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a process and those that it has started, and wait for it."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=30)
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()
