"""Writes a graph down for people: as text, one line a node, and as a picture. `--dump-graphs` calls it after every pass."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from torch import fx

from oxfuse.passes.boxes import op_name, value_text
from oxfuse.passes.graph import layer_name
from oxfuse.passes.picture import draw


def dump_graph(module: fx.GraphModule, folder: Path, name: str) -> None:
    """Write `NAME.txt` (every node) and `NAME.svg` (a layered picture) into `folder`, which is made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.txt").write_text(graph_text(module.graph, name), "utf-8")
    (folder / f"{name}.svg").write_text(draw(module.graph, name), "utf-8")


def op_counts(graph: fx.Graph) -> dict[str, int]:
    """Return how often the graph calls each op (`oxfuse::rms_norm`), the most frequent first, equals by name."""
    counts = Counter(op_name(node) for node in graph.nodes if node.op.startswith("call"))
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def graph_text(graph: fx.Graph, name: str) -> str:
    """Return one line a node: its name, what it calls, its value and its place in the model; weights by their names."""
    nodes = list(graph.nodes)
    kinds = Counter(node.op for node in nodes)
    calls = ", ".join(f"{count} {op}" for op, count in op_counts(graph).items())
    lines = [f"# {name}: {len(nodes)} nodes, {kinds['placeholder']} inputs, {kinds['get_attr']} weights", f"# calls: {calls}", ""]
    for node in nodes:
        value = value_text(node.meta.get("val"))
        typed = f" -> {value}" if value else ""
        if node.op == "placeholder":
            lines.append(f"input {node.name}{typed}")
        elif node.op == "get_attr":
            lines.append(f"weight {node.target}{typed}")
        elif node.op == "output":
            lines.append(f"return {_argument(node.args[0])}")
        else:
            arguments = [*map(_argument, node.args), *(f"{key}={_argument(value)}" for key, value in node.kwargs.items())]
            place = layer_name(node)
            where = f"    # {place}" if place != node.name else ""
            lines.append(f"{node.name} = {op_name(node)}({', '.join(arguments)}){typed}{where}")
    return "\n".join(lines) + "\n"


def _argument(value: Any) -> str:
    if isinstance(value, fx.Node):
        return str(value.target) if value.op == "get_attr" else value.name
    if isinstance(value, tuple | list):
        inside = ", ".join(map(_argument, value))
        return f"({inside})" if isinstance(value, tuple) else f"[{inside}]"
    return repr(value) if isinstance(value, str) else str(value)
