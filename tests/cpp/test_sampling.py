"""Sampling in C++ excludes what Python excludes and draws from the same distribution."""

from __future__ import annotations

import pytest
import torch

from oxfuse.runtime.sampling import Sampler, SamplingOptions, filter_logits, penalise_repetition

from .builds import CallError, Driver, doubles, hex_text, ids_text

VOCABULARY = 300
OPTIONS = [
    {},
    {"repetition_penalty": 1.7},
    {"temperature": 0.7},
    {"temperature": 2.5, "top_k": 12},
    {"temperature": 1.0, "top_p": 0.8},
    {"temperature": 1.0, "top_p": 0.0},
    {"temperature": 1.3, "min_p": 0.05},
    {"temperature": 0.9, "top_k": 40, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.3},
    {"temperature": 1e-40},
    {"temperature": 1.0, "top_k": 100000, "repetition_penalty": 1e39},
]


def rows() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    plain = [torch.randn(VOCABULARY, generator=generator) * scale for scale in (0.1, 2.0, 8.0)]
    return [*plain, plain[1].bfloat16().float(), torch.zeros(VOCABULARY)]  # the last two with ties


def distribution(logits: torch.Tensor, tokens: list[int], options: SamplingOptions) -> torch.Tensor:
    if options.repetition_penalty != 1:
        logits = penalise_repetition(logits, tokens, options.repetition_penalty)
    if options.temperature == 0:
        return torch.nn.functional.one_hot(logits.argmax(), VOCABULARY).double()
    return filter_logits(logits, options).double().softmax(-1)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_filters_keep_what_they_keep_in_python(driver: Driver, options):
    driver.call("sampler", "x", **options)
    tokens = [3, 5, 5, 7, 11]
    for logits in rows():
        found = doubles(driver.call("probabilities", "x", hex_text(logits), ids_text(tokens))[0])
        expected = distribution(logits, tokens, SamplingOptions(**options))
        assert torch.equal(found > 0, expected > 0)
        assert torch.equal(found, expected)


def test_draws_follow_the_distribution(driver: Driver):
    """Pearson's statistic over 4,000 draws: expected near the degrees of freedom; another seed gives other draws."""
    options = {"temperature": 1.5, "top_k": 30, "top_p": 0.95}
    logits, count = rows()[1], 4000
    expected = distribution(logits, [], SamplingOptions(**options))
    kept = expected > 0
    draws = {}
    for seed in (1, 2, None):
        driver.call("sampler", "x", **options, **({} if seed is None else {"seed": seed}))
        drawn = [int(word) for word in driver.call("sample", "x", hex_text(logits), "", count)[0].split()]
        counts = torch.bincount(torch.tensor(drawn), minlength=VOCABULARY)
        assert counts[~kept].sum() == 0, "an excluded token was drawn"
        statistic = float(((counts - count * expected)[kept] ** 2 / (count * expected)[kept]).sum())
        freedom = int(kept.sum()) - 1
        assert statistic < freedom + 6 * (2 * freedom) ** 0.5, (statistic, freedom)
        draws[seed] = drawn
    assert draws[1] != draws[2] and draws[1] != draws[None]
    python = Sampler(SamplingOptions(**options, seed=1))  # not promised, but true: both draw from torch's generator
    assert draws[1][:200] == [python.pick(logits, []) for _ in range(200)]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("temperature", -1), ("temperature", "nan"), ("top_k", -1), ("top_p", 1.5), ("top_p", "nan"), ("min_p", -0.1),
        ("repetition_penalty", 0), ("repetition_penalty", "inf"),
    ],
)  # fmt: skip
def test_options_out_of_range_are_named(driver: Driver, option, value):
    with pytest.raises(CallError, match=f"bad argument: {option} is"):
        driver.call("sampler", "x", **{option: value})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_refused(driver: Driver, value):
    driver.call("sampler", "x", temperature=1)
    logits = rows()[1].index_fill(0, torch.tensor([4]), value)
    with pytest.raises(CallError, match="internal: The model's logits are not finite"):
        driver.call("sample", "x", hex_text(logits), "", 1)
    with pytest.raises(CallError, match="bad argument: The token ids hold 300 at index 0"):
        driver.call("sample", "x", hex_text(rows()[1]), "300", 1)
