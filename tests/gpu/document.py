"""What the GPU report found: the data, and how it is written down as JSON and as Markdown.

Rows come one by one while items run, so that whatever ends a run leaves what was found before it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Cell = str | int | float | bool | None
RAN, FAILED, SKIPPED = "ran", "failed", "skipped"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of a table: cells by column. `bar` is what it is held against, `passed` whether it reaches that, if it has one."""

    table: str
    cells: Mapping[str, Cell]
    bar: str = ""
    passed: bool | None = None


@dataclass(kw_only=True)
class ItemResult:
    """One item of a section: what became of it, its rows, and why it failed or was skipped."""

    name: str
    status: str
    seconds: float = 0.0
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    error: str = ""


@dataclass(kw_only=True)
class SectionResult:
    """One section, its items in the order in which they ran."""

    name: str
    title: str
    items: list[ItemResult] = field(default_factory=list)

    @property
    def rows(self) -> list[Row]:
        """Return the rows of all items."""
        return [row for item in self.items for row in item.rows]


@dataclass(kw_only=True)
class Document:
    """The whole report. `facts` are figures that other sections use, such as the measured bandwidth."""

    header: dict[str, str]
    sections: list[SectionResult] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    budget: float = 0.0
    ended: bool = False

    @property
    def faults(self) -> list[str]:
        """Return what did not run to its end or did not reach its bar, by name."""
        found = []
        for section in self.sections:
            for item in section.items:
                if item.status == FAILED:
                    found.append(
                        f"{section.name}: {item.name}: {item.error.strip().splitlines()[-1] if item.error else 'failed'}"
                    )
                found += [f"{section.name}: {_told(row)}: not {row.bar}" for row in item.rows if row.passed is False]
        return found

    def counts(self) -> dict[str, int]:
        """Return how many items ran, failed and were skipped, and how many bars were reached and missed."""
        items = [item for section in self.sections for item in section.items]
        bars = [row.passed for item in items for row in item.rows if row.passed is not None]
        counted = {status: sum(item.status == status for item in items) for status in (RAN, FAILED, SKIPPED)}
        return {**counted, "passed": bars.count(True), "missed": bars.count(False)}

    def to_json(self) -> str:
        """Return everything as JSON text; what is not a number is null."""
        plain = _finite({**dataclasses.asdict(self), "counts": self.counts(), "faults": self.faults})
        return json.dumps(plain, indent=1, ensure_ascii=False) + "\n"

    def to_markdown(self) -> str:
        """Return the report for people."""
        return "\n".join(_lines(self)) + "\n"

    def write(self, folder: Path, name: str) -> None:
        """Write NAME.json and NAME.md into `folder`, each in one step, so that a run that is cut off leaves whole files."""
        folder.mkdir(parents=True, exist_ok=True)
        for suffix, text in (("json", self.to_json()), ("md", self.to_markdown())):
            partial = folder / f".{name}.{suffix}.partial"
            partial.write_text(text, "utf-8")
            partial.replace(folder / f"{name}.{suffix}")


def _told(row: Row) -> str:
    """Name a row by its first cell that is text."""
    return next((value for value in row.cells.values() if isinstance(value, str)), row.table)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if value - value == 0 else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def _lines(document: Document) -> Iterator[str]:
    counts = document.counts()
    yield "# GPU report"
    yield ""
    yield from table(["", ""], [[name, value] for name, value in document.header.items()])
    yield ""
    state = "" if document.ended else " It was cut off: this is what it had."
    yield (
        f"{document.seconds:.0f} s of a budget of {document.budget:.0f} s; items: {counts[RAN]} ran, {counts[FAILED]} failed, "
        f"{counts[SKIPPED]} skipped; bars: {counts['passed']} reached, {counts['missed']} missed.{state}"
    )
    if document.faults:
        yield ""
        yield from (f"- **{fault}**" for fault in document.faults)
    for section in document.sections:
        yield ""
        yield f"## {section.title}"
        yield from _section(section)


def _section(section: SectionResult) -> Iterator[str]:
    for name in dict.fromkeys(row.table for row in section.rows):
        rows = [row for row in section.rows if row.table == name]
        columns = list(dict.fromkeys(column for row in rows for column in row.cells))
        with_bar = any(row.bar for row in rows)
        yield ""
        if name:
            yield f"**{name}**"
            yield ""
        body = [
            [*(row.cells.get(column) for column in columns), *([row.bar, _mark(row.passed)] if with_bar else [])] for row in rows
        ]
        yield from table([*columns, *(["bar", ""] if with_bar else [])], body)
    if notes := list(dict.fromkeys(note for item in section.items for note in item.notes)):
        yield ""
        yield from (f"- {note}" for note in notes)
    skipped: dict[str, list[str]] = {}
    for item in section.items:
        if item.status == SKIPPED:
            skipped.setdefault(item.error, []).append(item.name)
    for why, names in skipped.items():
        yield ""
        yield f"Skipped ({why}): {', '.join(names)}."
    for item in section.items:
        if item.status == FAILED:
            yield ""
            yield f"Failed: {item.name} after {item.seconds:.1f} s"
            yield ""
            yield "```"
            yield item.error.rstrip() or "it said nothing"
            yield "```"


def _mark(passed: bool | None) -> str:
    return "" if passed is None else "pass" if passed else "**FAIL**"


def shown(value: Cell) -> str:
    """Return a cell as text: whole numbers grouped, others with four digits, yes and no, nothing for None."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        large = abs(value) >= 1000 and abs(value) < 1e7
        return f"{value:,.0f}" if large else f"{value:.4g}"
    return value.replace("|", "\\|").replace("\n", " ")


def table(columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> Iterator[str]:
    """Yield the lines of a Markdown table whose columns are aligned in the text as well; numbers to the right."""
    texts = [[shown(value) for value in row] for row in rows]
    numeric = [bool(rows) and all(isinstance(row[i], int | float) or row[i] is None for row in rows) for i in range(len(columns))]
    widths = [
        max(3, len(name), *(len(row[i]) for row in texts)) if texts else max(3, len(name)) for i, name in enumerate(columns)
    ]

    def line(cells: Sequence[str]) -> str:
        padded = (text.rjust(w) if right else text.ljust(w) for text, w, right in zip(cells, widths, numeric, strict=True))
        return f"| {' | '.join(padded)} |"

    yield line(columns)
    yield f"| {' | '.join('-' * (w - 1) + (':' if right else '-') for w, right in zip(widths, numeric, strict=True))} |"
    yield from map(line, texts)
