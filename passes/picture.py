"""Draws a graph as SVG: boxes for ops, layer by layer from top to bottom, identical layers once.

In: a graph with metadata. Out: SVG text. What would drown the picture is folded: weights and inputs of the program are lines in
the box that reads them, a chain of reshaping ops is one line, sizes are not drawn at all, and of layers that compute the same
only the first is drawn. Nothing is left out of the text dump. A layer is a module whose path ends in a number.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections import Counter
from dataclasses import dataclass, field
from html import escape
from typing import Any

import torch
from torch import fx

from oxfuse.passes.layout import Placement, place

RESHAPING = (
    *(
        "view",
        "reshape",
        "_unsafe_view",
        "transpose",
        "permute",
        "t",
        "unsqueeze",
        "squeeze",
        "expand",
        "expand_as",
        "contiguous",
    ),
    *("slice", "select", "getitem", "to", "_to_copy", "detach", "alias", "flatten", "unflatten", "chunk", "split", "unbind"),
)
PRODUCTS = ("linear", "matmul", "mm", "bmm", "addmm", "_grouped_mm", "scaled_dot_product_attention", "einsum")
FUSED_COLOURS = ("#f6b26b", "#93c47d", "#8e9fe0", "#e58fb1", "#6fc7c2", "#d0b25a", "#b892d6", "#e08a7d")
PRODUCT_COLOUR, PLAIN_COLOUR, RESHAPING_COLOUR = "#cfe2f3", "#ffffff", "#eeeeee"
FONT, CHARACTER, LINE = 11, 6.65, 15.0  # size of a monospaced face, its advance (0.604 em), and the line height
MARGIN, HEADING, WRAP = 24.0, 34.0, 46


@dataclass(kw_only=True)
class Box:
    """What is drawn as one box: an op, and the reshaping ops that follow it or that it consists of."""

    nodes: list[fx.Node]
    section: int
    inputs: list[int] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    colour: str = PLAIN_COLOUR

    @property
    def size(self) -> tuple[float, float]:
        """Return width and height."""
        return max(map(len, self.lines)) * CHARACTER + 16, len(self.lines) * LINE + 8


def op_name(node: fx.Node) -> str:
    """Return `namespace::op` without the overload, or a Python function's name."""
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target._schema.name)
    return str(getattr(node.target, "__name__", node.target))


def short_name(node: fx.Node) -> str:
    """Return the op's name without its namespace."""
    return op_name(node).split("::")[-1]


def value_text(value: Any) -> str:
    """Return dtype and shape of a value: `float32[1, T, 64]`; several are joined; what has none is empty."""
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}[{', '.join(map(str, value.shape))}]"
    if isinstance(value, tuple | list):
        return ", ".join(filter(None, map(value_text, value)))
    return "" if value is None else f"{type(value).__name__} {value}"


def module_path(node: fx.Node) -> str:
    """Return the path of the innermost module that a node came from, or that of a weight it reads; empty where unknown."""
    stack = node.meta.get("nn_module_stack")
    path = str(list(stack.values())[-1][0]) if stack else ""
    if not path or path.startswith("_empty"):
        return next((str(n.target) for n in node.all_input_nodes if n.op == "get_attr"), "")
    return path.removeprefix("L['self'].").removeprefix("L__self__.")


def layer_of(path: str) -> str:
    """Return the part of a module path up to its first number: `model.layers.3.mlp` gives `model.layers.3`; else empty."""
    found = re.match(r"(?:[^.]+\.)*?\d+(?=\.|$)", path)
    return found[0] if found else ""


def is_drawn(node: fx.Node) -> bool:
    """Tell whether a node computes a tensor, or something unknown; sizes are not drawn."""
    if node.op in ("placeholder", "get_attr", "output"):
        return node.op == "output"
    sizes = (torch.SymInt, torch.SymFloat, torch.SymBool, int, float)
    return not isinstance(node.meta.get("val"), sizes) and not short_name(node).startswith(("sym_", "_assert"))


def sections_of(graph: fx.Graph) -> tuple[dict[fx.Node, int], list[str]]:
    """Return the section of every drawn node, and the sections' names: what precedes the layers, the layers, what follows.

    A node stands no earlier than what it reads; one that belongs to no layer stands where its inputs are.
    """
    paths = {node: module_path(node) for node in graph.nodes if is_drawn(node)}
    layers = list(dict.fromkeys(filter(None, (layer_of(path) for path in paths.values()))))
    number = {layer: i + 1 for i, layer in enumerate(layers)}
    last, section = len(layers) + 1, dict[fx.Node, int]()
    for node, path in paths.items():
        least = max((section.get(n, 0) for n in node.all_input_nodes), default=0)
        own = number.get(layer_of(path), last if node.op == "output" or (path and least) else 0)
        section[node] = max(own, least)
    return section, ["before the layers", *layers, "after the layers"]


def boxes_of(graph: fx.Graph) -> tuple[list[Box], dict[fx.Node, int], list[str]]:
    """Return boxes in the graph's order with their inputs, the box of every drawn node, and the sections' names."""
    section, names = sections_of(graph)
    boxes, home = list[Box](), dict[fx.Node, int]()
    for node, number in section.items():
        reads = [n for n in node.all_input_nodes if n in section]
        before = reads[0] if len(reads) == 1 and short_name(node) in RESHAPING and node.op != "output" else None
        alone = before is not None and sum(user in section for user in before.users) == 1 and section[before] == number
        if before is not None and alone:
            boxes[home[before]].nodes.append(node)
            home[node] = home[before]
            continue
        home[node] = len(boxes)
        boxes.append(Box(nodes=[node], section=number, inputs=list(dict.fromkeys(home[n] for n in reads))))
    return boxes, home, names


def expression(node: fx.Node) -> str:
    """Name a value that is drawn elsewhere: an input by its name, a reshaped value as a call, anything else by op and layer."""
    reads = node.all_input_nodes
    if node.op == "call_function" and short_name(node) in RESHAPING and len(reads) == 1:
        rest = [str(a) for a in node.args[1:]]
        return f"{short_name(node)}({', '.join([expression(reads[0]), *rest])})"
    layer = layer_of(module_path(node))
    return f"{node.name} of {layer}" if layer else node.name


def signature(number: int, boxes: list[Box], home: dict[fx.Node, int], stretch: dict[fx.Node, int]) -> tuple[Any, ...]:
    """Return what makes two layers the same: their ops, values, constants, and where every input comes from.

    `stretch` counts the sections that read a node: a node that several read is part of the signature by its name, one of the
    layer before, or of this layer's own inputs and weights, only by its value.
    """
    nodes = [node for box in boxes if box.section == number for node in box.nodes]
    index = {node: i for i, node in enumerate(nodes)}

    def origin(node: fx.Node) -> Any:
        if node in index:
            return index[node]
        kept = value_text(node.meta.get("val"))
        if stretch.get(node, 0) > 1 and node.op != "get_attr":
            return node.name
        if node.op in ("get_attr", "placeholder") or boxes[home[node]].section == number - 1:
            return kept
        return node.name

    def shown(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return origin(value) if value in home or value.op in ("get_attr", "placeholder") else "size"
        if isinstance(value, tuple | list):
            return tuple(map(shown, value))
        return str(value)

    return tuple((op_name(n), value_text(n.meta.get("val")), shown(n.args), shown(list(n.kwargs.values()))) for n in nodes)


def fold(boxes: list[Box], home: dict[fx.Node, int], count: int) -> tuple[dict[int, list[int]], dict[int, int]]:
    """Return {section drawn: sections like it} and for every box the box that is drawn in its place."""
    readers: dict[fx.Node, set[int]] = {}
    for box in boxes:
        for node in box.nodes:
            for read in node.all_input_nodes:
                readers.setdefault(read, set()).add(box.section)
    stretch = {node: len(sections) for node, sections in readers.items()}
    first: dict[Any, int] = {}
    alike: dict[int, list[int]] = {}
    members: dict[int, list[int]] = {number: [] for number in range(count)}
    for i, box in enumerate(boxes):
        members[box.section].append(i)
    stands_for: dict[int, int] = {}
    for number in range(count):
        key = signature(number, boxes, home, stretch) if 0 < number < count - 1 else number
        drawn = first.setdefault(key, number)
        alike.setdefault(drawn, []).append(number)
        stands_for |= zip(members[number], members[drawn], strict=True)
    return alike, stands_for


def describe(box: Box, layer: str, home: dict[fx.Node, int], near: set[int], palette: dict[str, str]) -> None:
    """Fill in a box's lines and colour. What it reads from boxes outside `near` becomes text."""
    head, tail = box.nodes[0], [short_name(n) for n in box.nodes[1:]]
    name = "output" if head.op == "output" else short_name(head)
    lines = [name] if not tail else [f"{name} → {' → '.join(tail)}"] if name in RESHAPING else [name, "→ " + " → ".join(tail)]
    value = value_text(box.nodes[-1].meta.get("val"))
    weights, far = [], []
    for read in dict.fromkeys(n for node in box.nodes for n in node.all_input_nodes):
        if read.op == "get_attr":
            weights.append(f"{str(read.target).removeprefix(layer + '.')} {value_text(read.meta.get('val'))}")
        elif read.op == "placeholder" or (read in home and home[read] not in near and read not in box.nodes):
            far.append(expression(read))
    constants = _constants(head) if op_name(head) in palette else []
    box.lines = [*_wrapped(lines), *([value] if value else []), *constants, *weights, *(f"← {text}" for text in far)]
    plain = PRODUCT_COLOUR if name in PRODUCTS else RESHAPING_COLOUR if name in RESHAPING else PLAIN_COLOUR
    box.colour = palette.get(op_name(head), plain)


def _constants(node: fx.Node) -> list[str]:
    """Return the numbers that a fused op is called with, by the names of its schema."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return []
    named = zip((argument.name for argument in node.target._schema.arguments), node.args, strict=False)
    numbers = [f"{name} {value:.6g}" for name, value in named if isinstance(value, int | float)]
    return [", ".join(numbers)] if numbers else []


def _wrapped(lines: list[str]) -> list[str]:
    out = []
    for line in lines:
        while len(line) > WRAP and " → " in line[2:WRAP]:
            cut = line.rindex(" → ", 2, WRAP)
            out.append(line[:cut])
            line = line[cut + 1 :]
        out.append(line)
    return out


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
    """Return a path that leaves and enters every point vertically."""
    (x, y), parts = points[0], [f"M{points[0][0]:.1f} {points[0][1]:.1f}"]
    for u, v in points[1:]:
        middle = (y + v) / 2
        parts.append(f"L{u:.1f} {v:.1f}" if abs(u - x) < 0.5 else f"C{x:.1f} {middle:.1f} {u:.1f} {middle:.1f} {u:.1f} {v:.1f}")
        x, y = u, v
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
