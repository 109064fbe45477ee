"""Writes a graph down for people: as text, one line a node, and as a picture. `--dump-graphs` does it after every pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import fx

from oxfuse.errors import UserError
from oxfuse.passes.boxes import op_name, value_text
from oxfuse.passes.graph import layer_name
from oxfuse.passes.picture import colours, draw


class GraphDumps:
    """Writes the graph after every pass into a folder, numbered in the order of the passes; an observer of `run_passes`."""

    def __init__(self, folder: Path) -> None:
        """Make the folder if need be. Raises UserError where that cannot be."""
        self.folder = folder
        self._last: tuple[str, int, dict[str, int]] | None = None
        self._count = 0
        self._colours: dict[str, str] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unwritable(folder, error) from error

    def __call__(self, name: str, module: fx.GraphModule) -> None:
        """Write the graph as it is after the pass `name`. Raises UserError where the folder cannot be written."""
        title, graph = f"{self._count:02d}_{name}", module.graph
        counts = op_counts(graph)
        note = []
        if self._last is not None:
            last, size, before = self._last
            note = [f"since {last}: {size} → {len(graph.nodes)} nodes", *changes(before, counts)]
        self._colours = colours(graph, self._colours)
        try:
            dump_graph(module, self.folder, title, note, self._colours)
        except OSError as error:
            raise _unwritable(self.folder, error) from error
        self._last, self._count = (title, len(graph.nodes), counts), self._count + 1


def _unwritable(folder: Path, error: OSError) -> UserError:
    return UserError(f"The graphs cannot be written to {folder}: {error}. Name a folder where you may write.")


def dump_graph(
    module: fx.GraphModule, folder: Path, name: str, note: Sequence[str] = (), known: Mapping[str, str] | None = None
) -> None:
    """Write `NAME.txt` (every node) and `NAME.svg` (a layered picture) into `folder`; `note` and `known` as for `draw`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.txt").write_text(graph_text(module.graph, name, note), "utf-8")
    (folder / f"{name}.svg").write_text(draw(module.graph, name, note, known), "utf-8")


def op_counts(graph: fx.Graph) -> dict[str, int]:
    """Return how often the graph calls each op (`oxfuse::rms_norm`), the most frequent first, equals by name."""
    counts = Counter(op_name(node) for node in graph.nodes if node.op.startswith("call"))
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def changes(before: Mapping[str, int], after: Mapping[str, int]) -> list[str]:
    """Return which ops came and which went, a line each, ours first."""
    difference = {op: after.get(op, 0) - before.get(op, 0) for op in {*before, *after}}
    lines = []
    for title, sign in (("added", 1), ("removed", -1)):
        ops = {op: sign * count for op, count in difference.items() if sign * count > 0}
        order = sorted(ops, key=lambda op: (not op.startswith("oxfuse::"), -ops[op], op))
        lines += [f"{title}: {', '.join(f'{ops[op]} {op}' for op in order)}"] if ops else []
    return lines or ["no op was added or removed"]


def graph_text(graph: fx.Graph, name: str, note: Sequence[str] = ()) -> str:
    """Return one line a node: its name, what it calls, its value and its place in the model; weights by their names."""
    nodes = list(graph.nodes)
    kinds = Counter(node.op for node in nodes)
    calls = ", ".join(f"{count} {op}" for op, count in op_counts(graph).items())
    lines = [f"# {name}: {len(nodes)} nodes, {kinds['placeholder']} inputs, {kinds['get_attr']} weights", f"# calls: {calls}"]
    lines += [*(f"# {line}" for line in note), ""]
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
