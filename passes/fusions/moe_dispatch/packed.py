"""The packed layout of MXFP4 experts for CPUs: panels of 16 rows, in the order in which vectors read them, whatever their width.

A panel is made of blocks, one for 32 values along the input: 256 bytes, and 16 scales. A block is four vectors of 64 bytes for
eight values each, k = 8 c .. 8 c + 7. In such a vector, four bytes belong to each row; the nibbles of their lower two bytes,
lowest first, are the values 0, 2, 4, 6 of the eight, those of the upper two 1, 3, 5, 7: so a shift by four bits more brings the
next pair of values of all rows into place as bfloat16, and a mask brings four values of all rows into place as bytes. All are the
checkpoint's bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from oxfuse.passes.fusions.moe_dispatch import reference as reference  # registers the op
from oxfuse.passes.fusions.moe_dispatch.reference import PANEL
from oxfuse.passes.graph import OXFUSE, args_of, as_node, is_op
from oxfuse.passes.weights import MXFP4_BLOCK, Transform, WeightTable

_NIBBLES = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight values the nibbles of a row's four bytes are."""


def _panels(rows: Tensor, pairs: bool) -> Tensor:
    """Return [E, N, ...] as panels [E, P, 16, ...], zeros at the ends; with `pairs` those of even and of odd rows take turns."""
    parts = [rows[:, first :: 1 + pairs] for first in range(1 + pairs)]
    missing = rows.new_zeros(rows.shape[0], -parts[0].shape[1] % PANEL, *rows.shape[2:])
    return torch.stack([torch.cat([part, missing], 1).unflatten(1, (-1, PANEL)) for part in parts], 2).flatten(1, 2)


def panels_of(rows: int, pairs: bool) -> int:
    """Return the number of panels of `rows`."""
    return (1 + pairs) * -(-rows // (1 + pairs) // PANEL)


@dataclass(frozen=True)
class PackedBlocks:
    """MXFP4 blocks uint8 [E, N, K / 32, 16] to panels [E, P, K / 32, 256]. `pairs`: rows are gate and up by turns."""

    pairs: bool

    @property
    def label(self) -> str:
        """Name the step."""
        return "packed in panels of 16" + ", gates and ups by turns" * self.pairs

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return [E, P, K / 32, 256]."""
        return (shape[0], panels_of(shape[1], self.pairs), shape[2], PANEL * MXFP4_BLOCK // 2)

    def apply(self, blocks: Tensor) -> Tensor:
        """Return the panels."""
        codes = torch.stack([blocks & 15, blocks >> 4], -1).flatten(-2)  # [E, N, K / 32, 32]
        codes = _panels(codes, self.pairs).unflatten(-1, (4, 8))[..., list(_NIBBLES)]  # [E, P, 16, K / 32, 4, 8]
        packed: Tensor = codes[..., ::2] | codes[..., 1::2] << 4  # [E, P, 16, K / 32, 4, 4]
        return packed.permute(0, 1, 3, 4, 2, 5).flatten(3)


@dataclass(frozen=True)
class PackedScales:
    """MXFP4 scales uint8 [E, N, K / 32] to those of panels, [E, P, K / 32, 16]. `pairs` as of `PackedBlocks`."""

    pairs: bool

    @property
    def label(self) -> str:
        """Name the step."""
        return PackedBlocks(self.pairs).label

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return [E, P, K / 32, 16]."""
        return (shape[0], panels_of(shape[1], self.pairs), shape[2], PANEL)

    def apply(self, scales: Tensor) -> Tensor:
        """Return the panels."""
        return _panels(scales, self.pairs).transpose(2, 3)


def pack_experts(module: fx.GraphModule, weights: WeightTable, *, int8_activations: bool) -> list[list[str]]:
    """Let the graph's ops read their MXFP4 experts packed, in place; return the checkpoint's names of each op's experts.

    The recipes in the table grow by a step. With `int8_activations` the ops round what they multiply with experts.
    """
    packed = []
    for node in module.graph.nodes:
        if not is_op(node, OXFUSE.moe_dispatch.default) or args_of(node)[4] is None:
            continue
        sources = []
        for index, pairs in ((3, True), (6, False)):
            steps: tuple[Transform, Transform] = (PackedBlocks(pairs), PackedScales(pairs))
            for read, step in zip((as_node(a) for a in args_of(node)[index : index + 2]), steps, strict=True):
                name = str(read.target)
                weights[name] = weights[name].then(step)
                owner, _, leaf = name.rpartition(".")
                parent = module.get_submodule(owner)
                memory = torch.empty(weights[name].shape, dtype=torch.uint8)  # that nobody touches
                setattr(parent, leaf, torch.nn.Parameter(memory, requires_grad=False))
                value = read.meta["val"]
                read.meta["val"] = value.new_empty(weights[name].shape)
            sources.append(weights[name].source)
        if int8_activations:
            node.args = (*args_of(node), True)
        packed.append(sources)
    return packed
