"""Sampling means what it means in transformers, and a request's random numbers are its own."""

from __future__ import annotations

import random
from collections.abc import Callable
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import GenerationConfig, GenerationMixin, RepetitionPenaltyLogitsProcessor

from oxfuse.runtime.errors import UserError
from oxfuse.runtime.model import CompiledModel
from oxfuse.runtime.sampling import Sampler, SamplingOptions, filter_logits, log_probability, penalise_repetition

from .toy import ToyModel, tokens

GRID: list[dict[str, float]] = [
    {"temperature": 0.7},
    {"temperature": 1.3, "top_k": 7},
    {"temperature": 1.0, "top_k": 5000},
    {"temperature": 0.9, "top_p": 0.6},
    {"temperature": 1.5, "top_p": 1e-6},
    {"temperature": 1.5, "top_p": 0.0},
    {"temperature": 1.1, "min_p": 0.08},
    {"temperature": 0.8, "min_p": 1.0},
    {"temperature": 1.2, "top_k": 40, "top_p": 0.9, "min_p": 0.02},
    {"temperature": 1e-3, "top_k": 3, "top_p": 0.5},
    {"temperature": 1e4, "top_p": 0.99, "min_p": 0.9},
    {"temperature": 1.0, "top_k": 1, "min_p": 0.5, "repetition_penalty": 1.3},
    {"temperature": 0.6, "top_p": 0.95, "repetition_penalty": 0.5},
    {"temperature": 0.6, "repetition_penalty": 1e30},
]


class Theirs(GenerationMixin):
    config = SimpleNamespace(is_encoder_decoder=False)


def theirs(options: dict[str, float], seen: list[int], logits: Tensor) -> Tensor:
    """What transformers' own list of processors makes of logits [V], in the order that its `generate` chooses."""
    config = GenerationConfig(do_sample=True, **{"top_k": 0, **options})
    config._eos_token_tensor = None
    processors = Theirs()._get_logits_processor(config, input_ids_seq_length=len(seen))
    assert len(processors) == sum(
        options.get(name, off) != off for name, off in {"temperature": 1, "top_p": 1, "repetition_penalty": 1}.items()
    ) + ("min_p" in options) + bool(options.get("top_k"))
    return processors(torch.tensor([seen]), logits[None].clone())[0]


def assert_same(options: dict[str, float], seen: list[int], logits: Tensor) -> Tensor:
    """Compare bit by bit. Their sort is not stable, which matters for ties at the edge of top_p: made stable, all is equal."""
    found, loose = ours(options, seen, logits), theirs(options, seen, logits)
    with mock.patch.object(torch, "sort", lambda x, descending: x.sort(dim=-1, descending=descending, stable=True)):
        assert torch.equal(found, theirs(options, seen, logits)), (options, logits)
    assert torch.equal(found.sort().values, loose.sort().values)
    return found


def ours(options: dict[str, float], seen: list[int], logits: Tensor) -> Tensor:
    if "repetition_penalty" in options:
        logits = penalise_repetition(logits, seen, options["repetition_penalty"])
    return filter_logits(logits, SamplingOptions(**options))  # type: ignore[arg-type]


def some_logits(choose: random.Random, size: int) -> Tensor:
    """Logits with what is hard about them: ties, -inf, steep and flat ones, zeros of both signs."""
    make = torch.Generator().manual_seed(choose.randrange(1 << 30))
    logits = torch.randn(size, generator=make) * choose.choice([0.0, 1e-3, 1.0, 3.0, 40.0, 1e4])
    if choose.random() < 0.5:
        logits = logits.round()  # many ties
    if choose.random() < 0.3:
        logits[torch.rand(size, generator=make) < choose.choice([0.1, 0.9])] = -torch.inf
        logits[choose.randrange(size)] = choose.choice([0.0, -0.0, 2.0])
    return logits


@pytest.mark.parametrize("options", GRID, ids=str)
def test_filters_are_those_of_transformers(options: dict[str, float]) -> None:
    choose = random.Random(str(options))
    for _ in range(20):
        logits, seen = some_logits(choose, 300), choose.choices(range(300), k=30)
        assert_same(options, seen, logits)


def test_any_options_are_those_of_transformers() -> None:
    """Seeded random options, logits and histories, compared bit by bit."""
    choose, excluded = random.Random(1), 0
    ranges: dict[str, Callable[[], float]] = {
        "temperature": lambda: choose.choice([1.0, 10 ** choose.uniform(-3, 3)]),
        "top_k": lambda: choose.choice([1, 2, 5, 50, 10_000]),
        "top_p": lambda: choose.choice([0.0, 1e-9, 0.5, 0.9, 0.999999, choose.random()]),
        "min_p": lambda: choose.choice([0.0, 1e-9, 0.05, 1.0, choose.random()]),
        "repetition_penalty": lambda: choose.choice([1.0, 1.2, 0.3, 10 ** choose.uniform(-6, 6)]),
    }
    for _ in range(1500):
        names = ["temperature", *choose.sample([*ranges][1:], choose.randint(0, 4))]
        options, size = {name: ranges[name]() for name in names}, choose.choice([1, 2, 3, 7, 100, 1000])
        logits = some_logits(choose, size)
        seen = choose.choices(range(size), k=choose.randint(1, 40))
        excluded += int((assert_same(options, seen, logits) == -torch.inf).sum())
    assert excluded > 50_000


def test_options_so_extreme_that_numbers_overflow() -> None:
    """Transformers raises here, because every probability is NaN. The limit is clear: the most likely token."""
    logits = torch.tensor([3.0, 9.0, -2.0, 0.0, -torch.inf, 8.999])
    for temperature in (1e-38, 1e-44, 1e-320, 5e-324):
        for extra in ({}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.1}):
            sampler = Sampler(SamplingOptions(temperature=temperature, seed=1, **extra))
            assert {sampler.pick(logits, []) for _ in range(20)} == {1}
    for penalty in (1e-45, 1e-320, 5e-324):
        for temperature in (0.0, 1.0):
            sampler = Sampler(SamplingOptions(temperature=temperature, seed=1, repetition_penalty=penalty))
            assert {sampler.pick(logits, [0, 2, 3, 4]) for _ in range(20)} == {0}
    negative = torch.tensor([-1.0, -2.0])
    huge = Sampler(SamplingOptions(temperature=1.0, seed=1, repetition_penalty=1e308))
    assert {huge.pick(negative, [0, 1]) for _ in range(50)} == {0, 1}
    assert {huge.pick(negative, [0]) for _ in range(20)} == {1}


def test_ties_of_the_greatest_are_settled_as_in_transformers() -> None:
    logits = torch.tensor([1.0, 5.0, 5.0, 5.0])
    assert Sampler(SamplingOptions()).pick(logits, []) == int(logits[None].argmax(-1)) == 1
    kept = {Sampler(SamplingOptions(temperature=1.0, top_k=1, seed=seed)).pick(logits, []) for seed in range(60)}
    assert kept == {1, 2, 3}  # all of those equal to the last of the top k


def test_repetition_penalty_is_that_of_transformers() -> None:
    logits, seen = torch.randn(50), [3, 3, 7, 49]
    expected = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([seen]), logits[None])[0]
    assert_close(penalise_repetition(logits, seen, 1.7), expected, rtol=0, atol=0)


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
    chunks = [*model.stream(prompt, max_new_tokens=8, temperature=2.0, top_k=5, seed=1, logprobs=True)]
    assert [chunk.logprob for chunk in chunks] == found.logprobs
    assert next(iter(model.stream(prompt))).logprob is None
    assert log_probability(torch.tensor([0.0, 0.0]), 1) == pytest.approx(-0.693147, abs=1e-6)


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_k": 1.5},
        {"top_p": -0.1},
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
        {"stop": None},
        {"stop_token_ids": 5},
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
