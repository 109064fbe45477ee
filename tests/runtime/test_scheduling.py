"""Whatever shares a step, is chunked, queued or pushed out: every sequence gets the result of running alone."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from oxfuse.runtime.errors import InternalError, UserError
from oxfuse.runtime.model import CompiledModel
from oxfuse.runtime.program import TEAM_ROWS

from .toy import VOCAB, ToyModel, tokens, toy_engine

Open = Callable[..., CompiledModel]


def close(found: Tensor, expected: Tensor) -> None:
    assert_close(found, expected, rtol=0, atol=2e-5)


def least_cache(toy: ToyModel) -> int:
    """The fewest cache bytes that an engine accepts, which its refusal names."""
    with pytest.raises(UserError) as refusal:
        toy_engine(toy, cache_bytes=1)
    return int(str(refusal.value).split("takes ")[1].split()[0])


def test_toy_model_is_a_fair_oracle(toy: ToyModel) -> None:
    prompt = tokens(40)
    assert toy.dense(prompt).std() > 1 and len(set(toy.greedy(prompt, 50))) > 15
    far = toy.dense([*prompt[:10], (prompt[10] + 1) % VOCAB, *prompt[11:]])
    assert (far[-1] - toy.dense(prompt)[-1]).abs().max() > 1e-3  # an early token still matters


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 9, 41, 96])
def test_logits_of_one_row(model: CompiledModel, toy: ToyModel, length: int) -> None:
    prompt = tokens(length)
    close(model.logits(torch.tensor([prompt]))[0], toy.dense(prompt))
    assert sum(sum(counts) for counts, _ in toy.steps) == length


@pytest.mark.parametrize("chunk", [1, 3, 24])
def test_any_chunk_size(open_model: Open, toy: ToyModel, chunk: int) -> None:
    prompt = tokens(50)
    close(open_model(chunk=chunk, reserve=0).logits([prompt])[0], toy.dense(prompt))
    steps = [count for (count,), _ in toy.steps]
    assert len(steps) == -(-50 // chunk) and max(steps) <= chunk and max(steps) - min(steps) <= 1  # as alike as can be


def test_ragged_rows_are_padded_right(model: CompiledModel, toy: ToyModel) -> None:
    rows = [tokens(n, seed=n) for n in (3, 30, 1, 17, 9, 26)]  # more than max_batch
    found = model.logits(rows)
    assert found.shape == (6, 30, VOCAB) and found.dtype == torch.float32
    for row, logits in zip(rows, found, strict=True):
        close(logits[: len(row)], toy.dense(row))
        assert not logits[len(row) :].any()
    assert max(len(counts) for counts, _ in toy.steps) == 4
    assert max(sum(counts) for counts, _ in toy.steps) == 24


def test_padding_on_either_side(model: CompiledModel, toy: ToyModel) -> None:
    ids = torch.tensor([tokens(12, seed=1), tokens(12, seed=2), tokens(12, seed=3)])
    mask = torch.ones(3, 12, dtype=torch.long)
    mask[0, :5] = 0
    mask[1, 7:] = 0
    mask[2, :2] = mask[2, 9:] = 0
    ids[mask == 0] = -100  # pads are not run, so they may be anything
    found = model.logits(ids, attention_mask=mask)
    for row, (begin, end) in enumerate([(5, 12), (0, 7), (2, 9)]):
        close(found[row, begin:end], toy.dense(ids[row, begin:end].tolist(), list(range(begin, end))))
    assert not found[mask == 0].any()
    close(model.logits(ids.int(), attention_mask=mask.bool()), found)


def test_explicit_positions(model: CompiledModel, toy: ToyModel) -> None:
    ids, places = tokens(14), [7 + 3 * (i % 5) for i in range(14)]
    expected = toy.dense(ids, places)
    close(model.logits([ids], position_ids=[places])[0], expected)
    both = model.logits(torch.tensor([ids, ids]), position_ids=torch.tensor([places]))
    close(both, expected.expand(2, -1, -1))
    assert (expected - toy.dense(ids)).abs().max() > 0.1


@pytest.mark.parametrize("rows", [[13], [0, 13], [9, 2, 5], list(range(14))])
def test_chosen_rows(model: CompiledModel, toy: ToyModel, rows: list[int]) -> None:
    ids, places = tokens(14), list(range(3, 17))
    close(model.row_logits(ids, places, rows), toy.dense(ids, places)[rows])
    assert sum(toy.rows) < 14 + len(toy.rows) if len(rows) == 14 else sum(toy.rows) <= len(rows) + 1
    for wrong in ([], [14], [-1], [3, 3]):
        with pytest.raises(UserError, match="distinct indices"):
            model.row_logits(ids, places, wrong)


def test_greedy_batch_equals_separate_runs(open_model: Open, toy: ToyModel) -> None:
    prompts = [tokens(n, seed=n) for n in (1, 20, 7, 33, 12)]
    found = open_model(max_batch=2).generate(prompts, max_new_tokens=25)
    mixed = [counts for counts, _ in toy.steps if len(counts) > 1 and min(counts) == 1 < max(counts)]
    assert mixed, "no step mixed a prefill with a decode"
    for prompt, generation in zip(prompts, found, strict=True):
        assert generation.token_ids == toy.greedy(prompt, 25)
        assert generation.prompt_token_ids == prompt and generation.finish_reason == "length"


def test_a_long_prefill_does_not_hold_up_decodes(open_model: Open, toy: ToyModel) -> None:
    model = open_model(max_step_tokens=8)
    long, short = tokens(90), tokens(1)
    found = model.generate([long, short], max_new_tokens=6)
    assert [g.token_ids for g in found] == [toy.greedy(long, 6), toy.greedy(short, 6)]
    assert [sorted(counts) for counts, _ in toy.steps[:6]] == [[1, 7]] * 6


def test_generation_ends_at_max_context(open_model: Open, toy: ToyModel) -> None:
    model = open_model(max_context=20)
    (short, full) = model.generate([tokens(15), tokens(20)], max_new_tokens=50)
    assert short.token_ids == toy.greedy(tokens(15), 5) and short.finish_reason == "length"
    assert full.token_ids == [] and full.finish_reason == "length"
    assert [chunk.token_id for chunk in model.stream(tokens(20))] == []
    with pytest.raises(UserError, match="21 tokens, max_context is 20"):
        model.generate(tokens(21))
    with pytest.raises(UserError, match="21 tokens, max_context is 20"):
        model.logits([tokens(21)])


def test_stop_tokens_free_the_place_for_others(open_model: Open, toy: ToyModel) -> None:
    prompts = [tokens(6, seed=n) for n in range(5)]
    stops = toy.greedy(prompts[0], 4)[-1:]
    for prompt, generation in zip(prompts, open_model(max_batch=2).generate(prompts, stop_token_ids=stops), strict=True):
        expected = toy.greedy(prompt, len(generation.token_ids))
        assert generation.token_ids == expected and not set(stops) & set(expected[:-1])
        assert (generation.finish_reason == "stop") == (expected[-1] in stops)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3])
def test_a_small_cache_pushes_out_and_recomputes(open_model: Open, toy: ToyModel, share: float) -> None:
    whole = toy_engine(toy).size.bytes
    least = least_cache(toy)
    model = open_model(cache_bytes=int(least + share * (whole - least)))
    assert model.scheduler.engine.size.bytes <= least + share * (whole - least)
    lengths = (5, 6, 2, 4) if share == 0 else (5, 17, 2, 9)
    prompts = [tokens(n, seed=n) for n in lengths]
    for prompt, generation in zip(prompts, model.generate(prompts, max_new_tokens=6), strict=True):
        assert generation.token_ids == toy.greedy(prompt, 6)
    if share == 0:
        assert sum(sum(counts) for counts, _ in toy.steps) > sum(lengths) + 4 * 5, "nothing was recomputed, so nothing was tested"


def test_a_sequence_that_never_fits_fails_alone(open_model: Open, toy: ToyModel) -> None:
    least = least_cache(toy)
    model = open_model(cache_bytes=least)
    with pytest.raises(UserError, match="cache is full"):
        model.generate(tokens(60), max_new_tokens=2)
    assert model.generate(tokens(4), max_new_tokens=2)[0].token_ids == toy.greedy(tokens(4), 2)


def test_the_whole_cache_holds_the_longest_batch(open_model: Open, toy: ToyModel) -> None:
    """Without cache_bytes, `max_batch` sequences of `max_context` tokens fit at once: as jobs, and as sessions that stay open."""
    model = open_model()
    model.logits([tokens(96, seed=n) for n in range(4)])
    sessions = [model.session() for _ in range(4)]
    for n, session in enumerate(sessions):
        close(session.prefill(tokens(96, seed=n)), toy.dense(tokens(96, seed=n))[-1])
    assert sum(sum(counts) for counts, _ in toy.steps) == 2 * 4 * 96, "something was recomputed"
    for session in sessions:
        session.close()


def test_sliding_blocks_are_freed(model: CompiledModel) -> None:
    session, engine = model.session(), model.scheduler.engine
    most = 0
    for token in tokens(96):
        session.decode(token)
        most = max(most, engine.pools[0].used)
    assert most <= (5 + 8) // 4 + 2 and engine.pools[1].used == 24
    session.close()


def test_a_failing_step_leaves_nothing_behind(open_model: Open, toy: ToyModel) -> None:
    model = open_model()
    engine, healthy = model.scheduler.engine, model.scheduler.engine.step

    def broken(inputs: list[Tensor]) -> Tensor:
        raise RuntimeError("the step broke")

    engine.step = broken
    with pytest.raises(RuntimeError, match="the step broke"):
        model.generate([tokens(5), tokens(7)])
    engine.step = lambda inputs: healthy(inputs)[:, 0]
    with pytest.raises(InternalError, match="rows were asked for"):
        model.logits([tokens(5)])
    engine.step = lambda inputs: healthy(inputs) * torch.nan
    with pytest.raises(InternalError, match="not finite"):
        model.generate(tokens(5))
    engine.step = healthy
    assert model.generate(tokens(5), max_new_tokens=3)[0].token_ids == toy.greedy(tokens(5), 3)


@pytest.mark.parametrize("where", ["step", "run"])
def test_an_interrupt_does_not_lose_the_tokens_of_others(
    open_model: Open, toy: ToyModel, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Inside the step, or after it and before anybody got the logits."""
    model = open_model()
    stream = model.stream(tokens(9), max_new_tokens=12)
    got = [next(stream).token_id for _ in range(3)]
    engine, healthy = model.scheduler.engine, getattr(model.scheduler.engine, where)

    def interrupted(work: object) -> None:
        healthy(work)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(engine, where, interrupted)
        model.generate(tokens(30))
    assert got + [chunk.token_id for chunk in stream] == toy.greedy(tokens(9), 12)


def test_threads_share_the_steps(open_model: Open, toy: ToyModel) -> None:
    model = open_model(max_batch=8)
    prompts = [tokens(3 + 5 * n, seed=n) for n in range(6)]
    found: dict[int, list[int]] = {}
    start = threading.Barrier(6)

    def work(n: int) -> None:
        start.wait()
        if n % 3 == 0:
            found[n] = model.generate(prompts[n], max_new_tokens=30)[0].token_ids
        elif n % 3 == 1:
            found[n] = [chunk.token_id for chunk in model.stream(prompts[n], max_new_tokens=30)]
        else:
            with model.session() as session:
                logits, found[n] = session.prefill(prompts[n]), []
                for _ in range(30):
                    found[n].append(int(logits.argmax()))
                    logits = session.decode(found[n][-1])

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {n: toy.greedy(prompts[n], 30) for n in range(6)}
    assert max(len(counts) for counts, _ in toy.steps) > 1


def test_thread_count_holds_during_steps_only(open_model: Open, toy: ToyModel) -> None:
    model, seen = open_model(threads=3), []
    healthy = model.scheduler.engine.step

    def watch(inputs: list[Tensor]) -> Tensor:
        seen.append(torch.get_num_threads())
        return healthy(inputs)

    model.scheduler.engine.step, before = watch, torch.get_num_threads()
    model.generate(tokens(3), max_new_tokens=2)
    assert seen == [3, 3] and torch.get_num_threads() == before


@pytest.mark.parametrize("threads", [None, 3])
def test_the_team_has_steps_of_few_tokens(threads: int | None, open_model: Open, toy: ToyModel) -> None:
    """It is left after each, also after one that fails."""
    calls, steps = list[tuple[int, int]](), list[tuple[int, bool]]()

    def team(own: int, regions: int) -> None:
        calls.append((own, regions))

    model = open_model(threads=threads, team=team)
    healthy = model.scheduler.engine.step

    def watch(inputs: list[Tensor]) -> Tensor:
        steps.append((len(inputs[0]), len(calls) % 2 == 1))
        if len(steps) == 6:
            raise RuntimeError("out of order")
        return healthy(inputs)

    model.scheduler.engine.step, before = watch, torch.get_num_threads()
    with model.session() as session:
        for count in (TEAM_ROWS + 1, TEAM_ROWS, 1):
            session.prefill(tokens(count))
        model.generate(tokens(3), max_new_tokens=2)
        assert steps == [(TEAM_ROWS + 1, False), (TEAM_ROWS, True), (1, True), (3, True), (1, True)]
        with pytest.raises(RuntimeError, match="out of order"):
            session.decode(1)
    assert calls == [(threads or before, 1), (0, before)] * 5
