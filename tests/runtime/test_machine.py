"""What the machine offers, read from files as both generations of control groups write them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from oxfuse.runtime.machine import cpu_features, memory, processors

KB = 1024
CPUINFO = "processor : 0\nmodel name\t: A Chip\nflags\t\t: fpu avx2 avx512f\n\nprocessor : 1\nflags : other\n"


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    return write(
        tmp_path / "proc",
        {"meminfo": "MemTotal: 1000 kB\nMemFree: 1 kB\nMemAvailable: 700 kB\n", "cpuinfo": CPUINFO, "self/cgroup": "0::/a/b\n"},
    )


def test_processor_flags(tmp_path: Path) -> None:
    write(tmp_path, {"x86": CPUINFO, "arm": "Features\t: fp asimd\n"})
    assert cpu_features(tmp_path / "x86") == {"fpu", "avx2", "avx512f"}
    assert cpu_features(tmp_path / "arm") == {"fp", "asimd"} and cpu_features(tmp_path / "none") == frozenset()


@pytest.mark.parametrize(
    ("lines", "files", "limit", "quota"),
    [
        ("0::/a/b\n", {}, None, None),
        ("0::/a/b\n", {"a/b/memory.max": "max\n", "a/b/cpu.max": "max 100000\n"}, None, None),
        ("0::/a/b\n", {"a/b/memory.max": "409600\n", "a/b/cpu.max": "150000 100000\n"}, 400 * KB, 1.5),
        ("0::/a/b\n", {"a/b/memory.max": "409600\n", "a/memory.max": "204800\n", "cpu.max": "5000 10000"}, 200 * KB, 0.5),
        ("0::/\n", {"memory.max": "409600\n"}, 400 * KB, None),
        ("0::/../../x\n", {"memory.max": "409600\n"}, 400 * KB, None),
        ("0::/a/b\n", {"a/b/memory.max": f"{5000 * KB}\n"}, None, None),  # more than there is
        (
            "5:memory:/m\n3:cpu,cpuacct:/c\n0::/\n",
            {
                "memory/m/memory.limit_in_bytes": "307200\n",
                "memory/memory.limit_in_bytes": "9223372036854771712\n",
                "cpu/c/cpu.cfs_quota_us": "250000\n",
                "cpu/c/cpu.cfs_period_us": "100000\n",
                "cpu/cpu.cfs_quota_us": "-1\n",
                "cpu/cpu.cfs_period_us": "100000\n",
            },
            300 * KB,
            2.5,
        ),
    ],
)
def test_limits_of_a_container(
    proc: Path, tmp_path: Path, lines: str, files: dict[str, str], limit: int | None, quota: float | None
) -> None:
    (proc / "self" / "cgroup").write_text(lines)
    cgroup = write(tmp_path / "cgroup", files)
    found = memory(proc, cgroup)
    assert found is not None and (found.total, found.available, found.limit) == (1000 * KB, 700 * KB, limit)
    assert found.usable == (limit or 1000 * KB)
    here = processors(proc, cgroup)
    assert (here.model, here.quota) == ("A Chip", quota) and here.count == len(os.sched_getaffinity(0))
    expected = here.count if quota is None else min(here.count, {0.5: 1, 1.5: 2, 2.5: 3}[quota])
    assert here.threads == expected


def test_a_system_without_these_files(tmp_path: Path) -> None:
    assert memory(tmp_path, tmp_path) is None
    assert (processors(tmp_path, tmp_path).model, processors(tmp_path, tmp_path).quota) == ("unknown", None)
