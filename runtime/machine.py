"""What this machine offers: processor, threads and memory, and how much of them a container leaves to this process.

In: the kernel's files under /proc and /sys/fs/cgroup (both generations of control groups), whose places tests replace. Out: plain
numbers, None where the system does not tell. Nothing is imported but the standard library, so `inspect` and `doctor` work on a
machine that has nothing else.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

PROC = Path("/proc")
CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes: what the machine has, what is free for new use (caches that can be dropped included), and the container's limit."""

    total: int
    available: int
    limit: int | None

    @property
    def usable(self) -> int:
        """The most that this process may ever have."""
        return self.total if self.limit is None else min(self.total, self.limit)


@dataclass(frozen=True, kw_only=True)
class Processors:
    """`model` as the processor calls itself; `count`: logical processors that this process may use; `quota`: how many of them
    the container lets it keep busy, None where it does not say.
    """

    model: str
    count: int
    quota: float | None

    @property
    def threads(self) -> int:
        """How many threads can run at once."""
        return self.count if self.quota is None else max(1, min(self.count, math.ceil(self.quota)))


def cpu_features(cpuinfo: Path = PROC / "cpuinfo") -> frozenset[str]:
    """Return the first processor's flags as /proc/cpuinfo spells them (x86 `flags`, arm64 `Features`); empty where unknown."""
    return frozenset(_cpuinfo(cpuinfo, "flags|Features").split())


def memory(proc: Path = PROC, cgroup: Path = CGROUP) -> Memory | None:
    """Return the memory of this machine, None where there is no /proc/meminfo."""
    found: dict[str, str] = dict(re.findall(r"^(\w+):\s+(\d+) kB", _read(proc / "meminfo"), re.MULTILINE))
    if "MemTotal" not in found:
        return None
    limits = [
        int(text)
        for folder, generation in _groups(proc, cgroup, "memory")
        if (text := _read(folder / {1: "memory.limit_in_bytes", 2: "memory.max"}[generation]).strip()).isdigit()
    ]
    total = int(found["MemTotal"]) << 10
    return Memory(
        total=total,
        available=int(found.get("MemAvailable", found["MemTotal"])) << 10,
        limit=min(limits) if limits and min(limits) < total else None,  # "no limit" may be a number that no machine has
    )


def processors(proc: Path = PROC, cgroup: Path = CGROUP) -> Processors:
    """Return the processors of this machine."""
    allowed: Callable[[int], set[int]] | None = getattr(os, "sched_getaffinity", None)
    quotas = [quota for folder, generation in _groups(proc, cgroup, "cpu") if (quota := _quota(folder, generation)) is not None]
    return Processors(
        model=_cpuinfo(proc / "cpuinfo", "model name") or "unknown",
        count=len(allowed(0)) if allowed else os.cpu_count() or 1,
        quota=min(quotas, default=None),
    )


def _quota(folder: Path, generation: int) -> float | None:
    if generation == 2:
        words = _read(folder / "cpu.max").split()
    else:
        words = [_read(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
    if len(words) == 2 and all(word.isdigit() for word in words) and int(words[0]) and int(words[1]):
        return int(words[0]) / int(words[1])
    return None  # "max", -1, or no such file


def _groups(proc: Path, cgroup: Path, controller: str) -> Iterator[tuple[Path, int]]:
    """Yield this process's control group and all above it, each with the generation it is of: every one's limit holds."""
    for line in _read(proc / "self" / "cgroup").splitlines():
        number, controllers, path = (*line.split(":", 2), "", "")[:3]
        if number == "0" and not controllers:
            root, generation = cgroup, 2
        elif controller in controllers.split(","):
            root, generation = cgroup / controller, 1
        else:
            continue
        inner = PurePosixPath(path.lstrip("/"))
        for part in (inner, *inner.parents):
            yield root / part, generation


def _cpuinfo(path: Path, names: str) -> str:
    found = re.search(rf"^(?:{names})\s*:(.*)$", _read(path), re.MULTILINE)
    return found[1].strip() if found else ""


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8", "replace")
    except OSError:
        return ""
