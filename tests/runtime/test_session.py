"""Sessions: after any history of prefills, decodes, rewinds and forks, the logits are those of the tokens that are left."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable

import pytest
import torch
from torch.testing import assert_close

from oxfuse.runtime.errors import UserError
from oxfuse.runtime.model import CompiledModel
from oxfuse.runtime.session import _LastRow

from .toy import VOCAB, ToyModel, tokens

Open = Callable[..., CompiledModel]


def ran(toy: ToyModel) -> int:
    return sum(sum(counts) for counts, _ in toy.steps)


def test_prefill_and_decode(model: CompiledModel, toy: ToyModel) -> None:
    ids = tokens(40)
    with model.session() as session:
        for part in (ids[:1], ids[1:20], torch.tensor(ids[20:30])):
            logits = session.prefill(part)
        assert logits.shape == (VOCAB,) and logits.dtype == torch.float32
        for n in range(30, 40):
            assert_close(session.decode(ids[n]), toy.dense(ids[: n + 1])[-1], rtol=0, atol=2e-5)
        assert session.length == 40 and session.token_ids == tuple(ids)


@pytest.mark.parametrize(("back", "again"), [(1, 0), (3, 0), (8, 0), (20, 20), (39, 1), (40, 0)])
def test_rewind(model: CompiledModel, toy: ToyModel, back: int, again: int) -> None:
    """Within the reserve of 8 nothing runs again; beyond it, the kept tokens do."""
    ids = tokens(40)
    with model.session() as session:
        session.prefill(ids)
        session.rewind(40 - back)
        assert session.length == 40 - back
        before = ran(toy)
        assert_close(session.decode(9), toy.dense([*ids[: 40 - back], 9])[-1], rtol=0, atol=2e-5)
        assert ran(toy) - before == 1 + again


def test_forks_share_blocks_and_then_part(open_model: Open, toy: ToyModel) -> None:
    model, ids = open_model(), tokens(30)
    session = model.session()
    session.prefill(ids)
    used, before = model.scheduler.engine.used_blocks, ran(toy)
    forks = [session.fork() for _ in range(3)]
    assert model.scheduler.engine.used_blocks == used
    for token, fork in enumerate([*forks, session]):
        assert_close(fork.decode(token), toy.dense([*ids, token])[-1], rtol=0, atol=2e-5)
    assert ran(toy) - before == 4 and model.scheduler.engine.used_blocks == used + 3 * 2  # the partial block of each group
    forks[0].rewind(17)
    assert_close(forks[0].prefill([5, 6]), toy.dense([*ids[:17], 5, 6])[-1], rtol=0, atol=2e-5)
    session.close()
    for token, fork in enumerate(forks[1:], 1):
        assert_close(fork.decode(3), toy.dense([*ids, token, 3])[-1], rtol=0, atol=2e-5)
    for fork in forks:
        fork.close()


def test_a_fork_near_max_context_has_room_for_its_copy(open_model: Open, toy: ToyModel) -> None:
    model, ids = open_model(max_batch=1, max_context=40), tokens(38)
    with model.session() as session:
        session.prefill(ids)
        with session.fork() as fork:
            assert_close(fork.decode(1), toy.dense([*ids, 1])[-1], rtol=0, atol=2e-5)
        assert_close(session.decode(2), toy.dense([*ids, 2])[-1], rtol=0, atol=2e-5)


def test_random_histories(open_model: Open, toy: ToyModel) -> None:
    """Sessions that grow, go back, branch and end in any order, with generations in between."""
    model, choose = open_model(max_batch=6, max_context=60), random.Random(3)
    sessions, texts = [model.session()], [[]]
    for _ in range(250):
        n = choose.randrange(len(sessions))
        action = choose.choice(["prefill", "decode", "decode", "rewind", "fork", "close", "generate"])
        if action in ("prefill", "decode"):
            new = tokens(choose.randint(1, 20) if action == "prefill" else 1, seed=choose.randrange(1000))
            if len(texts[n]) + len(new) > 60:
                continue
            texts[n] += new
            assert_close(sessions[n].prefill(new), toy.dense(texts[n])[-1], rtol=0, atol=2e-5)
        elif action == "rewind":
            del texts[n][choose.randint(max(0, len(texts[n]) - 25), len(texts[n])) :]
            sessions[n].rewind(len(texts[n]))
        elif action == "fork" and len(sessions) < 6:
            sessions.append(sessions[n].fork())
            texts.append([*texts[n]])
        elif action == "close" and len(sessions) > 1:
            sessions.pop(n).close()
            texts.pop(n)
        elif action == "generate":
            prompt = tokens(choose.randint(1, 9), seed=n)
            assert model.generate(prompt, max_new_tokens=3)[0].token_ids == toy.greedy(prompt, 3)
    for session in sessions:
        session.close()


def test_a_full_cache_spares_the_session(open_model: Open, toy: ToyModel) -> None:
    model = open_model(max_batch=1, max_context=40)
    first, second = model.session(), model.session()
    first.prefill(tokens(40))
    with pytest.raises(UserError, match=r"cache is full.*Close sessions"):
        second.prefill(tokens(30))
    assert second.length == 0
    first.close()
    assert_close(second.prefill(tokens(30)), toy.dense(tokens(30))[-1], rtol=0, atol=2e-5)
    second.close()


def test_a_forgotten_session_gives_its_blocks_back(model: CompiledModel) -> None:
    session = model.session()
    session.prefill(tokens(10))
    assert model.scheduler.engine.used_blocks
    del session
    gc.collect()
    assert model.scheduler.engine.used_blocks == 0


def test_refusals(model: CompiledModel) -> None:
    session = model.session()
    session.prefill(tokens(10))
    for bad in ([], [VOCAB], [-1], [1.5], torch.zeros(2, 2, dtype=torch.long), tokens(87)):
        with pytest.raises(UserError):
            session.prefill(bad)
    for length in (-1, 11, 2.0, True):
        with pytest.raises(UserError, match="0 to 10"):
            session.rewind(length)
    assert session.length == 10
    session.close()
    session.close()
    for call in (lambda: session.decode(1), lambda: session.rewind(0), session.fork):
        with pytest.raises(UserError, match="closed"):
            call()


def test_logits_keep_no_others_in_memory(open_model: Open, toy: ToyModel) -> None:
    model = open_model()
    with model.session() as first, model.session() as second:
        kept = [first.prefill([1, 2, 3]), first.decode(4)]
        jobs = [_LastRow(session._sequence, keep=True) for session in (first, second)]
        first._sequence.append([5])
        second._sequence.append([6, 7])
        model.scheduler.run(jobs)
    assert toy.rows[-1] == 2, "one step for both"
    for row in [*kept, *(job.logits for job in jobs)]:
        assert row.shape == (VOCAB,) and row.untyped_storage().nbytes() == row.nbytes
