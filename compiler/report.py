"""What a compile did, for a person (`report.md`) and for programs (`report.json`).

In: one dataclass that the compile fills. Out: both files in the artifact. The runtime never needs them.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from oxfuse.runtime.manifest import Limits, ModelSpec, PassRecord, Requirements

REPORT_JSON = "report.json"
REPORT_MD = "report.md"
NUMBER = re.compile(r"(?:\d[\d.,e+-]*(?: ?[kMG]?B| s|%)?|–)?")


@dataclass(frozen=True, kw_only=True)
class ProgramReport:
    """One program: its files' bytes, and how often its graph calls each op, the most frequent first."""

    name: str
    target: str
    bytes: int
    ops: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class MemoryReport:
    """Peaks in bytes over the compile and every process it started; file-backed pages can be dropped, the rest cannot."""

    anonymous_and_shared: int
    file_backed: int


@dataclass(frozen=True, kw_only=True)
class Parity:
    """The artifact against the oracle over the golden rows: errors of the logits, and how often the best token agrees (0 to 1).

    All three are None where the artifact could not run, and then `reason` says why.
    """

    rows: int
    rms: float | None = None
    max: float | None = None
    top1: float | None = None
    reason: str | None = None

    def __post_init__(self) -> None:
        known = [value is not None for value in (self.rms, self.max, self.top1)]
        assert all(known) if self.reason is None else not any(known), "parity is measured, or there is a reason why not"


@dataclass(frozen=True, kw_only=True)
class Report:
    """All that is reported. `sizes` is bytes by kind of file; `seconds` wall time by phase, in order; `notes` are sentences."""

    name: str
    created_by: dict[str, str]
    source: dict[str, str]
    model: ModelSpec
    limits: Limits
    programs: tuple[ProgramReport, ...]
    sizes: dict[str, int]
    passes: tuple[PassRecord, ...]
    seconds: dict[str, float]
    memory: MemoryReport | None
    parity: Parity
    numerics: dict[str, str]
    requirements: Requirements
    notes: tuple[str, ...] = field(default=())

    def to_json(self) -> str:
        """Return the report as indented JSON text."""
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"

    def to_markdown(self) -> str:
        """Return the report as Markdown text that reads well unrendered."""
        return "\n\n".join(_sections(self)) + "\n"


def write_report(folder: Path, report: Report) -> None:
    """Write `report.json` and `report.md` into `folder`."""
    (folder / REPORT_JSON).write_text(report.to_json(), "utf-8")
    (folder / REPORT_MD).write_text(report.to_markdown(), "utf-8")


def _sections(report: Report) -> Iterable[str]:
    model, parity, need = report.model, report.parity, report.requirements
    yield f"# {report.name}"
    by = ", ".join(f"{name} {version}" for name, version in report.created_by.items())
    yield f"A {model.model_type} model for {model.task}, compiled in {model.dtype} by {by}."
    limits = report.limits
    most, batch, step = limits.max_context, limits.max_batch, limits.max_step_tokens
    yield f"Sequences of up to {most:,} tokens, {batch:,} at a time, {step:,} tokens a step."
    yield _bullets(f"source {name}: {value}" for name, value in report.source.items())
    if report.notes:
        yield _bullets(report.notes)

    yield "## Parity with the oracle"
    if parity.reason is not None:
        yield f"Not measured: {parity.reason} `oxfuse verify` measures it where the artifact can run."
    else:
        assert parity.rms is not None and parity.max is not None and parity.top1 is not None
        yield (
            f"Over {parity.rows} rows of logits, against the float32 reference: RMS error {parity.rms:.2e}, "
            f"maximum error {parity.max:.2e}, best token the same in {parity.top1:.1%}."
        )

    yield "## Programs"
    yield _table(("program", "target", "size"), [(p.name, p.target, size_text(p.bytes)) for p in report.programs])
    yield _bullets(f"{p.name} calls {', '.join(f'{count} {op}' for op, count in p.ops.items())}" for p in report.programs)

    yield "## Sizes"
    total = sum(report.sizes.values())
    yield _table(
        ("files", "size"), [*((kind, size_text(size)) for kind, size in report.sizes.items()), ("together", size_text(total))]
    )

    yield "## Passes"
    yield _table(
        ("pass", "rewrites", "checked", "largest error"),
        [(p.name, f"{p.count:,}", f"{p.checked:,}", "–" if p.max_error is None else f"{p.max_error:.1e}") for p in report.passes],
    )
    yield (
        "Each structurally distinct rewrite is run on random tokens against what it replaced; the error is relative to the "
        "largest value."
    )

    yield "## Where the time went"
    whole = sum(report.seconds.values())
    spent = [(phase, f"{s:.1f} s", f"{s / whole:.0%}" if whole else "–") for phase, s in report.seconds.items()]
    yield _table(("phase", "time", "share"), [*spent, ("together", f"{whole:.1f} s", "")])

    if report.memory is not None:
        yield "## Peak memory of the compile"
        yield (
            f"{size_text(report.memory.anonymous_and_shared)} anonymous and shared, all processes together. "
            f"{size_text(report.memory.file_backed)} of mapped files besides, which the system can drop at any time."
        )

    yield "## Numerics"
    yield _bullets(f"{name}: {policy}" for name, policy in report.numerics.items())

    yield "## What it needs to run"
    features = f" with {', '.join(need.cpu_features)}" if need.cpu_features else ""
    yield _bullets(
        [
            f"torch {need.torch}",
            f"{need.platform} on {need.machine}{features} ({need.cpu_isa})",
            *([f"glibc {need.glibc} or later"] if need.glibc else []),
        ]
    )


def _bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table with its columns aligned, numbers to the right; an empty one is a dash."""
    if not rows:
        return "–"
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (head, *rows)]
    widths = [max(3, *(len(row[i]) for row in cells)) for i in range(len(head))]
    right = [all(NUMBER.fullmatch(row[i]) for row in cells[1:]) for i in range(len(head))]
    rule = ["-" * (w - 1) + ":" if r else "-" * w for w, r in zip(widths, right, strict=True)]

    def line(row: Sequence[str]) -> str:
        padded = [cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(row, widths, right, strict=True)]
        return f"| {' | '.join(padded)} |"

    return "\n".join([line(cells[0]), line(rule), *map(line, cells[1:])])


def size_text(count: float) -> str:
    """Return a number of bytes in decimal units, three digits."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            break
        count /= 1000
    return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
