"""Runs items of the report, one at a time, in a process of its own: what a kernel that nobody has tried may do to it stays in it.

    python tests/gpu worker MODULE WORK FACTS SECTION...

MODULE has `SECTIONS` and `open_lab`. Requests come as JSON lines on stdin, {"section", "item"}; what is found goes to stdout as
JSON lines. After an error the GPU is asked whether it still answers; if not, the process ends, and the report starts another.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, TextIO

from .document import Row

TAIL = 12
"""Lines of a traceback that are kept."""


@dataclass(frozen=True, kw_only=True)
class Fact:
    """A figure that other sections use, kept for later processes, too."""

    name: str
    value: Any


@dataclass(frozen=True, kw_only=True)
class Note:
    """A sentence below the section's tables."""

    text: str


Found = Row | Fact | Note


@dataclass(frozen=True, kw_only=True)
class Item:
    """A piece of a section that can fail alone. `seconds` is what it is believed to take, `run` yields what it finds."""

    name: str
    seconds: float
    run: Callable[[Any], Iterable[Found]]


class Lab(Protocol):
    """What items share within a process."""

    def healthy(self) -> bool:
        """Tell whether the GPU still answers."""

    def tidy(self) -> None:
        """Let go of what an item left behind."""


@dataclass(frozen=True, kw_only=True)
class Section:
    """A chapter of the report. `items` is "module:function", a function that returns its items.

    `quiet`: it measures time, nothing else may run; `fresh`: it begins in a new process, with nothing on the GPU.
    """

    name: str
    title: str
    items: str
    quiet: bool = False
    fresh: bool = False


def main(arguments: Sequence[str]) -> int:
    """Serve requests until stdin ends; return 3 where the GPU does not answer any more."""
    out, _ = os.fdopen(os.dup(1), "w", encoding="utf-8"), os.dup2(2, 1)  # what a library prints must not get between the lines
    module_name, work, facts, *names = arguments
    module = importlib.import_module(module_name)
    wanted = [section for section in module.SECTIONS if section.name in names]
    items, errors = dict[str, dict[str, Item]](), dict[str, str]()
    for section in wanted:
        try:
            place, _, function = section.items.partition(":")
            items[section.name] = {item.name: item for item in getattr(importlib.import_module(place), function)()}
        except Exception as error:
            errors[section.name] = tail_of(error)
    lab: Lab = module.open_lab(Path(work), json.loads(facts))
    listed = {name: [[item.name, item.seconds] for item in found.values()] for name, found in items.items()}
    send(out, {"event": "ready", "items": listed, "errors": errors})
    for line in sys.stdin:
        request = json.loads(line)
        if not run_item(items[request["section"]][request["item"]], lab, out):
            return 3
    return 0


def run_item(item: Item, lab: Lab, out: TextIO) -> bool:
    """Run one item, send what it finds and how it ended; return whether the process may go on."""
    began, error = time.monotonic(), ""
    try:
        for found in item.run(lab):
            kind = {Row: "row", Fact: "fact", Note: "note"}[type(found)]
            send(out, {"event": kind, **asdict(found)})
    except Exception as problem:
        error = tail_of(problem)
    fine = not error or lab.healthy()
    if fine:
        lab.tidy()
    send(out, {"event": "end", "seconds": time.monotonic() - began, "error": error, "fine": fine})
    return fine


def tail_of(error: BaseException) -> str:
    """Return the last lines of an error's traceback."""
    lines = "".join(traceback.format_exception(error)).rstrip().splitlines()
    return "\n".join(line[:400] for line in lines[-TAIL:])


def send(out: TextIO, message: Mapping[str, Any]) -> None:
    """Write one line."""
    print(json.dumps(message, default=_plain), file=out, flush=True)


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else str(value)
