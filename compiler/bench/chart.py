"""Draws a run of the speed benchmark: one panel a phase, a bar an engine, a mark where its floor is."""

from __future__ import annotations

from pathlib import Path

from oxfuse.compiler.bench.speed import OURS, SpeedResult
from oxfuse.errors import UserError

COLOURS = {OURS: "#1f6f8b"}
OTHERS = "#b8b8b8"


def draw_speed(result: SpeedResult, path: Path) -> None:
    """Write the picture to `path`, in the format that its suffix names. Raises UserError without matplotlib or on a bad path."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("Drawing needs matplotlib: install oxfuse[bench], or leave --plot out.") from error
    groups = list(dict.fromkeys((f.phase, f.size) for f in result.figures))
    picture = Figure(figsize=(9, 1.3 + 1.25 * len(groups)), layout="constrained")
    panels = picture.subplots(len(groups), 1, squeeze=False)[:, 0]
    for panel, (phase, size) in zip(panels, groups, strict=True):
        figures = [f for f in result.figures if (f.phase, f.size) == (phase, size)][::-1]
        for row, figure in enumerate(figures):
            panel.barh(row, figure.rate, color=COLOURS.get(figure.engine, OTHERS), height=0.62)
            ratio = result.ratio(figure)
            label = f" {figure.rate:,.1f}" + (f"  ({ratio:.2f}×)" if ratio else "")
            panel.annotate(label, (figure.rate, row), va="center", fontsize=9)
            panel.plot([1 / figure.floor] * 2, [row - 0.38, row + 0.38], color="#c0392b", linewidth=2)
        names = [" ".join(filter(None, (result.engines[f.engine], f.implementation))) for f in figures]
        panel.set_yticks(range(len(figures)), names, fontsize=9)
        panel.set_xlim(0, 1.18 * max(max(f.rate, 1 / f.floor) for f in figures))
        title = f"prefill of {size} tokens" if phase == "prefill" else f"decode after {size} tokens"
        panel.set_title(title, fontsize=10, loc="left")
        panel.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel("tokens a second (red: the floor that memory or arithmetic sets)", fontsize=9)
    where = f"{result.machine['processor'].partition(' (')[0]}, {result.threads} threads, torch {result.machine['torch']}"
    picture.suptitle(f"{result.artifact}\n{where}", fontsize=10, x=0.01, ha="left")
    try:
        picture.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be drawn: {error}. Name a file ending in .png, .svg or .pdf.") from error
