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
from typing import Any

from oxfuse.runtime.manifest import ONNX_CUDA, Limits, ModelSpec, PassRecord, Requirements
from oxfuse.runtime.units import size_text

REPORT_JSON = "report.json"
REPORT_MD = "report.md"
COMMANDS = {  # how a model of each task is tried; {} is its folder
    "text-generation": "generate {} -p 'Once upon a time'",
    "text-classification": "classify {} -p 'What a film.'",
    "token-classification": "tag {} -p 'Ada Lovelace lived in London.'",
    "question-answering": "answer {} -p 'Since when?' --context 'It opened in 1884.'",
    "feature-extraction": "embed {} -p 'Once upon a time'",
}
VALUES = {  # what a row of a model's values is
    "text-generation": "logits",
    "text-classification": "label logits",
    "token-classification": "label logits",
    "question-answering": "start and end logits",
    "feature-extraction": "hidden states",
}
NUMBER = re.compile(r"(?:\d[\d.,e+-]*(?: ?[kMG]?B| s|%)?|–)?")


@dataclass(frozen=True, kw_only=True)
class ProgramReport:
    """One program: its files' bytes, how often its graph calls each op, and, on a GPU, what is inside (`Anatomy.to_json`)."""

    name: str
    target: str
    bytes: int
    ops: dict[str, int]
    anatomy: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class MemoryReport:
    """Peaks in bytes over the compile and every process it started; file-backed pages can be dropped, the rest cannot."""

    anonymous_and_shared: int
    file_backed: int


@dataclass(frozen=True, kw_only=True)
class Parity:
    """The artifact against the oracle over the golden rows: errors of the values, and how often a row's largest agrees.

    `top1` is that share, 0 to 1; the largest is the best token or label, and with other heads nothing, so `report.md` leaves it
    out. `reference_rms` and `reference_max` are those of the oracle's values, `kl` the mean divergence of a language model's next
    token from the oracle's, in nats. `own_rms` and `own_max` are errors against the oracle with the artifact's own weights, where
    those lost something. All are None where the artifact could not run, and then `reason` says why. `note` is a sentence on how
    it was measured.
    """

    rows: int
    rms: float | None = None
    max: float | None = None
    top1: float | None = None
    reference_rms: float | None = None
    reference_max: float | None = None
    kl: float | None = None
    own_rms: float | None = None
    own_max: float | None = None
    note: str | None = None
    reason: str | None = None

    def __post_init__(self) -> None:
        figures = (self.rms, self.max, self.top1, self.reference_rms, self.reference_max)
        known = [value is not None for value in figures]
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
    model, limits = report.model, report.limits
    by = ", ".join(f"{name} {version}" for name, version in report.created_by.items())
    yield f"# {report.name}"
    yield f"A {model.model_type} model for {model.task}, compiled in {model.dtype} by {by}."
    most, batch, step = limits.max_context, limits.max_batch, limits.max_step_tokens
    yield f"Sequences of up to {most:,} tokens, {batch:,} at a time, {step:,} tokens a step."
    yield _table(("in short", ""), [("accuracy", _accuracy_in_short(report)), *_cost(report)])
    yield "To try it, in this folder:"
    yield f"    {trial(model.task, '.')}\n    oxfuse verify .      # measures the accuracy again, on this machine"
    if report.notes:
        yield _bullets(report.notes)
    yield from _accuracy(report)
    yield from _what_was_done(report)
    yield from _what_it_is(report)


def trial(task: str, folder: str) -> str:
    """Return a command that tries a model of `task` in `folder`."""
    return "oxfuse " + COMMANDS.get(task, COMMANDS["text-generation"]).format(folder)


def best_of(model: ModelSpec) -> str | None:
    """Return what the largest value of a row is, None where it says nothing."""
    if model.task == "text-generation":
        return "token"
    chooses = len(model.labels) > 1 and model.problem_type in (None, "single_label_classification")
    return "label" if chooses or model.task == "token-classification" else None


def _accuracy_in_short(report: Report) -> str:
    parity, best = report.parity, best_of(report.model)
    if parity.top1 is None or parity.rms is None or parity.reference_rms is None:
        return "not measured, see below"
    same = f", best {best} the same in {parity.top1:.1%}" if best else ""
    return f"RMS error {_share(parity.rms, parity.reference_rms)} of the reference's{same}"


def _cost(report: Report) -> Iterable[tuple[str, str]]:
    total = sum(report.sizes.values())
    parts = ", ".join(f"{kind} {size_text(size)}" for kind, size in report.sizes.items())
    yield "size", f"{size_text(total)}: {parts}" if parts else size_text(total)
    need = report.requirements
    libc = f", glibc {need.glibc} or later" if need.glibc else ""
    gpus = f", a GPU of {' or '.join(need.gpu_archs)}" if need.gpu_archs else ""
    host = (
        f"torch {need.torch}, {need.platform} on {need.machine} ({need.cpu_isa})"
        if need.torch
        else "an NVIDIA GPU, with onnxruntime-gpu"
        if any(program.target == ONNX_CUDA for program in report.programs)
        else "any machine that has a runtime for ONNX"
    )
    yield "runs on", f"{host}{gpus}{libc}"
    memory = f", {size_text(report.memory.anonymous_and_shared)} of memory" if report.memory is not None else ""
    yield "compiling took", f"{sum(report.seconds.values()):.0f} s{memory}"


def _accuracy(report: Report) -> Iterable[str]:
    parity, best = report.parity, best_of(report.model)
    yield "## Accuracy"
    if parity.reason is not None:
        yield f"Not measured: {parity.reason} `oxfuse verify` measures it where the artifact can run."
        return
    assert parity.rms is not None and parity.max is not None and parity.top1 is not None
    assert parity.reference_rms is not None and parity.reference_max is not None
    values = VALUES.get(report.model.task, "values")
    yield (
        f"{parity.rows} rows of {values} for seeded tokens, against the plain PyTorch reference in float32, which was run on the "
        "checkpoint's own weights while compiling (`golden.safetensors`)."
    )
    yield _table(
        ("", "artifact's error", "reference", "share"),
        [
            ("RMS", f"{parity.rms:.3g}", f"{parity.reference_rms:.3g}", _share(parity.rms, parity.reference_rms)),
            ("largest", f"{parity.max:.3g}", f"{parity.reference_max:.3g}", _share(parity.max, parity.reference_max)),
        ],
    )
    if parity.own_rms is not None and parity.own_max is not None:
        yield (
            f"Against the reference with the artifact's own weights, as they were rounded: RMS {parity.own_rms:.3g} "
            f"({_share(parity.own_rms, parity.reference_rms)}), largest {parity.own_max:.3g}."
        )
    if parity.note is not None:
        yield parity.note
    if best:
        yield f"The best {best} is the same in {parity.top1:.1%} of the rows."
    if parity.kl is not None:
        yield f"KL divergence of the next token from the reference's: {parity.kl:.2g} nats."


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.2g}%" if whole else "–"


def _what_was_done(report: Report) -> Iterable[str]:
    yield "## Passes"
    rows = [
        (p.name, f"{p.count:,}", f"{p.checked:,}" if p.max_error is not None else "–", _error(p.max_error)) for p in report.passes
    ]
    yield _table(("pass", "rewrites", "distinct", "largest error"), rows)
    yield (
        "In the order they ran. Of the rewrites of a fusion, each structurally distinct one was run on random tokens against "
        "what it replaced; the error is relative to the largest value. `--dump-graphs DIR` draws the graph after each pass."
    )

    yield "## Programs"
    yield _table(("program", "target", "size"), [(p.name, p.target, size_text(p.bytes)) for p in report.programs])
    of_many = len({p.target for p in report.programs}) > 1
    yield _bullets(f"{p.name} {f'for {p.target} ' if of_many else ''}calls {_calls(p.ops)}" for p in report.programs)
    yield from _kernels(report.programs)

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


def _kernels(programs: Iterable[ProgramReport]) -> Iterable[str]:
    """Tell what GPU programs launch, and what each kernel needs: where a figure grows, the kernel got slower."""
    for program in programs:
        if program.anatomy is None:
            continue
        kernels = program.anatomy["kernels"]
        yield f"### Kernels of {program.name} for {program.target}"
        called = ", ".join(f"{count} {name}" for name, count in program.anatomy["torch_calls"].items()) or "nothing"
        yield f"A run launches {sum(kernel['launches'] for kernel in kernels):,} kernels of its own, and calls of torch {called}."
        head = ("kernel", "launches", "warps", "registers", "spilled", "shared")
        rows = [
            (
                kernel["name"],
                f"{kernel['launches']:,}",
                f"{kernel['warps']}",
                f"{kernel['registers']}",
                f"{kernel['stack_bytes']:,} B",
                f"{kernel['shared_bytes']:,} B",
            )
            for kernel in kernels
        ]
        yield _table(head, rows)


def _error(value: float | None) -> str:
    return "–" if value is None else "0" if value == 0 else f"{value:.1e}"


def _calls(ops: dict[str, int]) -> str:
    """Return the calls of a program: fused ops, then torch's, the most frequent first in each."""
    order = sorted(ops, key=lambda op: (not op.startswith("oxfuse::"), -ops[op], op))
    return ", ".join(f"{ops[op]} {op}" for op in order) or "nothing"


def _what_it_is(report: Report) -> Iterable[str]:
    yield "## Sizes"
    total = sum(report.sizes.values())
    yield _table(
        ("files", "size"), [*((kind, size_text(size)) for kind, size in report.sizes.items()), ("together", size_text(total))]
    )

    yield "## Numerics"
    yield _bullets(f"{name}: {policy}" for name, policy in report.numerics.items())

    need = report.requirements
    yield "## What it needs to run"
    yield _bullets(
        [
            f"torch {need.torch}",
            f"{need.platform} on {need.machine} ({need.cpu_isa})",
            *([f"glibc {need.glibc} or later"] if need.glibc else []),
            *([f"processor flags {', '.join(need.cpu_features)}"] if need.cpu_features else []),
            *([f"an NVIDIA GPU of {' or '.join(need.gpu_archs)}, and torch's CUDA build"] if need.gpu_archs else []),
        ]
    )

    yield "## Source"
    yield _bullets(f"{name.replace('_', ' ')}: {value}" for name, value in report.source.items())


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
