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

from oxfuse.passes.dump import dump_graph, graph_text, op_counts
from oxfuse.passes.fusions.rms_norm import reference  # noqa: F401  registers oxfuse::rms_norm
from oxfuse.passes.layout import place
from oxfuse.passes.picture import draw

SVG = "{http://www.w3.org/2000/svg}"


class Layer(nn.Module):
    def __init__(self, slope: float) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.ones(8))
        self.inner = nn.Linear(8, 8)
        self.slope = slope

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        normed = torch.ops.oxfuse.rms_norm(x, self.norm, 1e-5)
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
    paths = [p for p in ElementTree.fromstring(svg).iter(f"{SVG}path") if p.get("class") == "edge"]
    boxes = [r for r in ElementTree.fromstring(svg).iter(f"{SVG}rect") if r.get("class") == "box"]
    assert len(paths) >= len(boxes) - 3


def test_identical_layers_are_drawn_once() -> None:
    svg = draw(graph_of([1.0] * 12).graph, "g")
    assert headings(svg) == [
        "before the layers",
        "layers.0   ×12: layers 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11 are the same",
        "after the layers",
    ]
    assert len(svg) < 1.2 * len(draw(graph_of([1.0] * 2).graph, "g"))


def test_layers_that_differ_in_a_number_are_drawn_apart() -> None:
    svg = draw(graph_of([1.0, 3.0, 1.0, 3.0, 5.0]).graph, "g")
    assert headings(svg)[1:-1] == [
        "layers.0   ×2: layers 0, 2 are the same",
        "layers.1   ×2: layers 1, 3 are the same",
        "layers.4",
    ]


def test_layers_that_read_different_masks_are_drawn_apart() -> None:
    class TwoMasks(Net):
        def forward(self, ids: Tensor) -> Tensor:
            x, masks = self.embed(ids), [(ids > n).unsqueeze(-1).float() for n in (0, 1)]
            for i, layer in enumerate(self.layers):
                x = layer(x, masks[i % 2])
            return self.head(x)

    program = torch.export.export(TwoMasks([1.0] * 4).requires_grad_(False), (torch.zeros(1, 5, dtype=torch.long),), strict=False)
    names = headings(draw(program.module(check_guards=False).graph, "g"))
    assert names[1:-1] == ["layers.0   ×2: layers 0, 2 are the same", "layers.1   ×2: layers 1, 3 are the same"]


def test_graph_without_metadata() -> None:
    module = fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    ElementTree.fromstring(draw(module.graph, "bare"))
    assert "return" in graph_text(module.graph, "bare")


def test_empty_graph() -> None:
    ElementTree.fromstring(draw(fx.Graph(), "empty"))


@pytest.mark.parametrize("seed", range(5))
def test_boxes_never_overlap_and_edges_lead_down(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def random(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    sizes = [(float(random(20, 300)), float(random(10, 90))) for _ in range(60)]
    ranks = [random(0, 12) for _ in sizes]
    ranks[:12] = range(12)
    pairs = [(random(0, 60), random(0, 60)) for _ in range(90)]
    placed = place(sizes, ranks, [(a, b) for a, b in pairs if ranks[a] < ranks[b]], [34.0])
    spans = [(x, y, x + w, y + h) for (w, h), x, y in zip(sizes, placed.left, placed.top, strict=True)]
    for i, (left, top, right, bottom) in enumerate(spans):
        assert left >= -1e-6 and right <= placed.width + 1e-6 and top >= 34 and bottom <= placed.height + 1e-6
        for x, y, u, v in spans[:i]:
            assert right <= x or u <= left or bottom <= y or v <= top
    for route in placed.routes:
        assert all(a[1] <= b[1] for a, b in itertools.pairwise(route))
