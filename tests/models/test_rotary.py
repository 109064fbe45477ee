"""The YaRN table at the released model's numbers, and what each way of getting it wrong would change."""

from __future__ import annotations

import pytest
import torch

from oxfuse.models.gpt_oss import GptOssConfig
from oxfuse.models.rotary import RotaryEmbedding, inverse_frequencies, rotate, yarn_range

RELEASED = GptOssConfig().rope_parameters


def test_released_range_and_scale() -> None:
    """findings/peers.md; the reference values were computed apart from any implementation."""
    assert yarn_range(RELEASED, 64) == (8.092779115512402, 17.39802450158856)
    assert yarn_range({**RELEASED, "truncate": True}, 64) == (8, 18)
    assert inverse_frequencies(RELEASED, 64)[1] == 1.3465735902799727


def test_released_frequencies() -> None:
    """Own frequencies up to pair 8, interpolated by 32 from pair 18 on, in between a ramp that starts and ends between pairs."""
    table, _ = inverse_frequencies(RELEASED, 64)
    own = 150000.0 ** (-torch.arange(0, 64, 2, dtype=torch.float64) / 64)
    torch.testing.assert_close(table[:9].double(), own[:9], rtol=1e-6, atol=0)
    torch.testing.assert_close(table[18:].double(), own[18:] / 32, rtol=1e-6, atol=0)
    ramp = (torch.arange(9, 18) - 8.092779115512402) / (17.39802450158856 - 8.092779115512402)
    torch.testing.assert_close(table[9:18].double(), own[9:18] * (1 - ramp) + own[9:18] / 32 * ramp, rtol=1e-6, atol=0)


def test_truncation_changes_nine_frequencies_and_swapped_betas_all() -> None:
    table, _ = inverse_frequencies(RELEASED, 64)
    rounded, _ = inverse_frequencies({**RELEASED, "truncate": True}, 64)
    relative = (rounded / table - 1).abs()
    assert int((relative > 1e-6).sum()) == 9 and float(relative.max()) == pytest.approx(0.76, abs=0.01)
    swapped, _ = inverse_frequencies({**RELEASED, "beta_fast": 1.0, "beta_slow": 32.0}, 64)
    assert int(((swapped / table - 1).abs() > 1e-6).sum()) == 32


def test_equal_ends_of_the_ramp_divide_by_no_zero() -> None:
    table, _ = inverse_frequencies({**RELEASED, "beta_fast": 1.0}, 64)
    assert table.isfinite().all()


def test_factor_of_at_most_one_scales_nothing() -> None:
    rope = GptOssConfig(
        rope_parameters={"rope_type": "yarn", "factor": 1.0, "original_max_position_embeddings": 64}
    ).rope_parameters
    table, scale = inverse_frequencies(rope, 64)
    assert scale == 1.0
    torch.testing.assert_close(table, inverse_frequencies({"rope_type": "default", "rope_theta": 150000.0}, 64)[0])


def test_rotation_turns_the_first_half_into_the_second() -> None:
    """Position p turns pair (d, d + D / 2) by p * inv_freq[d]; the same as multiplying complex numbers."""
    rotary = RotaryEmbedding({"rope_type": "default", "rope_theta": 100.0}, 8)
    x, positions = torch.randn(2, 3, 5, 8), torch.tensor([[0, 1, 2, 50, 7], [3, 3, 9, 1000, 4]])
    cos, sin = rotary(positions)
    angle = positions[:, None, :, None].double() * rotary.inv_freq.double()
    expected = torch.complex(x[..., :4].double(), x[..., 4:].double()) * torch.polar(torch.ones_like(angle), angle)
    torch.testing.assert_close(rotate(x, cos, sin), torch.cat([expected.real, expected.imag], -1).float(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(rotate(x, cos, sin)[0, :, 0], x[0, :, 0])
