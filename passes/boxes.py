"""Turns a graph into the boxes of its picture: few enough to read, and each with what a person asks about it.

In: a graph with metadata. Out: boxes with text, grouped in sections: what precedes the layers, each layer, what follows. What
would drown the picture is folded: weights and inputs of the program are lines in the box that reads them, a chain of reshaping
ops is one line, sizes are left out, and of layers that compute the same the first stands for all. A layer is a module whose
path ends in a number.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

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
PRODUCT_COLOUR, PLAIN_COLOUR, RESHAPING_COLOUR = "#cfe2f3", "#ffffff", "#eeeeee"
CHARACTER, LINE = 6.65, 15.0  # advance of a character of size 11 in a monospaced face (0.604 em), and the height of a line
WRAP = 46


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


def label(node: fx.Node) -> str:
    """Return what a node is called in the picture: its op, with what tells one part of a value from another."""
    name, args = short_name(node), node.args
    if name == "getitem":
        return f"[{args[1]}]"
    if name == "select" and len(args) == 3:
        return f"select {args[2]} of dim {args[1]}"
    if name == "slice" and len(args) > 1:
        start, end, step = (args[i] if len(args) > i else None for i in (2, 3, 4))
        stop = "" if end is None or (isinstance(end, int) and end >= 1 << 62) else end
        return f"slice {start or ''}:{stop}{f':{step}' if step not in (None, 1) else ''} of dim {args[1]}"
    return name


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
    if node.op == "call_function" and short_name(node) in ("getitem", "select", "slice") and len(reads) == 1:
        part = label(node)
        return f"{expression(reads[0])}{part}" if part.startswith("[") else f"{part} of {expression(reads[0])}"
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
    head, tail = box.nodes[0], [label(n) for n in box.nodes[1:]]
    name = "output" if head.op == "output" else short_name(head)
    first = "output" if head.op == "output" else label(head)
    lines = [first] if not tail else [f"{first} → {' → '.join(tail)}"] if name in RESHAPING else [first, "→ " + " → ".join(tail)]
    value = value_text(box.nodes[-1].meta.get("val"))
    weights, far = [], []
    for read in dict.fromkeys(n for node in box.nodes for n in node.all_input_nodes):
        if read.op == "get_attr":
            weights.append(f"{str(read.target).removeprefix(layer + '.')} {value_text(read.meta.get('val'))}")
        elif read.op == "placeholder" or (read in home and home[read] not in near and read not in box.nodes):
            far.append(expression(read))
    constants = ", ".join(constants_of(head)) if op_name(head) in palette else ""
    box.lines = [*_wrapped(lines), *filter(None, (value, constants)), *weights, *(f"← {text}" for text in far)]
    plain = PRODUCT_COLOUR if name in PRODUCTS else RESHAPING_COLOUR if name in RESHAPING else PLAIN_COLOUR
    box.colour = palette.get(op_name(head), plain)


def constants_of(node: fx.Node) -> list[str]:
    """Return the numbers that an op is called with, by the names of its schema."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return []
    named = zip((argument.name for argument in node.target._schema.arguments), node.args, strict=False)
    return [f"{name} {value:.6g}" for name, value in named if isinstance(value, int | float)]


def _wrapped(lines: list[str]) -> list[str]:
    out = []
    for line in lines:
        while len(line) > WRAP and " → " in line[2:WRAP]:
            cut = line.rindex(" → ", 2, WRAP)
            out.append(line[:cut])
            line = line[cut + 1 :]
        out.append(line)
    return out
