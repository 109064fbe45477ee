"""Picks the next token from logits, with the meaning that transformers' logits processors gave these arguments.

Each request draws from its own generator, one number a token, so what it gets does not depend on what else runs in the batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from oxfuse.runtime.errors import InternalError, UserError


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """`temperature` 0 takes the most likely token; `top_k` 0, `top_p` 1, `min_p` 0 and `repetition_penalty` 1 are off.

    `top_k` beyond the vocabulary keeps all of it; `top_p` 0 keeps the most likely token, as the smallest set that there is.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        rules = {
            "temperature": (_is_number(self.temperature) and self.temperature >= 0, "a number >= 0"),
            "top_k": (type(self.top_k) is int and self.top_k >= 0, "a whole number >= 0"),
            "top_p": (_is_number(self.top_p) and 0 <= self.top_p <= 1, "a number from 0 to 1"),
            "min_p": (_is_number(self.min_p) and 0 <= self.min_p <= 1, "a number from 0 to 1"),
            "repetition_penalty": (_is_number(self.repetition_penalty) and self.repetition_penalty > 0, "a number > 0"),
            "seed": (self.seed is None or (type(self.seed) is int and -(2**63) <= self.seed < 2**63), "None or a 64-bit integer"),
        }
        for name, (fits, want) in rules.items():
            if not fits:
                raise UserError(f"{name} is {getattr(self, name)!r}: give {want}.")

    @property
    def greedy(self) -> bool:
        """Whether the token is the most likely one by the model's own logits, so that nothing else of them matters."""
        return self.temperature == 0 and self.repetition_penalty == 1


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def penalise_repetition(logits: Tensor, tokens: Sequence[int], penalty: float) -> Tensor:
    """Divide the positive logits [V] of `tokens` by `penalty`, multiply the negative ones (Keskar et al. 2019, section 4.1).

    Each counts once, however often it occurs. A logit that would overflow becomes the largest number there is.
    """
    seen = torch.tensor(sorted(set(tokens)), dtype=torch.int64)
    scores = logits[seen]
    penalised = _penalised(scores, penalty)
    finite = scores.isfinite()
    if not penalised[finite].isfinite().all():  # float64, since the penalty itself may be beyond float32
        most = torch.finfo(logits.dtype).max
        penalised = torch.where(finite, _penalised(scores.double(), penalty).clamp(-most, most).to(logits.dtype), scores)
    return logits.scatter(0, seen, penalised)


def _penalised(scores: Tensor, penalty: float) -> Tensor:
    return torch.where(scores < 0, scores * penalty, scores / penalty)


def filter_logits(logits: Tensor, options: SamplingOptions) -> Tensor:
    """Return logits [V] with temperature applied and all that top_k, top_p and min_p exclude set to -inf, in this order.

    The largest is finite and stays. Ties with the last of the top_k stay too; of equals at the edge of top_p the later ones stay,
    which transformers leaves to a sort that is not stable. Where a temperature is so low that the quotient overflows, the
    largest becomes 0, and the others what their distance from it says.
    """
    scaled = logits / options.temperature
    if not math.isfinite(scaled.max()):
        scaled = ((logits.double() - logits.max()) / options.temperature).to(logits.dtype)
    logits = scaled
    if options.top_k:
        logits = logits.masked_fill(logits < logits.topk(min(options.top_k, len(logits))).values[-1], -torch.inf)
    if options.top_p < 1:
        ascending, order = logits.sort(stable=True)
        excluded = ascending.softmax(-1).cumsum(-1) <= 1 - options.top_p
        excluded[-1] = False
        logits = logits.masked_fill(torch.zeros_like(excluded).scatter(0, order, excluded), -torch.inf)
    if options.min_p:
        probabilities = logits.softmax(-1)
        excluded = probabilities < options.min_p * probabilities.max()
        excluded[probabilities.argmax()] = False
        logits = logits.masked_fill(excluded, -torch.inf)
    return logits


class Sampler:
    """One request's options and its own stream of random numbers."""

    def __init__(self, options: SamplingOptions) -> None:
        """Seed the generator, from the operating system where the options have no seed."""
        self.options = options
        self._generator = torch.Generator()
        if options.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(options.seed)

    def pick(self, logits: Tensor, tokens: Sequence[int]) -> int:
        """Return the next token for float32 logits [V] after `tokens`. Raises InternalError where they are not finite."""
        check_finite(float(logits.max()))
        if self.options.repetition_penalty != 1:
            logits = penalise_repetition(logits, tokens, self.options.repetition_penalty)
        if self.options.temperature == 0:
            return int(logits.argmax())
        # the inverse of the cumulative distribution, in float64: one number a token whatever the vocabulary, and a last bit's
        # difference in the logits changes the token only where the number falls on a boundary
        cumulative = filter_logits(logits, self.options).double().softmax(-1).cumsum(-1)
        drawn = torch.rand((), dtype=torch.float64, generator=self._generator) * cumulative[-1]
        return int(torch.searchsorted(cumulative, drawn, right=True))


def check_finite(largest: float) -> None:
    """Raise InternalError unless the largest of a row's logits is finite; it is NaN where one of them is."""
    if not math.isfinite(largest):
        raise InternalError(f"The model's logits are not finite (maximum {largest}): run `oxfuse verify`.")


def log_probability(logits: Tensor, token: int) -> float:
    """Return the natural logarithm of the probability that the model itself, before any option, gives `token`."""
    return float(logits[token] - logits.logsumexp(-1))
