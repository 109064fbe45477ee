"""Draws a graph as SVG: boxes for ops, layer by layer from top to bottom, identical layers once.

In: a graph with metadata. Out: SVG text. `boxes` says what is folded on the way; nothing is left out of the text dump.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections import Counter
from html import escape

from torch import fx

from oxfuse.passes.boxes import (
    CHARACTER,
    LINE,
    RESHAPING,
    RESHAPING_COLOUR,
    Box,
    boxes_of,
    describe,
    fold,
    module_path,
    op_name,
    short_name,
    value_text,
)
from oxfuse.passes.layout import Placement, place

FUSED_COLOURS = ("#f6b26b", "#93c47d", "#8e9fe0", "#e58fb1", "#6fc7c2", "#d0b25a", "#b892d6", "#e08a7d")
FONT, MARGIN, HEADING = 11, 24.0, 34.0


def draw(graph: fx.Graph, name: str) -> str:
    """Return the picture of a graph as SVG text; `name` is its title."""
    boxes, home, sections = boxes_of(graph)
    alike, stands_for = fold(boxes, home, len(sections))
    fused = sorted({op_name(n) for n in home if op_name(n).startswith("oxfuse::")})
    palette = {op: FUSED_COLOURS[i % len(FUSED_COLOURS)] for i, op in enumerate(fused)}
    # A node in front of the layers that only several sections read as a reshaped input is told there, not drawn here.
    shared = {i for i, box in enumerate(boxes) if box.section == 0 and _is_told_elsewhere(box, boxes, i)}
    shown = [i for i in dict.fromkeys(stands_for.values()) if i not in shared]
    neighbour = {drawn: before for before, drawn in zip(alike, list(alike)[1:], strict=False)}
    edges: list[tuple[int, int]] = []
    for i in shown:
        number, near = boxes[i].section, {i}
        for source in boxes[i].inputs:
            place_of = stands_for[source]
            drawn = boxes[place_of].section
            if (
                place_of in shown
                and place_of != i
                and (drawn == number or (drawn == neighbour.get(number) and _is_single(source, boxes)))
            ):
                near.add(source)
                edges.append((place_of, i))
        describe(boxes[i], sections[number], home, near, palette)
    ranks = _ranks(shown, edges, boxes, list(alike))
    order = {box: k for k, box in enumerate(shown)}
    sizes = [boxes[i].size for i in shown]
    firsts = [min((ranks[i] for i in shown if boxes[i].section == number), default=None) for number in alike]
    extra = [HEADING if rank in firsts else 0.0 for rank in range(max(ranks.values(), default=0) + 1)]
    # Sections that nothing connects are held one below the other by links that are not drawn.
    held = [pair for pair in itertools.pairwise(alike) if not any((boxes[a].section, boxes[b].section) == pair for a, b in edges)]
    links = edges + [
        (max(upper, key=ranks.__getitem__), min(lower, key=ranks.__getitem__))
        for pair in held
        if (upper := [i for i in shown if boxes[i].section == pair[0]])
        and (lower := [i for i in shown if boxes[i].section == pair[1]])
    ]
    placed = place(sizes, [ranks[i] for i in shown], [(order[a], order[b]) for a, b in links], extra)
    placed = dataclasses.replace(placed, routes=placed.routes[: len(edges)])
    headings = {}
    for rank, number in zip(firsts, alike, strict=True):
        if rank is not None:
            headings[number] = (
                rank,
                max(ranks[i] for i in shown if boxes[i].section == number),
                _heading(alike[number], sections),
            )
    return _svg(graph, name, [boxes[i] for i in shown], placed, list(headings.values()), palette)


def _is_single(source: int, boxes: list[Box]) -> bool:
    """Tell whether one section alone reads a box of another: what many read is named where it is read."""
    return len({box.section for box in boxes if source in box.inputs and box.section != boxes[source].section}) == 1


def _is_told_elsewhere(box: Box, boxes: list[Box], index: int) -> bool:
    reads = [n for node in box.nodes for n in node.all_input_nodes if n not in box.nodes]
    told = all(short_name(n) in RESHAPING for n in box.nodes) and all(n.op == "placeholder" for n in reads)
    return told and all(b.section != 0 for b in boxes if index in b.inputs)


def _heading(numbers: list[int], sections: list[str]) -> str:
    title = sections[numbers[0]]
    if len(numbers) == 1:
        return title
    indices = [sections[n].rsplit(".", 1)[-1] for n in numbers]
    return f"{title}   ×{len(numbers)}: layers {', '.join(indices)} are the same"


def _ranks(shown: list[int], edges: list[tuple[int, int]], boxes: list[Box], order: list[int]) -> dict[int, int]:
    """Return ranks: below every input, section after section; what reads nothing stands right above its first reader."""
    rank, start = dict[int, int](), 0
    sources: dict[int, list[int]] = {}
    for a, b in edges:
        sources.setdefault(b, []).append(a)
    for number in order:
        here = [i for i in shown if boxes[i].section == number]
        for i in here:
            rank[i] = max([start, *(rank[s] + 1 for s in sources.get(i, []))])
        for i in reversed(here):
            readers = [rank[b] for a, b in edges if a == i and boxes[b].section == number]
            if readers and not any(boxes[s].section == number for s in sources.get(i, [])):
                rank[i] = max(rank[i], min(readers) - 1)
        start = max([start, *(rank[i] + 1 for i in here)])
    return rank


def _svg(
    graph: fx.Graph, name: str, boxes: list[Box], placed: Placement, bands: list[tuple[int, int, str]], palette: dict[str, str]
) -> str:
    calls = Counter(op_name(n) for n in graph.nodes if n.op == "call_function")
    kinds = Counter(n.op for n in graph.nodes)
    inputs = _input_lines([n for n in graph.nodes if n.op == "placeholder"])
    facts = [
        f"{len(graph.nodes)} nodes: {kinds['call_function']} calls, {kinds['get_attr']} weights, {kinds['placeholder']} inputs",
        *(f"inputs: {line}" if k == 0 else f"        {line}" for k, line in enumerate(inputs)),
    ]
    legend = [(palette[op], f"{op} ×{calls[op]}") for op in palette]
    text_width = max(
        [len(name) * 10.0, *(len(line) * CHARACTER for line in facts), *(len(t) * CHARACTER + 24 for _, t in legend)]
    )
    width = max(placed.width, text_width) + 2 * MARGIN + 16
    head = 46 + LINE * (len(facts) + len(legend)) + 10
    dx, dy = (width - placed.width) / 2, head
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{head + placed.height + 2 * MARGIN:.0f}" '
        f'font-family="DejaVu Sans Mono, Menlo, Consolas, monospace" font-size="{FONT}">',
        "<style>.band{fill:#f7f7fb;stroke:#d5d5e3}.box{stroke:#555}.edge{fill:none;stroke:#777;stroke-width:1.2}"
        "text{white-space:pre}</style>",
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0L8 4L0 8z" fill="#777"/></marker></defs>',
        '<rect width="100%" height="100%" fill="#fff"/>',
        _text(MARGIN, 30, name, 'font-size="17" font-weight="bold"'),
        *(_text(MARGIN, 50 + LINE * k, line) for k, line in enumerate(facts)),
    ]
    for k, (colour, text) in enumerate(legend, len(facts)):
        out.append(f'<rect x="{MARGIN}" y="{41 + LINE * k:.1f}" width="14" height="10" fill="{colour}" stroke="#555"/>')
        out.append(_text(MARGIN + 20, 50 + LINE * k, text))
    for first, last, title in bands:
        top, bottom = placed.ranks[first][0] + dy - HEADING + 8, placed.ranks[last][1] + dy + 8
        out.append(
            f'<rect class="band" x="{MARGIN / 2}" y="{top:.1f}" width="{width - MARGIN:.1f}" height="{bottom - top:.1f}" rx="6"/>'
        )
        out.append(_text(MARGIN, top + 16, title, 'font-weight="bold" fill="#445"'))
    for route in placed.routes:
        out.append(f'<path class="edge" marker-end="url(#tip)" d="{_curve([(x + dx, y + dy) for x, y in route])}"/>')
    for box, left, top in zip(boxes, placed.left, placed.top, strict=True):
        (w, h), x, y = box.size, left + dx, top + dy
        names = "\n".join(n.name for n in box.nodes)
        out.append(f"<g><title>{escape(names)}\n{escape(module_path(box.nodes[0]))}</title>")
        out.append(f'<rect class="box" x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{h:.1f}" rx="4" fill="{box.colour}"/>')
        for k, line in enumerate(box.lines):
            style = 'font-weight="bold"' if k == 0 and box.colour != RESHAPING_COLOUR else 'fill="#444"'
            out.append(_text(x + 8, y + 15 + LINE * k, line, style))
        out.append("</g>")
    return "\n".join([*out, "</svg>"]) + "\n"


def _text(x: float, y: float, text: str, style: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(text)}</text>'


def _curve(points: list[tuple[float, float]]) -> str:
    """Return a smooth path down through all points, vertical at its ends.

    Cubic Hermite in y with the slopes of Fritsch and Carlson (1980): between two points it never leaves their columns.
    """
    steps = [(u - x) / (v - y) if v > y else 0.0 for (x, y), (u, v) in itertools.pairwise(points)]
    slopes = [0.0, *(2 * a * b / (a + b) if a * b > 0 else 0.0 for a, b in itertools.pairwise(steps)), 0.0]
    parts = [f"M{points[0][0]:.1f} {points[0][1]:.1f}"]
    for ((x, y), (u, v)), (a, b) in zip(itertools.pairwise(points), itertools.pairwise(slopes), strict=True):
        third = (v - y) / 3
        parts.append(f"C{x + a * third:.1f} {y + third:.1f} {u - b * third:.1f} {v - third:.1f} {u:.1f} {v:.1f}")
    return "".join(parts)


def _input_lines(nodes: list[fx.Node]) -> list[str]:
    """Return the program's inputs, a few to a line; those that differ only in a number are told once."""
    groups: dict[str, list[fx.Node]] = {}
    for node in nodes:
        groups.setdefault(re.sub(r"\d+", "#", node.name), []).append(node)
    lines, line = [], ""
    for alike in groups.values():
        first, value = alike[0].name, value_text(alike[0].meta.get("val"))
        words = f"{first} {value}" if len(alike) == 1 else f"{first} … {alike[-1].name} ({len(alike)}) {value}"
        if line and len(line) + len(words) > 110:
            lines.append(line)
            line = ""
        line = f"{line}, {words}" if line else words
    return [*lines, line] if line else lines
