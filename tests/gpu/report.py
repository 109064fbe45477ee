"""The GPU report: kernels, artifacts, times and memory on the GPU at hand, held against the bars of the project.

    python -m tests.gpu.report [--budget 450] [--sections kernels,timing] [--list] [--out DIR]

Everything is measured by another process (`worker.py`), one item at a time; one that fails, dies or hangs is recorded, and the
rest goes on in a new process. What takes time and no GPU is begun beside it (`sections.py`). Items come in order of value; each
is skipped when it is believed to take longer than the budget has left. JSON and Markdown are written again after every item.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click

from .checkout import HERE, commit, use_checkout
from .document import FAILED, RAN, SKIPPED, Document, ItemResult, SectionResult
from .processes import Background, Workers
from .worker import Section

REAL = "tests.gpu.sections"
WRITE_SECONDS = 5.0
"""Between two writings while an item runs."""
WAIT_SECONDS = 60.0
"""Most that sections which measure time wait for what runs in the background."""
LEAST_LIMIT, LIMIT_FACTOR, GRACE = 60.0, 4.0, 20.0
"""An item that takes LIMIT_FACTOR times what it is believed to take, and LEAST_LIMIT seconds, hangs; so does one that runs GRACE
seconds past the budget."""


def run_sections(
    document: Document,
    sections: Sequence[Section],
    workers: Workers,
    background: Background,
    *,
    clock: Callable[[], float],
    write: Callable[[], None],
    say: Callable[[str], None],
) -> None:
    """Run all items that fit the document's budget, and fill the document. `clock`: seconds since the report began."""
    try:
        listed, errors = workers.listing()
    except RuntimeError as error:
        failed = ItemResult(name="worker", status=FAILED, error=str(error))
        document.sections.append(SectionResult(name="start", title="The start of the report", items=[failed]))
        return
    for section in sections:
        result = SectionResult(name=section.name, title=section.title)
        document.sections.append(result)
        if section.name in errors:
            result.items.append(ItemResult(name="import", status=FAILED, error=errors[section.name]))
        elif section.quiet and (running := background.wait(min(WAIT_SECONDS, document.budget - clock()))):
            background.end()  # what they did not get to is done where it is needed
            document.header["ended early"] = f"{', '.join(running)}, when {section.name} began"
        if section.fresh:
            workers.close()
        for name, seconds in listed.get(section.name, []):
            item = ItemResult(name=name, status=FAILED, error="The report was cut off here.")
            result.items.append(item)
            write()
            left = document.budget - clock()
            if seconds > left:
                item.status, item.error = SKIPPED, "no time left"
                item.notes.append(f"{name} takes about {seconds:.0f} s, {max(0.0, left):.0f} were left.")
            else:
                limit = min(max(LEAST_LIMIT, LIMIT_FACTOR * seconds), left + GRACE)
                _run_item(document, section.name, item, workers, limit, clock, write)
            document.seconds = clock()
            write()
            say(f"[{clock():6.1f} s] {section.name}: {name}: {item.status}{_hint(item)}")
        if section.name == "environment":
            background.start()  # only now: it would be in the way of the first measurements
        write()


def _run_item(
    document: Document,
    section: str,
    item: ItemResult,
    workers: Workers,
    limit: float,
    clock: Callable[[], float],
    write: Callable[[], None],
) -> None:
    written = clock()

    def on_found(message: dict[str, Any]) -> None:
        nonlocal written
        workers.record(message, item, document.facts)
        if clock() - written > WRITE_SECONDS:
            document.seconds = written = clock()
            write()

    began = clock()
    error = workers.run(section, item.name, limit, on_found, document.facts)
    item.seconds, item.error = clock() - began, error
    item.status = FAILED if error else RAN


def _hint(item: ItemResult) -> str:
    missed = sum(row.passed is False for row in item.rows)
    bars = f", {missed} bars missed" if missed else ""
    last = f": {item.error.strip().splitlines()[-1][:200]}" if item.status == FAILED and item.error.strip() else ""
    return f" in {item.seconds:.1f} s{bars}{last}" if item.status != SKIPPED else ""


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Let a termination end the report as an interrupt does, so that the last state is written."""

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def make_report(
    module: str,
    names: Sequence[str],
    budget: float,
    out: Path,
    work: Path,
    *,
    file_name: str,
    header: dict[str, str],
    say: Callable[[str], None],
) -> Document:
    """Run the sections `names` of `module` in `work` and write the report to `out` as it grows; return it."""
    began = time.monotonic()

    def clock() -> float:
        return time.monotonic() - began

    plan = importlib.import_module(module)
    sections = [section for section in plan.SECTIONS if section.name in names]
    document = Document(header=dict(header), budget=budget)

    def write() -> None:
        document.write(out, file_name)

    write()
    background = Background(plan.background([section.name for section in sections], work), work)
    if not any(section.name == "environment" for section in sections):
        background.start()
    workers = Workers(module, [section.name for section in sections], work)
    try:
        with _ended_by_signals():
            run_sections(document, sections, workers, background, clock=clock, write=write, say=say)
            document.ended = True
    except KeyboardInterrupt:
        say("interrupted")
    finally:
        workers.close()
        background.end()
        document.seconds = clock()
        write()
    return document


def missing() -> str:
    """Return why there can be no report on this machine, "" where there can be one."""
    from oxfuse.runtime.gpus import find_gpus
    from oxfuse.runtime.host import torch_cuda, torch_version

    gpus = find_gpus()
    if gpus.problem:
        return gpus.problem
    return "" if torch_cuda() else f"torch is {torch_version() or 'not installed'}, which is no CUDA build"


def gpu_name() -> str:
    """Return the first GPU's name as part of a file's name."""
    from oxfuse.runtime.gpus import find_gpus

    return re.sub(r"[^a-z0-9]+", "-", find_gpus().found[0].name.lower()).strip("-")


@click.command(help=__doc__)
@click.option("--budget", type=float, default=450.0, show_default=True, help="seconds in all")
@click.option("--sections", default="", help="which, by name with commas; all by default")
@click.option("--list", "listing", is_flag=True, help="name the sections and end")
@click.option("--out", type=click.Path(path_type=Path), default=HERE / "results", help="folder of the report")
@click.option("--name", default="", help="the report's file name; by default the GPU's")
@click.option(
    "--work", type=click.Path(path_type=Path), help="folder for what is made on the way (20 GB); a temporary one by default"
)
@click.option("--commit", "known_commit", default="", help="the commit, where git cannot tell")
def cli(budget: float, sections: str, listing: bool, out: Path, name: str, work: Path | None, known_commit: str) -> int:
    """Make the report; end with 1 where something failed or a bar was missed, with 2 where there is no GPU."""
    known: list[Section] = list(importlib.import_module(REAL).SECTIONS)
    if listing:
        for section in known:
            click.echo(f"{section.name:12} {section.title}")
        return 0
    names = [part.strip() for part in sections.split(",") if part.strip()] or [section.name for section in known]
    if unknown := sorted({*names} - {section.name for section in known}):
        raise click.UsageError(f"There is no section {', '.join(unknown)}; there are {', '.join(s.name for s in known)}.")
    if why := missing():
        click.echo(f"No GPU report can be made here: {why}.", err=True)
        return 2
    header = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": known_commit or commit(),
        "python": sys.version.split()[0],
    }
    place = tempfile.TemporaryDirectory(prefix="oxfuse-gpu-") if work is None else contextlib.nullcontext(str(work))
    with place as folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        os.environ.setdefault("TRITON_CACHE_DIR", str(Path(folder) / "triton"))
        document = make_report(
            REAL,
            names,
            budget,
            out,
            Path(folder),
            file_name=name or gpu_name(),
            header=header,
            say=lambda line: click.echo(line),
        )
    click.echo(f"{out / (name or gpu_name())}.md: {document.counts()}")
    return 1 if document.faults or not document.ended else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    try:
        code: int | None = cli.main(
            list(sys.argv[1:] if arguments is None else arguments), "tests.gpu.report", standalone_mode=False
        )
    except click.ClickException as error:
        error.show()
        return error.exit_code
    return code or 0


if __name__ == "__main__":
    use_checkout()
    sys.exit(main())
