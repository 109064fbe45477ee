from __future__ import annotations

import pytest

from oxfuse.passes.fusions.build import OpsBuild, build_ops, cpu_kernels, load_ops


@pytest.fixture(scope="session")
def ops(tmp_path_factory: pytest.TempPathFactory) -> OpsBuild:
    """The C++ ops, built once."""
    build = build_ops(cpu_kernels(), "native", tmp_path_factory.mktemp("ops") / "ops.so")
    load_ops(build)
    return build
