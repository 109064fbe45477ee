"""The checked-in table of the kernels' machine code: that it is of these kernels, and that they fit their GPUs."""

from __future__ import annotations

from pathlib import Path

import pytest

from oxfuse.compiler.lowering.kernels import SHARED_MEMORY

from .checkout import HERE, kernel_sources
from .cubins import Cubin, Table, cubins_of
from .kernels import calls

FAST = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
"""What large products are made of where tensor cores do them."""
ODD = "odd sizes, 3 rows"
"""Rows of 1031 values, which are loaded value by value: no released model has such, and there a few bytes spill."""
GROUPED = ("prefill_kernel", "gate_up_kernel", "down_kernel")


@pytest.fixture(scope="module")
def checked_in() -> Table:
    return Table.read(HERE / "results")


def test_it_is_of_these_kernels(checked_in: Table, tmp_path: Path) -> None:
    remedy = "kernels have changed: run `python -m tests.gpu.cubins`, and look at the difference"
    assert checked_in.sources == kernel_sources(ops=False), remedy
    checked_in.write(tmp_path)
    for name in ("cubins.json", "cubins.md"):
        assert (tmp_path / name).read_text() == (HERE / "results" / name).read_text()


def test_all_kernels_are_in_it_and_fit(checked_in: Table) -> None:
    by_arch = {arch: [cubin for cubin in checked_in.cubins if cubin.arch == arch] for arch in SHARED_MEMORY}
    assert {*by_arch} == {cubin.arch for cubin in checked_in.cubins}
    for arch, cubins in by_arch.items():
        assert {cubin.op for cubin in cubins} == {call.op for call in calls()}
        for cubin in cubins:
            assert fits(cubin), cubin
        assert {cubin.kernel for cubin in cubins} == {cubin.kernel for cubin in by_arch[90]}
        for cubin in cubins:
            if cubin.kernel in GROUPED and "float32" not in cubin.case:
                assert FAST[arch] in cubin.tensor_cores, cubin


def fits(cubin: Cubin) -> bool:
    """Tell whether a kernel runs on its arch. One of 4 registers does nothing, as where tensor memory is too small."""
    return (
        cubin.registers > 8
        and (not cubin.spill_bytes or cubin.case == ODD)
        and not cubin.float64
        and cubin.shared_bytes <= SHARED_MEMORY[cubin.arch]
    )


AGAIN = (
    ("qkv_rotary", "20b, 1 rows"),
    ("attention", "20b decode, up to 32k, full"),
    ("attention", "20b step of 2048, full"),
    ("moe_experts", "20b, 1 rows"),
    ("moe_dispatch", "20b, 512 tokens"),
)


@pytest.mark.slow
@pytest.mark.parametrize("arch", sorted(SHARED_MEMORY))
@pytest.mark.parametrize(("op", "name"), AGAIN)
def test_some_are_made_again(op: str, name: str, arch: int) -> None:
    """Another triton may give other figures, so they are held against the limits alone."""
    made = [cubin for _, cubin in cubins_of([(call.op, call.name) for call in calls()].index((op, name)), arch)]
    assert made and all(map(fits, made)), made
