"""The C++ ops, built once for this machine's best level and once for AVX2, which takes the other widths of every loop.

Other builds, of some of the ops or with macros that stand for another processor, are made for the tests that ask for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch._inductor.runtime.cache_dir_utils import cache_dir

from oxfuse.errors import UserError
from oxfuse.passes.fusions import build
from oxfuse.passes.fusions.build import OpsBuild, cached_ops, cpu_kernels, load_ops
from oxfuse.passes.fusions.isa import resolve_isa

BuildOps = Callable[..., OpsBuild]
_built: dict[str, OpsBuild] = {}


def level_here(isa: str) -> str:
    """Return the level that `isa` means, or skip where this machine lacks it."""
    try:
        level, needed = resolve_isa(isa)
    except UserError as error:
        pytest.skip(str(error))
    missing = sorted(set(needed) - set(resolve_isa("native")[1]))
    if missing:
        pytest.skip(f"this CPU does not have {level}: it lacks {', '.join(missing)}")
    return level


@pytest.fixture(scope="session")
def build_with(ops_folder: Path) -> BuildOps:
    """build_with(isa, *flags, ops=all): the C++ ops for a level, built with more flags than usual, once; not loaded.

    Skips where this machine lacks the level.
    """

    def make(isa: str, *flags: str, ops: tuple[str, ...] = ()) -> OpsBuild:
        level = level_here(isa)
        kernels = [kernel for kernel in cpu_kernels(live=True) if not ops or set(ops) & set(kernel.ops)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(build, "FLAGS", (*build.FLAGS, *flags))
            return cached_ops(kernels, level, ops_folder)

    return make


@pytest.fixture(scope="session", params=["native", "x86-64-v3"])
def ops(request: pytest.FixtureRequest) -> OpsBuild:
    level = level_here(request.param)
    if level not in _built:
        _built[level] = cached_ops(cpu_kernels(live=True), level, Path(cache_dir()) / "oxfuse")  # as `torch.compile` does
        load_ops(_built[level])
    return _built[level]


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
