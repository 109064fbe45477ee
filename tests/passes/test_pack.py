"""The packed layout of MXFP4 experts: every bit has a place, whatever the number of rows, and nothing but the layout changes."""

from __future__ import annotations

import pytest
import torch

from oxfuse.passes.fusions.moe_dispatch.packed import PackedBlocks, PackedScales
from oxfuse.passes.fusions.moe_dispatch.reference import unpack, unpack_scales


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("rows", [2, 16, 30, 32, 64, 100])
def test_packing_is_undone(rows: int, pairs: bool) -> None:
    blocks = torch.randint(0, 256, (3, rows, 5, 16), dtype=torch.uint8)
    scales = torch.randint(0, 256, (3, rows, 5), dtype=torch.uint8)
    packed, factors = PackedBlocks(pairs), PackedScales(pairs)
    assert packed.apply(blocks).shape == packed.shape(blocks.shape) and factors.apply(scales).shape == factors.shape(scales.shape)
    assert torch.equal(unpack(packed.apply(blocks), rows, pairs), blocks)
    assert torch.equal(unpack_scales(factors.apply(scales), rows, pairs), scales)


def test_experts_are_packed_one_by_one() -> None:
    """As the artifact's writer streams them."""
    blocks = torch.randint(0, 256, (4, 24, 2, 16), dtype=torch.uint8)
    one_by_one = torch.cat([PackedBlocks(True).apply(blocks[e : e + 1]) for e in range(4)])
    assert torch.equal(one_by_one, PackedBlocks(True).apply(blocks))
