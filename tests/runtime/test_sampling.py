"""Sampling means what it means in transformers, and a request's random numbers are its own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.testing import assert_close
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from oxfuse.runtime.errors import UserError
from oxfuse.runtime.model import CompiledModel
from oxfuse.runtime.sampling import Sampler, SamplingOptions, filter_logits, log_probability, penalise_repetition

from .toy import ToyModel, tokens

GRID = [
    {"temperature": 0.7},
    {"temperature": 1.3, "top_k": 7},
    {"temperature": 1.0, "top_k": 5000},
    {"temperature": 0.9, "top_p": 0.6},
    {"temperature": 1.5, "top_p": 1e-6},
    {"temperature": 1.1, "min_p": 0.08},
    {"temperature": 0.8, "min_p": 1.0},
    {"temperature": 1.2, "top_k": 40, "top_p": 0.9, "min_p": 0.02},
]


def theirs(options: dict[str, float]) -> LogitsProcessorList:
    warpers = {
        "temperature": TemperatureLogitsWarper,
        "top_k": TopKLogitsWarper,
        "top_p": TopPLogitsWarper,
        "min_p": MinPLogitsWarper,
    }
    return LogitsProcessorList([warpers[name](value) for name, value in options.items()])


@pytest.mark.parametrize("options", GRID, ids=str)
def test_filters_are_those_of_transformers(options: dict[str, float]) -> None:
    for seed in range(5):
        logits = torch.randn(300, generator=torch.Generator().manual_seed(seed)) * 3
        logits[10:20] = logits[20:30]  # ties
        expected = theirs(options)(torch.zeros(1, 1, dtype=torch.long), logits[None])[0]
        assert_close(filter_logits(logits, SamplingOptions(**options)), expected, rtol=1e-6, atol=1e-6)


def test_repetition_penalty_is_that_of_transformers() -> None:
    logits, seen = torch.randn(50), [3, 3, 7, 49]
    expected = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([seen]), logits[None])[0]
    assert_close(penalise_repetition(logits, seen, 1.7), expected)


def test_frequencies_follow_the_probabilities() -> None:
    logits = torch.tensor([2.0, -torch.inf, 1.0, 0.0, -1.0])
    sampler = Sampler(SamplingOptions(temperature=1.0, seed=0))
    counts = torch.bincount(torch.tensor([sampler.pick(logits, []) for _ in range(4000)]), minlength=5)
    assert counts[1] == 0
    assert_close(counts / 4000, logits.softmax(-1), rtol=0, atol=0.03)


def test_a_seed_gives_the_same_tokens_in_any_company(model: CompiledModel) -> None:
    prompts = [tokens(n, seed=n) for n in (4, 19, 11, 2, 7, 30)]
    options = {"max_new_tokens": 20, "temperature": 1.0, "top_p": 0.95, "seed": 11}
    together = [g.token_ids for g in model.generate(prompts, **options)]
    assert together == [model.generate(p, **options)[0].token_ids for p in prompts]
    assert together[0] == [c.token_id for c in model.stream(prompts[0], **options)]
    assert together != [g.token_ids for g in model.generate(prompts, **{**options, "seed": 12})]
    unseeded = {**options, "seed": None}
    assert model.generate(prompts[0], **unseeded)[0].token_ids != model.generate(prompts[0], **unseeded)[0].token_ids


def test_repetition_penalty_covers_prompt_and_answer(model: CompiledModel, toy: ToyModel) -> None:
    prompt = tokens(12)
    text = list(prompt)
    for _ in range(15):
        text.append(int(penalise_repetition(toy.dense(text)[-1], text, 5.0).argmax()))
    assert model.generate(prompt, max_new_tokens=15, repetition_penalty=5.0)[0].token_ids == text[12:]
    assert text[12:] != toy.greedy(prompt, 15)


def test_logprobs_are_the_models_own(model: CompiledModel, toy: ToyModel) -> None:
    prompt = tokens(9)
    (found,) = model.generate(prompt, max_new_tokens=8, temperature=2.0, top_k=5, seed=1, logprobs=True)
    rows = toy.dense([*prompt, *found.token_ids])[8:-1].log_softmax(-1)
    expected = rows.gather(1, torch.tensor(found.token_ids)[:, None])[:, 0]
    assert_close(torch.tensor(found.logprobs), expected, rtol=0, atol=2e-5)
    assert model.generate(prompt, max_new_tokens=1)[0].logprobs is None
    assert log_probability(torch.tensor([0.0, 0.0]), 1) == pytest.approx(-0.693147, abs=1e-6)


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_k": 1.5},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"min_p": 2},
        {"repetition_penalty": 0.0},
        {"seed": "7"},
        {"seed": 1 << 64},
        {"max_new_tokens": 0},
        {"max_new_tokens": 2.0},
        {"stop": ("",)},
        {"stop": (1,)},
        {"stop": "x"},
        {"stop_token_ids": [61]},
    ],
    ids=str,
)
def test_options_are_checked_before_anything_runs(model: CompiledModel, toy: ToyModel, wrong: dict[str, object]) -> None:
    calls: list[Callable[..., object]] = [model.generate, model.stream, model.astream]
    for call in calls:
        with pytest.raises(UserError, match=str(next(iter(wrong)))[:4]):
            call(tokens(3), **wrong)
    assert not toy.steps
