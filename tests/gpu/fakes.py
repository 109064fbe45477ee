"""Sections for the report's own tests: items that find something, fail, die, hang, or take too long. No GPU and no torch."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .document import Row
from .worker import Fact, Found, Item, Note, Section

SECTIONS = (
    Section(name="good", title="What is found", items="tests.gpu.fakes:good_items"),
    Section(name="bad", title="What goes wrong", items="tests.gpu.fakes:bad_items"),
    Section(name="broken", title="What cannot be imported", items="tests.gpu.no_such_module:items"),
    Section(name="long", title="What takes too long", items="tests.gpu.fakes:long_items", quiet=True, fresh=True),
)


@dataclass
class FakeLab:
    """Answers unless an item has left a mark."""

    work: Path
    facts: dict[str, Any]
    kept: dict[str, Any] = field(default_factory=dict)

    def healthy(self) -> bool:
        """Tell whether no item has broken it."""
        return "broken" not in self.kept

    def tidy(self) -> None:
        """Count."""
        self.kept["tidied"] = self.kept.get("tidied", 0) + 1


def open_lab(work: Path, facts: dict[str, Any]) -> FakeLab:
    """Return a lab."""
    return FakeLab(work=work, facts=facts)


def background(names: Sequence[str], work: Path) -> Mapping[str, Sequence[str]]:
    """Leave a file, as something that is prepared."""
    return {"prepared": ["touch", str(work / "prepared")]}


def good_items() -> list[Item]:
    """Return items that work."""
    return [Item(name="rows", seconds=0.1, run=rows), Item(name="nothing", seconds=0.1, run=lambda lab: iter(()))]


def bad_items() -> list[Item]:
    """Return items that do not, and one that comes after them."""
    return [
        Item(name="raises", seconds=0.1, run=raises),
        Item(name="breaks the GPU", seconds=0.1, run=breaks),
        Item(name="dies", seconds=0.1, run=dies),
        Item(name="hangs", seconds=0.1, run=hangs),
        Item(name="comes after", seconds=0.1, run=comes_after),
    ]


def long_items() -> list[Item]:
    """Return an item that does not fit a small budget, and one that does."""
    return [Item(name="an hour", seconds=3600.0, run=rows), Item(name="an instant", seconds=0.0, run=comes_after)]


def rows(lab: FakeLab) -> Iterator[Found]:
    """Find rows with and without bars, a fact and a note."""
    yield Row(
        table="Shares", cells={"what": "first | one", "µs": 12.3456, "share": 0.5, "count": 12345}, bar="≥ 0.4", passed=True
    )
    yield Row(table="Shares", cells={"what": "second", "µs": 1234567.0, "share": None, "count": 1}, bar="≥ 0.4", passed=False)
    yield Row(table="", cells={"what": "not a number", "value": float("nan")})
    yield Fact(name="bandwidth", value=4.2)
    yield Note(text="A note.")


def raises(lab: FakeLab) -> Iterator[Found]:
    """Fail after a row."""
    yield Row(table="Before", cells={"what": "a row before the error"})
    raise ValueError("this item fails")


def breaks(lab: FakeLab) -> Iterator[Found]:
    """Fail such that the process is of no use any more."""
    lab.kept["broken"] = True
    raise RuntimeError("an illegal memory access was encountered")
    yield


def dies(lab: FakeLab) -> Iterator[Found]:
    """End the process."""
    yield Row(table="Before", cells={"what": "a row before the end"})
    os.kill(os.getpid(), signal.SIGSEGV)


def hangs(lab: FakeLab) -> Iterator[Found]:
    """Never come back."""
    time.sleep(600)
    yield


def comes_after(lab: FakeLab) -> Iterator[Found]:
    """Tell in which process this is, and what it knows."""
    cells = {
        "what": "after",
        "fact": lab.facts.get("bandwidth"),
        "fresh": "tidied" not in lab.kept,
        "prepared": (lab.work / "prepared").exists(),
    }
    yield Row(table="After", cells=cells)
