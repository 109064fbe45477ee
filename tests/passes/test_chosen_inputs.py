"""Masks that read inputs: consecutive positions where a runtime sees to it, anything at all where a caller chooses."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, export

from oxfuse.passes.graph import mark_chosen
from oxfuse.passes.manager import PassResult, run_passes

Q = torch.randn(2, 4, 6, 8, generator=torch.Generator().manual_seed(0))
POSITIONS = torch.arange(6).expand(2, 6)


class Attention(nn.Module):
    """Attention under the mask that `visible` makes of positions [B, S], bool [B, 1, S, S]."""

    def __init__(self, visible: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.visible = visible

    def forward(self, positions: Tensor, x: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(x, x, x, self.visible(positions)) * positions.cos()[:, None, :, None]


def of_values(positions: Tensor) -> Tensor:
    return positions[:, None, None] <= positions[:, None, :, None]


def of_sizes(positions: Tensor) -> Tensor:
    j = torch.arange(positions.shape[1])
    return (j <= j[:, None]).expand(positions.shape[0], 1, -1, -1)


def of_ones(positions: Tensor) -> Tensor:
    """As of a padding mask that stands for none."""
    return of_values(torch.ones_like(positions).cumsum(1))


def fused(visible: Callable[[Tensor], Tensor], chosen: bool) -> dict[str, PassResult]:
    dims = {0: Dim("B", min=1, max=64), 2: Dim("S", min=2, max=64)}
    shapes = ({0: dims[0], 1: dims[2]}, dims)
    exported = export(Attention(visible), (POSITIONS.clone(), Q), dynamic_shapes=shapes, strict=False)
    module = exported.module(check_guards=False)
    for node in module.graph.nodes:
        if node.op == "placeholder" and chosen:
            mark_chosen(node)
    results = {result.name: result for result in run_passes(module, {}, policy="best_effort")}
    packed = torch.tensor([[0, 1, 2, 0, 1, 2], [3, 4, 5, 6, 7, 8]])
    for positions in (POSITIONS, packed) if chosen else (POSITIONS,):
        torch.testing.assert_close(module(positions, Q), Attention(visible)(positions, Q))
    return results


@pytest.mark.parametrize("visible", [of_sizes, of_ones])
@pytest.mark.parametrize("chosen", [False, True])
def test_a_mask_of_sizes_is_causal_whoever_chooses(visible: Callable[[Tensor], Tensor], chosen: bool) -> None:
    assert fused(visible, chosen)["sink_attention"].count == 1


def test_a_mask_of_positions_is_causal_where_they_are_consecutive() -> None:
    assert fused(of_values, chosen=False)["sink_attention"].count == 1


def test_a_mask_of_chosen_positions_is_handed_to_the_op() -> None:
    """Though the angles of a rotation are made of the same input."""
    results = fused(of_values, chosen=True)
    assert results["sink_attention"].count == 0 and results["masked_attention"].count == 1


def test_why_it_is_not_causal_is_told() -> None:
    """Of a mask for each head, which neither op takes."""
    results = fused(lambda positions: of_values(positions).expand(-1, 4, -1, -1), chosen=True)
    (refused,) = results["sink_attention"].refused
    assert refused.reason.startswith("the mask depends on the values of the input positions, which a caller may choose")
