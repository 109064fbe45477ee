from __future__ import annotations

from pathlib import Path

import pytest

from oxfuse.passes.fusions.build import OpsBuild, cached_ops, cpu_kernels, load_ops


@pytest.fixture(scope="session")
def ops(ops_folder: Path) -> OpsBuild:
    """The C++ ops of a compile."""
    build = cached_ops(cpu_kernels(), "native", ops_folder)
    load_ops(build)
    return build
