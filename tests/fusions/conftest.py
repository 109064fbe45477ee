"""The C++ ops, built once for this machine's best level and once for AVX2, which takes the other widths of every loop."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch._inductor.runtime.cache_dir_utils import cache_dir

from oxfuse.passes.fusions.build import OpsBuild, cached_ops, cpu_kernels, load_ops
from oxfuse.passes.fusions.isa import resolve_isa

_built: dict[str, OpsBuild] = {}


@pytest.fixture(scope="session", params=["native", "x86-64-v3"])
def ops(request: pytest.FixtureRequest) -> OpsBuild:
    level, needed = resolve_isa(request.param)
    if not set(needed) <= set(resolve_isa("native")[1]):
        pytest.skip(f"this CPU does not have {level}")
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
