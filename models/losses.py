"""Training losses of the reference models, with the definitions of transformers 5.23 (loss_utils.py, modeling_gpt_oss.py)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from oxfuse.errors import UserError
from oxfuse.models.precision import widened

IGNORED = -100
_BLOCK_BYTES = 2 << 20
"""Of logits in float32 that are worked on at a time: some part of a core's cache."""


def causal_lm_loss(logits: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
    """Return the next-token cross entropy, a scalar in float32 (or wider, if the logits are).

    logits [B, S, V], labels int64 [B, S], shifted here: token i predicts label i + 1; labels of -100 count for nothing. The mean
    over the labels that are left (NaN if none is), or their sum over `num_items_in_batch` where given.
    """
    if logits.shape[:-1] != labels.shape:
        raise UserError(
            f"The logits cover {tuple(logits.shape[:-1])} tokens, the labels {tuple(labels.shape)}. "
            "Give one label a token, and no logits_to_keep."
        )
    target = F.pad(labels, (0, 1), value=IGNORED)[..., 1:].flatten()
    total: Tensor = _SummedCrossEntropy.apply(logits.flatten(0, -2), target)  # type: ignore[no-untyped-call]
    return total / ((target != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch)


class _SummedCrossEntropy(torch.autograd.Function):
    """cross_entropy(widened(logits), target, reduction="sum"), without its copies of all logits.

    torch's keeps the logarithms of all probabilities for the backward pass, which fills a tensor with zeros beside them: three
    times the logits, each in fresh memory. Here the backward pass makes the gradient alone, from one number a row, some rows at
    a time, which stay in the cache between the operations on them.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor) -> Tensor:
        """logits [T, V], target int64 [T] -> a scalar, float32 or float64."""
        ctx.rows = max(1, _BLOCK_BYTES // (4 * logits.shape[1]))
        log_sums = torch.cat([widened(block).logsumexp(-1) for block in logits.split(ctx.rows)])
        counts = target != IGNORED
        index = target.masked_fill(~counts, 0)[:, None]
        ctx.save_for_backward(logits, log_sums, index, counts)
        losses = log_sums - widened(logits.gather(1, index)[:, 0])
        return losses.masked_fill(~counts, 0).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, total_gradient: Tensor) -> tuple[Tensor, None]:
        """Return (softmax - one_hot(target)) * the gradient of the sum, in the dtype of the logits."""
        logits, log_sums, index, counts = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        rows = (
            tensor.split(ctx.rows) for tensor in (logits, log_sums[:, None], index, counts[:, None] * total_gradient, gradient)
        )
        for x, log_sum, label, factor, out in zip(*rows, strict=True):
            block = torch.sub(widened(x), log_sum, out=out if x.dtype == log_sum.dtype else None).exp_()
            block.scatter_add_(1, label, torch.full_like(log_sum, -1.0)).mul_(factor)
            if block is not out:
                out.copy_(block)
        return gradient, None


def classification_loss(logits: Tensor, labels: Tensor, problem_type: str | None = None) -> Tensor:
    """Return the loss of a classifier of sequences, a scalar, for logits [B, labels].

    `problem_type` None: "regression" if there is one label, else "single_label_classification" if the labels are whole numbers
    [B], else "multi_label_classification" (float [B, labels]). Mean squared error, cross entropy, binary cross entropy. Raises
    UserError where shapes do not fit.
    """
    count = logits.shape[-1]
    if problem_type is None:
        whole = labels.dtype in (torch.long, torch.int)
        problem_type = "regression" if count == 1 else f"{'single' if whole else 'multi'}_label_classification"
    if problem_type == "single_label_classification":
        if labels.numel() != logits.shape[0]:
            raise UserError(f"There are {logits.shape[0]} sequences and labels {list(labels.shape)}: give one label each.")
        return F.cross_entropy(logits.view(-1, count), labels.view(-1))
    values = logits.squeeze() if problem_type == "regression" and count == 1 else logits
    wanted = labels.squeeze() if problem_type == "regression" and count == 1 else labels
    if values.shape != wanted.shape:
        raise UserError(
            f"The labels are {list(labels.shape)}, the logits {list(logits.shape)}: give labels of that shape for {problem_type}."
        )
    return F.mse_loss(values, wanted) if problem_type == "regression" else F.binary_cross_entropy_with_logits(values, wanted)


def token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross entropy of logits [B, S, labels] and labels int64 [B, S], a scalar in float32; -100 counts for nothing."""
    if logits.shape[:-1] != labels.shape:
        raise UserError(
            f"The logits cover {tuple(logits.shape[:-1])} tokens, the labels {tuple(labels.shape)}. Give one a token."
        )
    return F.cross_entropy(widened(logits).flatten(0, -2), labels.flatten(), ignore_index=IGNORED)


def span_loss(start_logits: Tensor, end_logits: Tensor, start_positions: Tensor, end_positions: Tensor) -> Tensor:
    """Return the mean of two cross entropies over the tokens of logits [B, S], for positions int64 [B] or [B, 1].

    Positions of S and more do not count, negative ones stand for 0. NaN if nothing counts.
    """
    losses = []
    for logits, positions in ((start_logits, start_positions), (end_logits, end_positions)):
        place = (positions.squeeze(-1) if positions.dim() > 1 else positions).clamp(0, logits.shape[1])
        losses.append(F.cross_entropy(logits, place, ignore_index=logits.shape[1]))
    return (losses[0] + losses[1]) / 2


def load_balancing_loss(router_logits: Sequence[Tensor], top_k: int, attention_mask: Tensor | None = None) -> Tensor:
    """Return the loss of an uneven use of experts, a scalar: E * sum over experts of f_e * p_e.

    router_logits: L of [B * S, E]; all layers' rows count alike. f_e is how many of a token's `top_k` choices fall on expert e,
    in the mean, so that f sums to top_k; p_e is its mean probability. attention_mask [B, S]: rows of masked tokens do not count.
    Switch Transformer (arXiv:2101.03961), eq. 4 to 6, without its division by top_k.
    """
    logits = torch.cat(list(router_logits))
    probabilities = widened(logits).softmax(-1)  # [L * B * S, E]
    chosen = torch.zeros_like(probabilities).scatter(-1, probabilities.topk(top_k, dim=-1).indices, 1.0)
    if attention_mask is None:
        used, likely = chosen.mean(0), probabilities.mean(0)
    else:
        counted = attention_mask.flatten().to(probabilities.dtype).repeat(len(router_logits))[:, None]
        used, likely = ((x * counted).sum(0) / counted.sum() for x in (chosen, probabilities))
    return logits.shape[-1] * (used * likely).sum()
