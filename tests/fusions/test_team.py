"""The threads of the C++ ops' own, which share few rows: the results are those of torch's threads, whoever calls and whenever.

That they are no slower is for the benchmarks; here are calls from several threads, after a fork, and on more threads than before.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from oxfuse.passes.fusions.build import OpsBuild
from oxfuse.runtime.program import TEAM_ROWS, TeamSwitch, team_switch

ROWS, LENGTH = 1000, 512
"""Of a weight whose product with one row is worth several threads."""


@pytest.fixture(scope="module")
def switch(ops: OpsBuild) -> TeamSwitch:
    found = team_switch(ops.names["aten::linear"])
    assert found is not None
    return found


@pytest.fixture
def team(switch: TeamSwitch) -> Iterator[None]:
    switch(2, 1)  # with more than there are processors nobody asks ahead
    yield
    switch(0, 1)


def weights() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(count, LENGTH, generator=generator).bfloat16() for count in (TEAM_ROWS + 1, ROWS))
    return x, weight


def linear(ops: OpsBuild, x: Tensor, weight: Tensor) -> Tensor:
    namespace, _, name = ops.names["aten::linear"].partition("::")
    result: Tensor = getattr(getattr(torch.ops, namespace), name)(x, weight)
    return result


@pytest.mark.parametrize("rows", range(1, TEAM_ROWS + 2))
def test_results_are_those_of_torch_threads(rows: int, ops: OpsBuild, switch: TeamSwitch) -> None:
    x, weight = weights()
    expected = linear(ops, x[:rows], weight)
    assert torch.allclose(expected.float(), x[:rows].float() @ weight.float().T, rtol=2**-7, atol=2**-7)
    for threads in (1, 2, 5):
        switch(threads, 1)
        same = [linear(ops, x[:rows], weight).equal(expected) for _ in range(20)]
        switch(0, 1)
        assert all(same)


def test_a_switch_holds_on_its_thread_alone(ops: OpsBuild, switch: TeamSwitch) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        switch(3, 1)
        assert torch.get_num_threads() == 1
        seen = list[int]()
        thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert seen == [2]
        switch(0, 2)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_callers_that_come_at_once(ops: OpsBuild, switch: TeamSwitch) -> None:
    """One has the team, the others do without it."""
    x, weight = weights()
    expected = [linear(ops, x[n : n + 1], weight) for n in range(TEAM_ROWS)]
    wrong = list[int]()

    def call(n: int) -> None:
        torch.get_num_threads()
        switch(3, 1)
        wrong.extend(n for _ in range(200) if not linear(ops, x[n : n + 1], weight).equal(expected[n]))
        switch(0, 1)

    callers = [threading.Thread(target=call, args=(n,)) for n in range(TEAM_ROWS)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


def test_a_team_that_slept_wakes(ops: OpsBuild, team: None) -> None:
    x, weight = weights()
    expected = linear(ops, x[:1], weight)
    for _ in range(5):
        threading.Event().wait(0.02)
        assert linear(ops, x[:1], weight).equal(expected)


def test_weights_that_are_gone(ops: OpsBuild, team: None, tmp_path: Path) -> None:
    """They are asked for where they were before, and that is no access."""
    x, weight = weights()
    for round in range(3):
        (path := tmp_path / str(round)).write_bytes(weight.view(torch.int16).numpy().tobytes())
        mapped = torch.from_file(str(path), shared=True, size=weight.numel(), dtype=torch.bfloat16).view_as(weight)
        for each in (mapped, weight):
            linear(ops, x[:1], each)
        del mapped, each
        linear(ops, x[:1], weight)


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
def test_threads_are_made_once_and_again_in_a_child(ops: OpsBuild, tmp_path: Path) -> None:
    """A fork copies the caller's thread alone: the child would wait for the others for ever."""
    script = f"""
        import os, torch
        from oxfuse.runtime.program import team_switch
        torch.ops.load_library({str(ops.path)!r})
        name = {ops.names["aten::linear"]!r}
        switch, linear = team_switch(name), getattr(torch.ops.oxfuse, name.split("::")[1])
        x, weight = torch.randn(1, {LENGTH}).bfloat16(), torch.randn({ROWS}, {LENGTH}).bfloat16()
        torch.set_num_threads(1)
        expected = linear(x, weight)
        running = lambda: len(os.listdir("/proc/self/task"))
        alone = running()
        for threads, most in ((3, 3), (3, 3), (2, 3), (6, 6), (3, 6)):
            switch(threads, 1)
            assert linear(x, weight).equal(expected)
            assert running() == alone + most - 1, (threads, running(), alone)
        if child := os.fork():
            assert linear(x, weight).equal(expected)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        else:
            os._exit(0 if linear(x, weight).equal(expected) and running() == 3 else 1)
    """
    (tmp_path / "team.py").write_text(textwrap.dedent(script), "utf-8")
    done = subprocess.run([sys.executable, tmp_path / "team.py"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
