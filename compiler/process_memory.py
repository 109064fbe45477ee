"""How much memory a process and all it started really use, as the Linux kernel counts it.

In: a process id. Out: bytes of anonymous, shared and file-backed memory. Pages that several processes share are divided among
them (Pss), so the sum over a tree counts every page once. Other systems have no /proc: there everything is unknown.
"""

from __future__ import annotations

import os
import re
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

PROC = Path("/proc")
INTERVAL = 0.5  # a look costs some 10 ms
RESET_PEAK = "5"  # see proc_pid_clear_refs(5)


@dataclass(frozen=True, kw_only=True)
class MemoryUse:
    """Bytes by kind. `anonymous` includes what was swapped out; `file` can be dropped and read again, the others cannot."""

    anonymous: int = 0
    shared: int = 0
    file: int = 0

    def __add__(self, other: MemoryUse) -> MemoryUse:
        return MemoryUse(
            anonymous=self.anonymous + other.anonymous, shared=self.shared + other.shared, file=self.file + other.file
        )

    @property
    def unavoidable(self) -> int:
        """Return the bytes that cannot be dropped."""
        return self.anonymous + self.shared


def memory_of(process: int) -> MemoryUse:
    """Return the memory of one process; nothing if it is gone, or may not be looked at."""
    try:
        text = (PROC / str(process) / "smaps_rollup").read_text()
    except OSError:
        return MemoryUse()
    kb = {name: int(value) for name, value in re.findall(r"^(\w+):\s+(\d+) kB", text, re.MULTILINE)}
    return MemoryUse(
        anonymous=(kb.get("Pss_Anon", 0) + kb.get("SwapPss", 0)) << 10,
        shared=kb.get("Pss_Shmem", 0) << 10,
        file=kb.get("Pss_File", 0) << 10,
    )


def resident(process: int) -> int | None:
    """Return the bytes that a process has in memory, mapped files and shared pages counted whole; None where nobody tells."""
    return status_bytes(process, "VmRSS")


def peak_resident(process: int) -> int | None:
    """Return the most that `resident` has been since the process began or `reset_peak`: the kernel's own count, not samples."""
    return status_bytes(process, "VmHWM")


def reset_peak(process: int) -> bool:
    """Let `peak_resident` begin anew; False where the system does not allow it."""
    try:
        (PROC / str(process) / "clear_refs").write_text(RESET_PEAK)
    except OSError:
        return False
    return True


def status_bytes(process: int, what: str) -> int | None:
    """Return what the kernel tells under a name of proc_pid_status(5), such as VmData; None where it does not."""
    try:
        text = (PROC / str(process) / "status").read_text()
    except OSError:
        return None
    found = re.search(rf"^{what}:\s+(\d+) kB", text, re.MULTILINE)
    return int(found[1]) << 10 if found else None


def process_tree(root: int) -> dict[int, str]:
    """Return the process `root`, its descendants, and all of its session if it leads one, with their names."""
    parents: dict[int, int] = {}
    sessions: dict[int, int] = {}
    names: dict[int, str] = {}
    for entry in PROC.iterdir() if PROC.is_dir() else ():
        if entry.name.isdigit():
            try:
                # `pid (name) state parent group session ...`; a name may hold spaces and brackets.
                head, _, tail = (entry / "stat").read_text().rpartition(")")
            except OSError:
                continue
            pid, words = int(entry.name), tail.split()
            parents[pid], sessions[pid], names[pid] = int(words[1]), int(words[3]), head.partition("(")[2]
    members = {pid for pid, session in sessions.items() if pid == root or session == root}
    grown = True
    while grown:
        grown = False
        for pid, parent in parents.items():
            if parent in members and pid not in members:
                members.add(pid)
                grown = True
    return {pid: names[pid] for pid in sorted(members)}


@dataclass(kw_only=True)
class MemoryWatch:
    """Samples a process tree while a `with` block runs: `peak` is the sample with the most memory that cannot be dropped.

    `peak_file` is the largest file-backed sum, `peak_at` the seconds until the peak, `processes` what each held then, the
    largest first. `samples` tells how often was looked: 0 where there is no /proc, and then nothing is known.
    """

    root: int = field(default_factory=os.getpid)
    interval: float = INTERVAL
    peak: MemoryUse = MemoryUse()
    peak_file: int = 0
    peak_at: float = 0.0
    processes: tuple[tuple[str, int], ...] = ()
    samples: int = 0
    _began: float = field(default_factory=time.perf_counter)
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def __enter__(self) -> MemoryWatch:
        self._thread = threading.Thread(target=self._run, name="memory watch", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def look(self) -> None:
        """Take one sample."""
        tree = process_tree(self.root)
        uses = {pid: memory_of(pid) for pid in tree}
        total = sum(uses.values(), MemoryUse())
        self.samples += bool(tree)
        self.peak_file = max(self.peak_file, total.file)
        if total.unavoidable > self.peak.unavoidable:
            self.peak, self.peak_at = total, time.perf_counter() - self._began
            held = [(tree[pid], use.unavoidable) for pid, use in uses.items()]
            self.processes = tuple(sorted(held, key=lambda item: -item[1]))

    def _run(self) -> None:
        while True:
            self.look()
            if self._stop.wait(self.interval):
                return
