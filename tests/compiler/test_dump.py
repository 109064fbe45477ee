"""Graph dumps: every node in the text, well-formed pictures, identical layers drawn once and different ones apart."""

from __future__ import annotations

import itertools
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

import oxfuse
from oxfuse.errors import UserError
from oxfuse.passes.dump import GraphDumps, changes, dump_graph, graph_text, op_counts
from oxfuse.passes.fusions.rms_norm import reference  # noqa: F401  registers oxfuse::rms_norm
from oxfuse.passes.layout import curve, place, samples
from oxfuse.passes.picture import draw
from tests.checkpoints import random_gpt_oss

SVG = "{http://www.w3.org/2000/svg}"


class Layer(nn.Module):
    def __init__(self, slope: float, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.norm = nn.Parameter(torch.ones(8))
        self.inner = nn.Linear(8, 8)
        self.slope = slope

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        normed = torch.ops.oxfuse.rms_norm(x, self.norm, self.eps)
        return x + (self.inner(normed) * mask * self.slope).view(1, -1, 2, 4).transpose(1, 2).transpose(1, 2).reshape(x.shape)


class Net(nn.Module):
    def __init__(self, slopes: Sequence[float]) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.layers = nn.ModuleList(Layer(slope) for slope in slopes)
        self.head = nn.Linear(8, 16, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x, mask = self.embed(ids), (ids > 0).unsqueeze(-1).float()
        for layer in self.layers:
            x = layer(x, mask)
        return self.head(x)


@torch.no_grad()
def graph_of(slopes: Sequence[float]) -> fx.GraphModule:
    tokens = torch.export.Dim("T", min=1, max=64)
    program = torch.export.export(
        Net(slopes), (torch.zeros(1, 5, dtype=torch.long),), dynamic_shapes=({1: tokens},), strict=False
    )
    return program.module(check_guards=False)


def texts(svg: str) -> list[str]:
    return ["".join(text.itertext()) for text in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def headings(svg: str) -> list[str]:
    return [text for text in texts(svg) if re.match(r"layers\.\d+\b|before|after", text)]


def test_files(tmp_path: Path) -> None:
    module = graph_of([1.0, 2.0])
    dump_graph(module, tmp_path / "new" / "folder", "00_export")
    assert (tmp_path / "new" / "folder" / "00_export.txt").read_text() == graph_text(module.graph, "00_export")
    assert (tmp_path / "new" / "folder" / "00_export.svg").read_text() == draw(module.graph, "00_export")


def test_dumps_of_a_run_of_passes(tmp_path: Path) -> None:
    """Each is numbered, and tells what changed since the one before it."""
    module = graph_of([1.0, 2.0])
    dumps = GraphDumps(tmp_path / "new" / "graphs")
    dumps("export", module)
    for node in module.graph.find_nodes(op="call_function", target=torch.ops.aten.mul.Tensor):
        node.replace_all_uses_with(node.args[0])
        module.graph.erase_node(node)
    dumps("drop", module)
    dumps("again", module)
    assert sorted(path.name for path in dumps.folder.iterdir()) == [
        f"0{i}_{name}.{kind}" for i, name in enumerate(("export", "drop", "again")) for kind in ("svg", "txt")
    ]
    size = len(module.graph.nodes)
    told = [f"since 00_export: {size + 4} → {size} nodes", "removed: 4 aten::mul"]
    assert [line[2:] for line in (dumps.folder / "01_drop.txt").read_text().splitlines() if line.startswith("# ")][2:] == told
    assert texts((dumps.folder / "01_drop.svg").read_text())[2:4] == told
    assert "no op was added or removed" in texts((dumps.folder / "02_again.svg").read_text())
    assert not any("since" in text for text in texts((dumps.folder / "00_export.svg").read_text()))


def test_an_op_keeps_its_colour_from_dump_to_dump(tmp_path: Path) -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.ops.oxfuse.rms_norm(torch.ops.oxfuse.add_rms_norm(x, x, x[0], 1.0)[0], x[0], 1.0)

    both = torch.export.export(Two(), (torch.ones(2, 4),), strict=False).module(check_guards=False)
    dumps = GraphDumps(tmp_path)
    dumps("one", graph_of([1.0]))  # rms_norm alone
    dumps("two", both)  # add_rms_norm too, which comes first by name
    colour = [legend((tmp_path / f"{name}.svg").read_text()) for name in ("00_one", "01_two")]
    assert colour[0]["oxfuse::rms_norm ×1"] == colour[1]["oxfuse::rms_norm ×1"] != colour[1]["oxfuse::add_rms_norm ×1"]
    assert len(set(colour[1].values())) == len(colour[1])


def legend(svg: str) -> dict[str, str]:
    """Return the colour of each entry of the legend: the fill of the square that stands before its text."""
    elements = list(ElementTree.fromstring(svg))
    return {
        "".join(text.itertext()): square.get("fill", "")
        for square, text in itertools.pairwise(elements)
        if square.tag == f"{SVG}rect" and square.get("height") == "10" and text.tag == f"{SVG}text"
    }


def test_changes_name_our_ops_first() -> None:
    before = {"aten::mul": 9, "aten::add": 1, "aten::to": 1}
    after = {"aten::mul": 2, "aten::add": 1, "aten::linear": 5, "oxfuse::rms_norm": 2}
    assert changes(before, after) == ["added: 2 oxfuse::rms_norm, 5 aten::linear", "removed: 7 aten::mul, 1 aten::to"]


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written to .*file.*Name a folder"):
        GraphDumps(tmp_path / "file")
    dumps = GraphDumps(tmp_path / "folder")
    (tmp_path / "folder" / "00_export.svg").mkdir()
    with pytest.raises(UserError, match=r"cannot be written to .*folder.*Name a folder"):
        dumps("export", graph_of([1.0]))


def test_dumps_go_neither_into_the_checkpoint_nor_into_the_artifact(tmp_path: Path) -> None:
    checkpoint, output = random_gpt_oss(tmp_path / "checkpoint"), tmp_path / "artifact"
    for folder, words in ((checkpoint / "graphs", "it lies in the checkpoint"), (output / "graphs", "it lies in the artifact")):
        with pytest.raises(UserError, match=words):
            oxfuse.compile(checkpoint, output, dump_graphs=folder)
        assert not folder.exists() and not output.exists()


def test_text_has_every_node() -> None:
    graph = graph_of([1.0]).graph
    text = graph_text(graph, "export")
    lines = text.splitlines()
    assert len(lines) == len(graph.nodes) + 3
    assert "1 oxfuse::rms_norm" in lines[1]
    assert re.search(r"^weight layers\.0\.inner\.weight -> float32\[8, 8\]$", text, re.MULTILINE)
    assert re.search(r"^input ids -> int64\[1, s\d+\]$", text, re.MULTILINE)
    assert re.search(
        r"^\w+ = oxfuse::rms_norm\(embedding, layers\.0\.norm, 1e-05\) -> float32\[1, s\d+, 8\]    # layers\.0$",
        text,
        re.MULTILINE,
    )


def test_counts() -> None:
    counts = op_counts(graph_of([1.0, 2.0]).graph)
    assert counts["oxfuse::rms_norm"] == 2
    assert counts["aten::linear"] == 3
    assert list(counts.values()) == sorted(counts.values(), reverse=True)


def test_picture_shows_ops_weights_and_edges() -> None:
    svg = draw(graph_of([1.0]).graph, "00 <export> & more")
    shown = texts(svg)
    assert shown[0] == "00 <export> & more"
    assert any(re.match(r"\d+ nodes: \d+ calls, 5 weights, 1 inputs", text) for text in shown)
    assert {"embedding", "rms_norm", "linear", "add", "output"} <= set(shown)
    assert "inner.weight float32[8, 8]" in shown
    assert "eps 1e-05" in shown
    assert "→ view → transpose → transpose → reshape" in shown
    assert "oxfuse::rms_norm ×1" in shown
    assert ElementTree.fromstring(svg).get("viewBox") is not None  # so that it scales where it is embedded
    paths = [p for p in ElementTree.fromstring(svg).iter(f"{SVG}path") if p.get("class") == "edge"]
    boxes = [r for r in ElementTree.fromstring(svg).iter(f"{SVG}rect") if r.get("class") == "box"]
    assert len(paths) >= len(boxes) - 3


def test_identical_layers_are_drawn_once() -> None:
    svg = draw(graph_of([1.0] * 12).graph, "g")
    assert headings(svg) == [
        "before the layers",
        "layers.0 ×12: layers 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11 are alike",
        "after the layers",
    ]
    assert len(svg) < 1.2 * len(draw(graph_of([1.0] * 2).graph, "g"))


def test_layers_that_differ_in_a_number_are_drawn_apart() -> None:
    svg = draw(graph_of([1.0, 3.0, 1.0, 3.0, 5.0]).graph, "g")
    assert headings(svg)[1:-1] == [
        "layers.0 ×2: layers 0, 2 are alike",
        "layers.1 ×2: layers 1, 3 are alike",
        "layers.4",
    ]


def test_headings_tell_the_numbers_that_differ() -> None:
    net = Net([1.0] * 4)
    net.layers[1].eps = net.layers[3].eps = 1e-3
    program = torch.export.export(net.requires_grad_(False), (torch.zeros(1, 5, dtype=torch.long),), strict=False)
    names = headings(draw(program.module(check_guards=False).graph, "g"))
    assert names[1:-1] == [
        "layers.0 ×2: layers 0, 2 are alike · rms_norm eps 1e-05",
        "layers.1 ×2: layers 1, 3 are alike · rms_norm eps 0.001",
    ]


def test_parts_of_a_value_are_told_apart() -> None:
    class Parts(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            a, b = x.split(2, -1)
            return torch.cat([a.exp(), b.cos(), x[:, 1:3].sin(), x[..., ::2].tan(), x[:, 1, None].tanh()], -1)

    program = torch.export.export(Parts(), (torch.zeros(1, 4),), strict=False)
    shown = " ".join(texts(draw(program.module(check_guards=False).graph, "g")))
    for label in ("[0]", "[1]", "slice 1:3 of dim 1", "slice ::2 of dim 1", "select 1 of dim 1"):
        assert label in shown, shown


def test_the_head_tells_inputs_sizes_and_key() -> None:
    shown = texts(draw(graph_of([1.0]).graph, "g"))
    (inputs,) = (text for text in shown if text.startswith("inputs: "))
    symbol = re.fullmatch(r"inputs: ids int64\[1, (s\d+)\]", inputs)
    assert symbol is not None and f"sizes: {symbol[1]} is dim 1 of ids" in shown
    assert {"matrix product", "reshaping", "oxfuse::rms_norm ×1"} <= set(shown)


def test_layers_that_read_different_masks_are_drawn_apart() -> None:
    class TwoMasks(Net):
        def forward(self, ids: Tensor) -> Tensor:
            x, masks = self.embed(ids), [(ids > n).unsqueeze(-1).float() for n in (0, 1)]
            for i, layer in enumerate(self.layers):
                x = layer(x, masks[i % 2])
            return self.head(x)

    program = torch.export.export(TwoMasks([1.0] * 4).requires_grad_(False), (torch.zeros(1, 5, dtype=torch.long),), strict=False)
    names = headings(draw(program.module(check_guards=False).graph, "g"))
    assert names[1:-1] == ["layers.0 ×2: layers 0, 2 are alike", "layers.1 ×2: layers 1, 3 are alike"]


def test_graph_without_metadata() -> None:
    module = fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    ElementTree.fromstring(draw(module.graph, "bare"))
    assert "return" in graph_text(module.graph, "bare")


def test_empty_graph() -> None:
    ElementTree.fromstring(draw(fx.Graph(), "empty"))


@pytest.mark.parametrize("seed", range(6))
def test_boxes_never_overlap_and_edges_lead_down_between_them(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def random(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    tallest = (90, 50)[seed % 2]  # edges slant past low boxes
    sizes = [(float(random(20, 300)), float(random(10, tallest))) for _ in range(60)]
    ranks = [random(0, 12) for _ in sizes]
    ranks[:12] = range(12)
    pairs = [(random(0, 60), random(0, 60)) for _ in range(90)]
    placed = place(sizes, ranks, [(a, b) for a, b in pairs if ranks[a] < ranks[b]], [34.0])
    spans = [(x, y, x + w, y + h) for (w, h), x, y in zip(sizes, placed.left, placed.top, strict=True)]
    for i, (left, top, right, bottom) in enumerate(spans):
        assert left >= -1e-6 and right <= placed.width + 1e-6 and top >= 34 and bottom <= placed.height + 1e-6
        for x, y, u, v in spans[:i]:
            assert right <= x or u <= left or bottom <= y or v <= top
    edges = [(a, b) for a, b in pairs if ranks[a] < ranks[b]]
    for (source, target), route in zip(edges, placed.routes, strict=True):
        assert all(a[1] <= b[1] for a, b in itertools.pairwise(route))
        for x, y in (point for piece in curve(route) for point in samples(piece)):
            inside = {i for i, (left, top, right, bottom) in enumerate(spans) if left < x < right and top < y < bottom}
            assert inside <= {source, target}
