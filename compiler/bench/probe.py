"""What the machine can do at best, and who else uses it: the floor and the disturbance beside every figure.

In: threads, dtype. Out: bytes and floating-point operations a second, measured here and now, and cores that other processes keep
busy. Shared machines change from minute to minute, so a probe belongs to the run that it stands beside.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

STAT = Path("/proc/stat")
TICK = os.sysconf("SC_CLK_TCK")
PROBE_BYTES = 512 << 20  # larger than any cache by far


class BandwidthProbe:
    """Reads one block of memory again and again with `threads`. It stays in place: where a block lies changes what it gives.

    Sums alone understate the bandwidth: kernels that stream rows of weights were seen above them.
    """

    def __init__(self, threads: int) -> None:
        data = torch.ones(PROBE_BYTES // 4)
        rows, vector = data.view(-1, 4096), torch.ones(4096)
        self._threads = threads
        self._readers: tuple[Callable[[], object], ...] = (data.sum, data.amax, lambda: rows @ vector)

    def __call__(self, rounds: int = 1) -> float:
        """Return the bytes a second read now: the best of all readers and `rounds`. Restores torch's threads."""
        return PROBE_BYTES / _fastest(self._readers, self._threads, rounds)


def read_bandwidth(threads: int, rounds: int = 5) -> float:
    """Return the bytes a second that `threads` read from memory: the best of `rounds` of a new `BandwidthProbe`."""
    return BandwidthProbe(threads)(rounds)


def matmul_peak(
    threads: int, size: int = 1536, rounds: int = 3, dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16)
) -> float:
    """Return the operations a second of torch's best square matmul in any of `dtypes`, int8 among them. Restores the threads."""
    products: list[Callable[[], object]] = []
    for dtype in dtypes:
        if dtype == torch.int8:
            a, b = (torch.randint(-127, 128, (size, size), dtype=dtype) for _ in range(2))
            products.append(functools.partial(torch._int_mm, a, b))
        else:
            a, b = (torch.randn(size, size, dtype=dtype) for _ in range(2))
            products.append(functools.partial(torch.mm, a, b))
    return float(2 * size**3 / _fastest(products, threads, rounds))


def _fastest(probes: Sequence[Callable[[], object]], threads: int, rounds: int) -> float:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        best = float("inf")
        for probe in probes:
            probe()
            for _ in range(rounds):
                began = time.perf_counter()
                probe()
                best = min(best, time.perf_counter() - began)
        return best
    finally:
        torch.set_num_threads(before)


@dataclass(kw_only=True)
class ForeignLoad:
    """Cores that processes besides `processes` kept busy since this was made, or since the last `look`.

    `patience`: seconds that all waits together may take.

    The kernel counts in ticks of 10 ms, so looks less than some tenths of a second apart say little. Where the kernel does not
    tell (no /proc), there is no foreign load to see, and `look` returns None.
    """

    processes: tuple[int, ...]
    patience: float = 0.0
    _at: float = field(default=0.0, init=False)
    _busy: float = field(default=0.0, init=False)
    _own: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        self.look()

    def look(self) -> float | None:
        """Return the cores that others used since the last look."""
        now, busy, own = time.perf_counter(), _busy_seconds(), sum(_seconds_of(process) for process in self.processes)
        if busy is None:
            return None
        elapsed, others = now - self._at, (busy - self._busy) - (own - self._own)
        self._at, self._busy, self._own = now, busy, own
        return max(0.0, others / elapsed)

    def wait(self, below: float, interval: float = 0.5) -> None:
        """Wait until others use less than `below` cores, or the patience is at its end."""
        self.look()
        while self.patience > 0:
            began = time.perf_counter()
            time.sleep(interval)
            seen = self.look()
            if seen is None or seen < below:
                return
            self.patience -= time.perf_counter() - began


def _busy_seconds() -> float | None:
    """Return the seconds that all cores together were busy or taken by the host (steal), since boot."""
    try:
        words = STAT.read_text().split(maxsplit=11)
    except OSError:
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, words[1:9])
    return (user + nice + system + irq + softirq + steal) / TICK


def _seconds_of(process: int) -> float:
    """Return the processor seconds of a process and of those of its children that have ended."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return sum(map(int, fields[11:15])) / TICK
