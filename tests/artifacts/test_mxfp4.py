"""The rounding that trains and exports the bundled checkpoint: nearest values, ties to even, bytes that decode to them."""

import pytest
import torch

from oxfuse.artifacts.mxfp4 import GROUP, fake_quantize, pack

LADDER = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
CODES = torch.cat([LADDER, -LADDER])


def decode(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The format's definition, written apart from the code under test: low nibble first, 2^(byte - 127)."""
    values = torch.stack([CODES[(blocks & 15).long()], CODES[(blocks >> 4).long()]], dim=-1).flatten(-2)
    return (values * torch.exp2(scales.float() - 127)[..., None]).flatten(-2)


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 0.04, 1.0, 100.0])
def test_bytes_decode_to_the_values_trained_with(scale: float) -> None:
    weight = torch.randn(3, 16, 4 * GROUP, generator=torch.Generator().manual_seed(0)) * scale
    blocks, scales = pack(weight)
    assert blocks.shape == (3, 16, 4, 16) and scales.shape == (3, 16, 4)
    assert blocks.dtype == scales.dtype == torch.uint8
    assert int(scales.min()) >= 2 and int(scales.max()) <= 127
    assert torch.equal(decode(blocks, scales), fake_quantize(weight))


def test_values_are_the_nearest_ones() -> None:
    weight = torch.randn(64, GROUP, generator=torch.Generator().manual_seed(1))
    scale = torch.exp2(pack(weight)[1].float() - 127)  # [64, 1]
    nearest = (weight[..., None] - scale[..., None] * CODES).abs().amin(-1)
    assert torch.equal((fake_quantize(weight) - weight).abs(), nearest)


def test_ties_go_to_even_codes_and_large_values_saturate() -> None:
    weight = torch.zeros(GROUP)
    weight[:9] = torch.tensor([6.9, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -5.0]) / 4
    assert (fake_quantize(weight) * 4)[:9].tolist() == [6.0, 0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, -4.0]
    weight[0] = 7.1 / 4  # the next scale loses less than saturating at 6
    assert fake_quantize(weight)[0] == 8.0 / 4
    weight[0] = 7.1  # but no scale beyond 1
    assert fake_quantize(weight)[0] == 6.0


def test_gradient_passes_straight_through() -> None:
    weight = torch.randn(4, GROUP, requires_grad=True)
    upstream = torch.randn(4, GROUP)
    fake_quantize(weight).backward(upstream)
    assert torch.equal(weight.grad, upstream)


def test_zero_group_is_zero() -> None:
    assert not fake_quantize(torch.zeros(2, GROUP)).any()


def test_rows_that_do_not_fill_groups_are_refused() -> None:
    with pytest.raises(ValueError, match="32"):
        pack(torch.zeros(2, 33))
