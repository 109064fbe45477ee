"""Compiles kernels into Triton's cache before the report's worker needs them: one of several processes.

    python tests/gpu precompile PART PARTS SECTION...

Launch functions run on tensors without values, and what they launch is compiled and not run. Nothing depends on this but time:
what fails here fails again, and is told, where it is launched.
"""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

SOURCES = {"kernels": "tests.gpu.kernels", "timing": "tests.gpu.timing", "tuning": "tests.gpu.tuning"}
"""Modules with `jobs(arch)`: functions that launch kernels through the `wrap` and on the device that they are given."""


class Compiler:
    """Stands for `wrap_triton`: a kernel is compiled for its arguments and not launched."""

    def __init__(self, kernel: Any) -> None:
        """Take a kernel."""
        self._kernel = kernel

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        """Return a launcher."""

        def compile_(*args: Any, **kwargs: Any) -> None:
            self._kernel.warmup(*args, grid=grid, **kwargs)

        return compile_


Job = Callable[[Callable[[Any], Any], str], object]
"""Takes `wrap` and the name of a device."""


def jobs_of(names: Sequence[str], arch: int) -> Iterator[Job]:
    """Yield the jobs of some sections, in their order."""
    for name in names:
        yield from importlib.import_module(SOURCES[name]).jobs(arch)


def main(arguments: Sequence[str]) -> int:
    """Run every PARTS-th job from number PART on."""
    import torch

    part, parts, names = int(arguments[0]), int(arguments[1]), arguments[2:]
    torch.set_grad_enabled(False)
    major, minor = torch.cuda.get_device_capability()
    began, done, failed = time.monotonic(), 0, 0
    for number, job in enumerate(jobs_of(names, 10 * major + minor)):
        if number % parts == part:
            try:
                job(Compiler, "meta")
            except Exception as error:
                failed += 1
                print(f"job {number}: {type(error).__name__}: {str(error)[:300]}", file=sys.stderr, flush=True)
            done += 1
    print(f"{done} jobs, {failed} failed, {time.monotonic() - began:.0f} s", file=sys.stderr)
    return 0
