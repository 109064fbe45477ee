"""Draws a graph as SVG: boxes for ops, layer by layer from top to bottom, identical layers once.

In: a graph with metadata. Out: SVG text. `boxes` says what is folded on the way; nothing is left out of the text dump.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape

import torch
from torch import fx

from oxfuse.passes.boxes import (
    CHARACTER,
    LINE,
    PRODUCT_COLOUR,
    RESHAPING,
    RESHAPING_COLOUR,
    Box,
    boxes_of,
    constants_of,
    describe,
    fold,
    module_path,
    op_name,
    short_name,
    value_text,
)
from oxfuse.passes.layout import Placement, curve, place

FUSED_COLOURS = ("#f6b26b", "#93c47d", "#8e9fe0", "#e58fb1", "#6fc7c2", "#d0b25a", "#b892d6", "#e08a7d")
FONT, MARGIN, HEADING = 11, 24.0, 34.0
WIDEST = 120  # characters of a line of the head
KEY = "In a box: the op, → the reshaping after it, dtype and shape of the result, weights, ← values from elsewhere."


def colours(graph: fx.Graph, known: Mapping[str, str]) -> dict[str, str]:
    """Return a colour for each fused op of the graph, beside those that are `known` already."""
    fused = {op_name(node) for node in graph.nodes if node.op == "call_function" and op_name(node).startswith("oxfuse::")}
    new = sorted(fused - known.keys())
    return {**known, **{op: FUSED_COLOURS[i % len(FUSED_COLOURS)] for i, op in enumerate(new, len(known))}}


def draw(graph: fx.Graph, name: str, note: Sequence[str] = (), known: Mapping[str, str] | None = None) -> str:
    """Return the picture of a graph as SVG text.

    `name` is its title, `note` is lines below it, `known` the colours of fused ops that other pictures beside it show.
    """
    boxes, home, sections = boxes_of(graph)
    alike, stands_for = fold(boxes, home, len(sections))
    palette = colours(graph, known or {})
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
    layers = [number for number in alike if 0 < number < len(sections) - 1]
    marks = _marks([boxes[i] for i in shown if op_name(boxes[i].nodes[0]) in palette], layers)
    headings = {}
    for rank, number in zip(firsts, alike, strict=True):
        if rank is not None:
            headings[number] = (
                rank,
                max(ranks[i] for i in shown if boxes[i].section == number),
                _heading(alike[number], sections) + marks.get(number, ""),
            )
    return _svg(graph, name, note, [boxes[i] for i in shown], placed, list(headings.values()), palette)


def _marks(fused: list[Box], layers: list[int]) -> dict[int, str]:
    """Return the numbers of fused ops that tell kinds of layers apart, as text for the heading of each kind."""
    numbers = {number: dict[str, None]() for number in layers}
    for box in fused:
        if box.section in numbers:
            head = box.nodes[0]
            numbers[box.section] |= dict.fromkeys(f"{short_name(head)} {text}" for text in constants_of(head))
    same = set.intersection(*map(set, numbers.values())) if numbers else set()
    # An op that a kind lacks altogether says nothing here: the boxes show it.
    shared = set.intersection(*({text.split()[0] for text in texts} for texts in numbers.values())) if numbers else set()
    told = {n: [t for t in texts if t not in same and t.split()[0] in shared] for n, texts in numbers.items()}
    return {number: " · " + ", ".join(texts) for number, texts in told.items() if texts}


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
    return f"{title} ×{len(numbers)}: layers {', '.join(indices)} are alike"


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


def _facts(graph: fx.Graph, note: Sequence[str]) -> list[str]:
    """Return the lines below the title: counts, what changed, inputs, and what the symbols for sizes stand for."""
    kinds = Counter(n.op for n in graph.nodes)
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    counts = f"{kinds['call_function']} calls, {kinds['get_attr']} weights, {kinds['placeholder']} inputs"
    lines = [f"{len(graph.nodes)} nodes: {counts}", *note, *([f"inputs: {_inputs(inputs)}"] if inputs else [])]
    sizes: dict[str, str] = {}
    for node in inputs:
        value = node.meta.get("val")
        for dim, size in enumerate(value.shape if isinstance(value, torch.Tensor) else ()):
            if isinstance(size, torch.SymInt) and str(size).isidentifier():
                sizes.setdefault(str(size), f"{size} is dim {dim} of {node.name}")
    lines += [f"sizes: {', '.join(sizes.values())}"] if sizes else []
    return [part for line in lines for part in textwrap.wrap(line, WIDEST, subsequent_indent="    ", break_on_hyphens=False)]


def _svg(
    graph: fx.Graph,
    name: str,
    note: Sequence[str],
    boxes: list[Box],
    placed: Placement,
    bands: list[tuple[int, int, str]],
    palette: dict[str, str],
) -> str:
    calls = Counter(op_name(n) for n in graph.nodes if n.op == "call_function")
    facts = _facts(graph, note)
    legend = [(palette[op], f"{op} ×{calls[op]}") for op in sorted(palette) if calls[op]]
    legend += [(PRODUCT_COLOUR, "matrix product"), (RESHAPING_COLOUR, "reshaping"), ("", KEY)]
    text_width = max(
        [len(name) * 10.0, *(len(line) * CHARACTER for line in facts), *(len(t) * CHARACTER + 24 for _, t in legend)]
    )
    width = max(placed.width, text_width) + 2 * MARGIN + 16
    head = 46 + LINE * (len(facts) + len(legend)) + 10
    dx, dy = (width - placed.width) / 2, head
    height = head + placed.height + 2 * MARGIN
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" xml:space="preserve" '
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
        if colour:
            out.append(f'<rect x="{MARGIN}" y="{41 + LINE * k:.1f}" width="14" height="10" fill="{colour}" stroke="#555"/>')
        out.append(_text(MARGIN + 20 if colour else MARGIN, 50 + LINE * k, text))
    for first, last, title in bands:
        top, bottom = placed.ranks[first][0] + dy - HEADING + 8, placed.ranks[last][1] + dy + 8
        out.append(
            f'<rect class="band" x="{MARGIN / 2}" y="{top:.1f}" width="{width - MARGIN:.1f}" height="{bottom - top:.1f}" rx="6"/>'
        )
        out.append(_text(MARGIN, top + 16, title, 'font-weight="bold" fill="#445"'))
    for route in placed.routes:
        out.append(f'<path class="edge" marker-end="url(#tip)" d="{_path([(x + dx, y + dy) for x, y in route])}"/>')
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


def _path(points: list[tuple[float, float]]) -> str:
    pieces = curve(points)
    start = f"M{points[0][0]:.1f} {points[0][1]:.1f}"
    return start + "".join(f"C{a:.1f} {b:.1f} {c:.1f} {d:.1f} {x:.1f} {y:.1f}" for _, (a, b), (c, d), (x, y) in pieces)


def _inputs(nodes: list[fx.Node]) -> str:
    """Return the program's inputs; those that differ only in a number are told once."""
    groups: dict[str, list[fx.Node]] = {}
    for node in nodes:
        groups.setdefault(re.sub(r"\d+", "#", node.name), []).append(node)
    words = []
    for alike in groups.values():
        first, value = alike[0].name, value_text(alike[0].meta.get("val"))
        name = first if len(alike) == 1 else f"{first} … {alike[-1].name} ({len(alike)})"
        words.append(f"{name} {value}".rstrip())
    return ", ".join(words)
