"""Draws a run of a speed benchmark, a bar an engine, a mark where its floor is.

One panel a phase for one artifact; one panel a part, dtype and metric for the grid.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from oxfuse.compiler.bench.engines import ENGINES, INT8, INT8_DENSE, LLAMA_BF16, LLAMA_Q8, OURS, PEER
from oxfuse.compiler.bench.grid_result import CONTENDERS, EAGER, SDPA, SHOWN, GridResult
from oxfuse.compiler.bench.speed_result import SpeedResult
from oxfuse.errors import UserError

COLOURS = {OURS: "#1f6f8b", EAGER: "#d3d3d3", SDPA: "#969696"}
FLOOR = "#c0392b"
WIDE = 12  # from the least figure to the largest: beyond, an axis counts in powers of ten
SHADES = {OURS: "#1f6f8b", INT8: "#3f9bb8", INT8_DENSE: "#86c5d8", LLAMA_BF16: "#c98a3b", LLAMA_Q8: "#e3bd85", PEER: "#b8b8b8"}
SHORT_NAMES = {spec.key: spec.kind + (".cpp" if spec.kind == "llama" else "") for spec in ENGINES}


def draw_speed(result: SpeedResult, path: Path) -> None:
    """Write the picture to `path`, in the format that its suffix names. Raises UserError without matplotlib or on a bad path."""
    groups = list(dict.fromkeys((f.phase, f.size) for f in result.figures))
    rows = [sum((f.phase, f.size) == group for f in result.figures) for group in groups]
    picture = _picture(10, 1.2 + sum(0.55 + 0.28 * count for count in rows))
    panels = picture.subplots(len(groups), 1, squeeze=False, gridspec_kw={"height_ratios": [2 + n for n in rows]})[:, 0]
    for panel, (phase, size) in zip(panels, groups, strict=True):
        figures = [f for f in result.figures if (f.phase, f.size) == (phase, size)][::-1]
        most = max(max(f.rate, 1 / f.floor) for f in figures)
        for row, figure in enumerate(figures):
            panel.barh(row, figure.rate, color=SHADES[figure.engine], height=0.66)
            over = [f"{ratio:.2f}× {SHORT_NAMES[peer]}" for peer, ratio in result.ratios(figure).items()]
            label = f"{figure.rate:,.1f}" + (f"  ({', '.join(over)})" if over else "")
            # Beyond the floor's mark where it would strike the label through.
            floor, long = 1 / figure.floor, (0.65 if over else 0.15) * most
            end = max(figure.rate, floor) if floor < figure.rate + long else figure.rate
            panel.annotate(label, (end, row), (4, 0), textcoords="offset points", va="center", fontsize=8.5)
            panel.plot([floor] * 2, [row - 0.38, row + 0.38], color=FLOOR, linewidth=2)
        panel.set_yticks(range(len(figures)), [result.name(f) for f in figures], fontsize=9)
        panel.set_xlim(0, 1.7 * most)
        title = f"prefill of {size} tokens" if phase == "prefill" else f"decode after {size} tokens"
        panel.set_title(title, fontsize=10, loc="left")
        panel.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel("tokens a second (red: the floor that memory or arithmetic sets)", fontsize=9)
    picture.suptitle(f"{result.artifact}\n{_where(result.machine, result.threads)}", fontsize=10, x=0.01, ha="left")
    _save(picture, path)


def draw_grid(result: GridResult, path: Path) -> None:
    """Write the picture of a grid to `path`; raises as `draw_speed` does."""
    tables = list(result.tables())
    widest = max((len(cells) for *_, cells in tables), default=1)
    picture = _picture(3.5 + 0.62 * widest, 1.4 + 2.4 * len(tables))
    panels = picture.subplots(max(1, len(tables)), 1, squeeze=False)[:, 0]
    for panel, (part, dtype, metric, cells) in zip(panels, tables, strict=False):
        for place, cell in enumerate(cells):
            for offset, contender in enumerate(CONTENDERS, -1):
                left = place + 0.27 * offset
                if (seconds := cell.seconds(contender, metric.name)) is not None:
                    panel.bar(left, seconds * metric.scale, width=0.25, color=COLOURS[contender])
                elif contender in cell.series:
                    short = "OOM" if cell.series[contender].without_memory else "failed"
                    where = (left, cell.floors[metric.name] * metric.scale)
                    panel.annotate(f" {short}", where, ha="center", va="bottom", rotation=90, fontsize=7, color="#777777")
            if (ratio := cell.speedup(metric.name)) is not None:
                most = max(s for name in CONTENDERS if (s := cell.seconds(name, metric.name)) is not None)
                panel.annotate(f"{ratio:.2f}×", (place, most * metric.scale), ha="center", va="bottom", fontsize=8)
            panel.plot([place - 0.42, place + 0.42], [cell.floors[metric.name] * metric.scale] * 2, color=FLOOR, linewidth=1.5)
        known = [s for cell in cells for name in CONTENDERS if (s := cell.seconds(name, metric.name)) is not None]
        if known and max(known) > WIDE * min(known):
            panel.set_yscale("log")
            panel.yaxis.set_major_formatter("{x:g}")
        panel.margins(y=0.15)
        panel.set_xticks(range(len(cells)), [f"{cell.batch} × {cell.sequence}" for cell in cells], fontsize=8)
        panel.set_xlim(-0.6, len(cells) - 0.4)
        panel.set_ylabel(metric.unit)
        panel.set_title(f"{part}, {dtype}: {metric.title[0].lower()}{metric.title[1:]}", fontsize=10, loc="left")
        panel.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel("batch × tokens of a sequence", fontsize=9)
    bars = [panels[0].bar(0, 0, color=COLOURS[name], label=SHOWN[name]) for name in CONTENDERS]
    (line,) = panels[0].plot([], [], color=FLOOR, label="floor")
    picture.legend(handles=[*bars, line], loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    title = f"{result.model}; figures: oxfuse over the better of the others\n{_where(result.machine, result.plan['threads'])}"
    picture.suptitle(title, fontsize=10, x=0.01, ha="left")
    _save(picture, path)


def _picture(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("Drawing needs matplotlib: install oxfuse[bench], or leave --plot out.") from error
    return Figure(figsize=(width, height), layout="constrained")


def _where(machine: dict[str, Any], threads: int) -> str:
    return f"{machine['processor'].partition(' (')[0]}, {threads} threads, torch {machine['torch']}"


def _save(picture: Any, path: Path) -> None:
    try:
        picture.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be drawn: {error}. Name a file ending in .png, .svg or .pdf.") from error
