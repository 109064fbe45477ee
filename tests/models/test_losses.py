"""Losses against transformers' functions, and the corners that a comparison of models does not reach."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.models.gpt_oss.modeling_gpt_oss import load_balancing_loss_func

from oxfuse.models import losses
from oxfuse.models.losses import IGNORED, causal_lm_loss, load_balancing_loss


def test_causal_lm_loss() -> None:
    logits, labels = torch.randn(3, 11, 17), torch.randint(0, 17, (3, 11))
    labels[1, 4:] = -100
    torch.testing.assert_close(causal_lm_loss(logits, labels), ForCausalLMLoss(logits, labels, 17))
    given = causal_lm_loss(logits, labels, num_items_in_batch=torch.tensor(5))
    torch.testing.assert_close(given, ForCausalLMLoss(logits, labels, 17, num_items_in_batch=torch.tensor(5)))


def test_causal_lm_loss_of_nothing_is_nan() -> None:
    labels = torch.full((2, 4), -100)
    labels[:, 0] = 1  # the first label predicts nothing
    assert causal_lm_loss(torch.randn(2, 4, 9), labels).isnan()


@pytest.mark.parametrize(("dtype", "result"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_losses_are_float32_at_least(dtype: torch.dtype, result: torch.dtype) -> None:
    assert causal_lm_loss(torch.randn(1, 3, 5, dtype=dtype), torch.zeros(1, 3, dtype=torch.long)).dtype == result
    assert load_balancing_loss([torch.randn(3, 5, dtype=dtype)], 2).dtype == result


@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("masked", [False, True])
def test_load_balancing_loss(top_k: int, masked: bool) -> None:
    layers = tuple(torch.randn(10, 6) for _ in range(4))
    mask = torch.tensor([[1, 1, 1, 1, 0], [0, 0, 1, 1, 1]]) if masked else None
    torch.testing.assert_close(load_balancing_loss(layers, top_k, mask), load_balancing_loss_func(layers, 6, top_k, mask))


def test_load_balancing_loss_of_even_use_is_top_k() -> None:
    """f sums to k and p is 1 / E everywhere: E * sum(f / E) = k."""
    logits = torch.full((4, 4), 0.0) + torch.eye(4) * 1e-6
    torch.testing.assert_close(load_balancing_loss([logits], 4), torch.tensor(4.0))


@pytest.mark.parametrize("block", [1, 4 * 17 * 3, 1 << 20], ids=["a row at a time", "three rows", "all rows"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gradient_of_causal_lm_loss(dtype: torch.dtype, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of torch's own cross entropy of the widened logits, rows that count for nothing and a divisor given included."""
    monkeypatch.setattr(losses, "_BLOCK_BYTES", block)
    logits, labels = (5 * torch.randn(2, 5, 17)).to(dtype).requires_grad_(), torch.randint(0, 17, (2, 5))
    labels[0, 2] = labels[1, 1:3] = IGNORED
    for count in (None, torch.tensor(3)):
        (ours,) = torch.autograd.grad(causal_lm_loss(logits, labels, count) ** 2, logits)
        total = F.cross_entropy(logits[:, :-1].double().flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
        (theirs,) = torch.autograd.grad((total / (5 if count is None else count)) ** 2, logits)
        torch.testing.assert_close(ours, theirs)
    assert not ours[0, 1].any() and not ours[:, -1].any()


def test_label_outside_the_vocabulary() -> None:
    for label in (17, -1):
        with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
            causal_lm_loss(torch.randn(1, 3, 17), torch.tensor([[0, 1, label]]))
