"""Sequences that begin alike: the second finds what the first computed, and gets what it would get alone."""

from __future__ import annotations

import gc
import random
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from torch.testing import assert_close

from oxfuse.runtime.errors import UserError
from oxfuse.runtime.model import CompiledModel
from oxfuse.runtime.sequence import Prefix

# The same tests as without a prefix cache, on the models of `open_model` below.
from .test_scheduling import (  # noqa: F401
    test_a_failing_step_leaves_nothing_behind,
    test_a_sequence_that_never_fits_fails_alone,
    test_a_small_cache_pushes_out_and_recomputes,
    test_an_interrupt_does_not_lose_the_tokens_of_others,
    test_chosen_rows,
    test_explicit_positions,
    test_greedy_batch_equals_separate_runs,
    test_padding_on_either_side,
    test_ragged_rows_are_padded_right,
    test_sliding_blocks_are_freed,
    test_stop_tokens_free_the_place_for_others,
    test_threads_share_the_steps,
)
from .test_session import (  # noqa: F401
    test_a_fork_near_max_context_has_room_for_its_copy,
    test_forks_share_blocks_and_then_part,
    test_prefill_and_decode,
    test_random_histories,
    test_refusals,
)
from .toy import VOCAB, ToyModel, tokens, toy_model

Open = Callable[..., CompiledModel]
BLOCK = 4  # tokens, as the toy's
LARGE = 1 << 30


@pytest.fixture
def open_model(toy: ToyModel) -> Iterator[Open]:
    """Make models over `toy` that keep blocks; afterwards no sequence may hold any, and the bookkeeping must add up."""
    models: list[CompiledModel] = []

    def make(*, prefix_cache_bytes: int = LARGE, **options: object) -> CompiledModel:
        models.append(toy_model(toy, prefix_cache_bytes=prefix_cache_bytes, **options))
        return models[-1]

    yield make
    gc.collect()
    for model in models:
        check_books(model)
        assert model.scheduler.engine.used_blocks == 0, "blocks did not return to the pool"
        assert not model.scheduler.running and not model.scheduler.waiting


def nodes(model: CompiledModel) -> list[Prefix]:
    found, left = list[Prefix](), [model.scheduler.engine.prefixes._root]
    while left:
        left += (node := left.pop()).children.values()
        found.append(node)
    return found[1:]


def check_books(model: CompiledModel) -> None:
    """Every kept block stands in the tree once, every node is there for something, and the bound holds."""
    engine = model.scheduler.engine
    assert engine.prefixes.kept_bytes <= engine.prefixes.bound
    for group, pool in enumerate(engine.pools):
        entered = [node.blocks[group] for node in nodes(model) if node.blocks[group]]
        assert sorted(entered) == sorted(pool._remembered), "the tree and the pool differ"
        assert {*pool._kept} == pool._remembered - {*pool._references}
        assert pool._fresh - 1 == pool.used + pool.kept + pool.returned + len(pool._blank), "a block was lost"
    assert all(any(node.blocks) or node.children or node.holders for node in nodes(model)), "a node for nothing"


def ran(toy: ToyModel) -> int:
    return sum(sum(counts) for counts, _ in toy.steps)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert_close(found, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("length", [3, 4, 5, 8, 9, 41, 64])
def test_a_prompt_that_comes_again(open_model: Open, toy: ToyModel, length: int) -> None:
    """It runs from its last full block on, but its last token always; so does one that goes on differently."""
    model, prompt = open_model(), tokens(length)
    expected = toy.greedy(prompt, 6)
    (first,) = model.generate(prompt, max_new_tokens=6)
    assert first.token_ids == expected and first.reused_tokens == 0
    before, found = ran(toy), (length - 1) // BLOCK * BLOCK
    (second,) = model.generate(prompt, max_new_tokens=6)
    assert second.token_ids == expected and second.reused_tokens == found == model.reused_tokens
    assert ran(toy) - before == length - found + 5 and first == second
    before, longer = ran(toy), [*prompt, *expected[:3], 9, 7]
    (third,) = model.generate(longer, max_new_tokens=2)
    assert third.token_ids == toy.greedy(longer, 2)
    assert third.reused_tokens == (length + 3) // BLOCK * BLOCK and ran(toy) - before == len(longer) - third.reused_tokens + 1


def test_streams_sessions_and_chosen_rows_find_it(open_model: Open, toy: ToyModel) -> None:
    model, prompt = open_model(), tokens(40)
    expected = toy.dense(prompt)
    model.generate(prompt, max_new_tokens=1)
    before = ran(toy)
    assert [chunk.token_id for chunk in model.stream(prompt, max_new_tokens=3)] == toy.greedy(prompt, 3)
    with model.session() as session:
        close(session.prefill(prompt[:10]), expected[9])  # the middle of a block
        close(session.prefill(prompt[10:]), expected[39])
    assert ran(toy) - before == (4 + 2) + 2 + 4
    before = ran(toy)
    close(model.row_logits(prompt, range(40), [39, 21]), expected[[39, 21]])
    assert ran(toy) - before == 7 + 4, "a third of what there is from 20 on, and what follows the last block before 39"
    before = ran(toy)
    close(model.row_logits(prompt, range(40), [0, 39]), expected[[0, 39]])
    close(model.logits([prompt])[0], expected)
    assert ran(toy) - before == (8 + 4) + 40, "tokens whose logits are wanted run"


def test_other_positions_are_another_beginning(open_model: Open, toy: ToyModel) -> None:
    model, ids = open_model(), tokens(30)
    moved = [*range(8), *range(20, 42)]
    model.generate(ids, max_new_tokens=1)
    for positions, reused in ((moved, 8), (moved, 28), (list(range(30)), 28), ([5, *range(1, 30)], 0)):
        before = model.reused_tokens
        close(model.row_logits(ids, positions, [29])[0], toy.dense(ids, positions)[-1])
        assert model.reused_tokens - before == reused


def test_tokens_are_compared_and_not_their_hashes(open_model: Open, toy: ToyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Contents that hash alike are told apart."""

    class Colliding(bytes):
        def __hash__(self) -> int:
            return 7

    model = open_model()
    prefixes = model.scheduler.engine.prefixes
    content = prefixes._content
    monkeypatch.setattr(prefixes, "_content", lambda sequence, index: Colliding(content(sequence, index)))
    prompts = [tokens(23, seed=n) for n in range(4)] * 2
    for n, prompt in enumerate(prompts):
        (found,) = model.generate(prompt, max_new_tokens=4)
        assert found.token_ids == toy.greedy(prompt, 4) and found.reused_tokens == (20 if n >= 4 else 0)


def test_windows_are_found_as_far_as_they_are_needed(open_model: Open, toy: ToyModel) -> None:
    """A sliding group's old blocks may be gone; those that the next token sees must not."""
    model, prompt = open_model(reserve=0), tokens(60)
    engine = model.scheduler.engine
    model.generate(prompt, max_new_tokens=1)
    sliding = engine.pools[0]
    by_depth = {node.depth: node for node in nodes(model)}
    assert len(by_depth) == 15 and all(all(node.blocks) for node in by_depth.values())

    def lose(depth: int) -> None:
        block = by_depth[depth].blocks[0]
        sliding._kept.move_to_end(block, last=False)
        sliding.let_go()

    for depth in range(1, 14):
        lose(depth)  # blocks 13 and 14 are left: token 56 sees 52 to 56
    session = model.session()
    close(session.prefill(prompt), toy.dense(prompt)[-1])
    assert model.reused_tokens == 56 and list(session._sequence.tables[0])[:13] == [0] * 13
    session.close()
    lose(14)
    before = model.reused_tokens
    close(model.row_logits(prompt, range(60), [59])[0], toy.dense(prompt)[-1])
    assert model.reused_tokens == before, "there is no length at which a window is whole"


def test_running_sequences_share_their_blocks(open_model: Open, toy: ToyModel) -> None:
    model, prompt = open_model(), tokens(50)
    first = model.session()
    first.prefill(prompt)
    used = model.scheduler.engine.used_blocks
    others = [model.session() for _ in range(3)]
    for n, other in enumerate(others):
        close(other.prefill([*prompt[:46], n]), toy.dense([*prompt[:46], n])[-1])
        assert list(other._sequence.tables[1])[:11] == list(first._sequence.tables[1])[:11]
    assert model.scheduler.engine.used_blocks <= used + 3 * 2 * 2, "each has what is its own in each group"
    first.close()
    for n, other in enumerate(others):
        close(other.decode(3), toy.dense([*prompt[:46], n, 3])[-1])
        other.close()


def test_a_batch_that_begins_alike_runs_it_once(open_model: Open, toy: ToyModel) -> None:
    """Whoever comes second in a step waits for the block that the first fills, and takes it."""
    model, system = open_model(), tokens(40)
    prompts = [[*system, *tokens(3 + n, seed=n)] for n in range(4)]
    found = model.generate(prompts, max_new_tokens=5)
    assert [generation.token_ids for generation in found] == [toy.greedy(prompt, 5) for prompt in prompts]
    assert [generation.reused_tokens for generation in found] == [0, 40, 40, 40]
    assert ran(toy) == 40 + sum(3 + n for n in range(4)) + 4 * 4
    same = model.generate([tokens(33, seed=9)] * 3, max_new_tokens=3)
    assert [generation.reused_tokens for generation in same] == [0, 32, 32] and same[0] == same[1] == same[2]


def test_what_a_fork_goes_on_with_is_found(open_model: Open, toy: ToyModel) -> None:
    model, text = open_model(), tokens(41)
    with model.session() as session:
        session.prefill(text[:30])
        with session.fork() as twin:
            close(twin.prefill(text[30:]), toy.dense(text)[-1])
        (found,) = model.generate([*text, 5], max_new_tokens=2)
    assert found.reused_tokens == 40 and found.token_ids == toy.greedy([*text, 5], 2)


def test_equal_blocks_are_held_once(open_model: Open, toy: ToyModel) -> None:
    """Two sequences of one text, of which neither could wait for the other, come to share their blocks."""
    model, text = open_model(), tokens(24)
    one, other = model.session(), model.session()
    for token in text:
        close(one.decode(token), close_to := other.decode(token))
    close(close_to, toy.dense(text)[-1])
    assert list(one._sequence.tables[1]) == list(other._sequence.tables[1])
    for session in (one, other):
        session.close()


def test_a_rewind_into_a_kept_block_leaves_it_as_it_was(open_model: Open, toy: ToyModel) -> None:
    model, ids = open_model(), tokens(38)
    with model.session() as session:
        session.prefill(ids)
        session.rewind(34)
        for token in (1, 2, 3, 4, 5):
            logits = session.decode(token)
        close(logits, toy.dense([*ids[:34], 1, 2, 3, 4, 5])[-1])
        before = model.reused_tokens
        with model.session() as other:
            close(other.prefill([*ids, 8]), toy.dense([*ids, 8])[-1])
        assert model.reused_tokens - before == 36


@pytest.mark.parametrize("length", [3, 8, 17, 20])
def test_a_rewind_beyond_what_is_remembered(open_model: Open, toy: ToyModel, length: int) -> None:
    """Without the cache all kept tokens run again (tests/runtime/test_session.py)."""
    model, ids = open_model(), tokens(40)
    with model.session() as session:
        session.prefill(ids)
        session.rewind(length)
        before = ran(toy)
        close(session.decode(9), toy.dense([*ids[:length], 9])[-1])
        assert ran(toy) - before == 1 + length % BLOCK


def test_a_job_that_lost_its_blocks_finds_them_again(open_model: Open, toy: ToyModel) -> None:
    """Where the pool is short, and as far as nobody else needed them."""
    whole = toy_model(toy).scheduler.engine.size.bytes
    model = open_model(cache_bytes=whole // 3)
    prompts = [tokens(30, seed=n) for n in range(4)]
    found = model.generate(prompts, max_new_tokens=30)
    assert [generation.token_ids for generation in found] == [toy.greedy(prompt, 30) for prompt in prompts]
    assert model.reused_tokens and not any(generation.reused_tokens for generation in found)


def test_kept_blocks_are_given_up_before_anything_waits(open_model: Open, toy: ToyModel) -> None:
    """A pool that is full of kept blocks serves the longest batch as an empty one does."""
    model = open_model()
    for seed in range(8):
        model.generate(tokens(90, seed=seed), max_new_tokens=1)
    pools = model.scheduler.engine.pools
    assert all(pool.kept > 0.9 * (pool.blocks - 1) for pool in pools) and not model.scheduler.engine.used_blocks
    before = ran(toy)
    sessions = [model.session() for _ in range(4)]
    for n, session in enumerate(sessions):
        close(session.prefill(tokens(96, seed=20 + n)), toy.dense(tokens(96, seed=20 + n))[-1])
    assert ran(toy) - before == 4 * 96
    for session in sessions:
        session.close()


def test_a_full_cache_spares_the_session(open_model: Open, toy: ToyModel) -> None:
    model = open_model(max_batch=1, max_context=40)
    first, second = model.session(), model.session()
    first.prefill(tokens(40))
    close(second.prefill(tokens(30)), toy.dense(tokens(30))[-1])  # shares all but its last two tokens
    with pytest.raises(UserError, match=r"cache is full.*Close sessions"):
        second.prefill(tokens(9, seed=1))
    assert second.length == 30
    first.close()
    close(second.prefill(tokens(9, seed=1)), toy.dense([*tokens(30), *tokens(9, seed=1)])[-1])
    second.close()


def test_the_least_recently_used_leave_first_and_ends_before_beginnings(open_model: Open, toy: ToyModel) -> None:
    model = open_model(prefix_cache_bytes=LARGE, reserve=96)
    engine = model.scheduler.engine
    pair = sum(engine.block_bytes)  # of a block in each group
    engine.prefixes.bound = 20 * pair
    one, two = tokens(48, seed=1), tokens(24, seed=2)
    model.generate(one, max_new_tokens=1)
    model.generate(two, max_new_tokens=1)
    assert engine.prefixes.kept_bytes == 18 * pair
    model.generate(one[:20], max_new_tokens=1)  # the first five blocks of `one` are the latest now
    model.generate(tokens(40, seed=3), max_new_tokens=1)  # ten blocks
    left = sorted(node.depth for node in nodes(model))
    assert engine.prefixes.kept_bytes == 20 * pair
    (again,) = model.generate([*one[:47], 0], max_new_tokens=1)
    assert again.reused_tokens == 20, "the beginning was used later than the rest, and left before it"
    assert left.count(1) == 3 and 20 <= len(left) <= 22  # 5 + 5 + 10; groups differ in bytes, and so not all in pairs


def test_the_bound_holds_and_memory_is_given_back(toy: ToyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("oxfuse.runtime.engine.KEPT_BYTES", 0)
    model = toy_model(toy, max_context=96)
    engine = model.scheduler.engine
    pair = sum(engine.block_bytes)
    engine.prefixes.bound = 10 * pair
    discarded = list[range | None]()
    discard = engine.device.discard
    monkeypatch.setattr(engine.device, "discard", lambda caches, blocks=None: (discarded.append(blocks), discard(caches, blocks)))
    for seed in range(6):
        model.generate(tokens(80, seed=seed), max_new_tokens=1)
        check_books(model)
        touched = sum(pool.touched * size for pool, size in zip(engine.pools, engine.block_bytes, strict=True))
        assert 8 * pair < engine.prefixes.kept_bytes == touched <= 10 * pair, "memory of blocks that are not kept"
        assert not any(pool.returned for pool in engine.pools)
    assert discarded and None not in discarded
    (again,) = model.generate(tokens(80, seed=5), max_new_tokens=4)
    assert again.token_ids == toy.greedy(tokens(80, seed=5), 4)


def test_a_full_cache_is_reused_before_new_memory(open_model: Open, toy: ToyModel) -> None:
    model = open_model(reserve=96)
    engine = model.scheduler.engine
    engine.prefixes.bound = 40 * sum(engine.block_bytes)
    for seed in range(3):
        model.generate(tokens(64, seed=seed), max_new_tokens=1)
    assert sum(pool.touched for pool in engine.pools) <= 80 + 2 * 2
    for seed in range(3, 9):
        model.generate(tokens(40, seed=seed), max_new_tokens=1)
    assert sum(pool.touched for pool in engine.pools) <= 80 + 2 * 2, "it took memory while it was full of kept blocks"


def test_none_is_kept_without_it(model: CompiledModel, open_model: Open, toy: ToyModel) -> None:
    off = open_model(prefix_cache_bytes=0)
    for _ in range(2):
        assert off.generate(tokens(50), max_new_tokens=3)[0].reused_tokens == 0
    assert off.reused_tokens == 0 and not any(pool.kept or pool._remembered for pool in off.scheduler.engine.pools)
    with off.session() as session, off.session() as other:
        session.prefill(tokens(30))
        assert not nodes(off) and close(other.prefill(tokens(30)), toy.dense(tokens(30))[-1]) is None
        assert not {*session._sequence.tables[1]} & {*other._sequence.tables[1]}, "they share blocks"


def test_sessions_and_cancelled_streams_return_what_they_hold(open_model: Open, toy: ToyModel) -> None:
    model = open_model()
    engine = model.scheduler.engine
    engine.prefixes.bound = 30 * sum(engine.block_bytes)
    for n in range(200):
        stream = model.stream(tokens(5 + n % 60, seed=n), max_new_tokens=9)
        for _ in range(n % 4):
            next(stream)
        stream.close()  # type: ignore[attr-defined]
        with model.session() as session:
            session.prefill(tokens(1 + n % 50, seed=n))
        assert not engine.used_blocks
    check_books(model)
    assert engine.prefixes.kept_bytes > 20 * sum(engine.block_bytes)
    assert len(nodes(model)) <= 60, "nodes are left whose blocks are gone"


@pytest.mark.parametrize("share", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("bound", [0.02, 0.2, 1.0])
def test_random_requests_that_begin_alike(open_model: Open, toy: ToyModel, share: float, bound: float) -> None:
    """Few beginnings, many ends, sessions that go back and branch, in little and much memory: all get what they get alone."""
    size = toy_model(toy).scheduler.engine.size.bytes
    model = open_model(cache_bytes=int(size * (0.25 + 0.75 * share)), prefix_cache_bytes=int(size * bound))
    choose, engine = random.Random(int(100 * share + 10 * bound)), model.scheduler.engine
    beginnings = [tokens(choose.randint(8, 40), seed=n) for n in range(3)]
    session, text = model.session(), list[int]()
    for n in range(40):
        prompts = [
            [*(begin := choose.choice(beginnings))[: choose.randint(1, len(begin))], *tokens(choose.randint(1, 9), seed=n)]
            for _ in range(choose.randint(1, 4))
        ]
        for prompt, generation in zip(prompts, model.generate(prompts, max_new_tokens=7), strict=True):
            assert generation.token_ids == toy.greedy(prompt, 7)
        new = choose.choice(beginnings) if choose.random() < 0.5 and not text else tokens(choose.randint(1, 12), seed=n)
        if len(text) + len(new) > 60 or choose.random() < 0.4:
            del text[choose.randint(0, len(text)) :]
            session.rewind(len(text))
        if len(text) + len(new) <= 60:
            text += new
            try:
                close(session.prefill(new), toy.dense(text)[-1])
            except UserError as error:
                assert "cache is full" in str(error)
                del text[len(text) - len(new) :]
        if choose.random() < 0.3 and text:
            with session.fork() as twin:
                close(twin.decode(n % VOCAB), toy.dense([*text, n % VOCAB])[-1])
        check_books(model)
    session.close()
    if bound > 0.1:
        assert engine.reused_tokens > 200, "little was found, so little was tested"


def test_threads_that_begin_alike(open_model: Open, toy: ToyModel) -> None:
    model = open_model(max_batch=3)
    system, found = tokens(29), dict[tuple[int, int], list[int]]()

    def prompt(n: int, turn: int) -> list[int]:
        return [*system[: 10 + 3 * n], *tokens(2 + turn, seed=n)]

    def work(n: int) -> None:
        for turn in range(5):
            if (n + turn) % 2:
                found[n, turn] = model.generate(prompt(n, turn), max_new_tokens=12)[0].token_ids
            else:
                found[n, turn] = [chunk.token_id for chunk in model.stream(prompt(n, turn), max_new_tokens=12)]

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {(n, turn): toy.greedy(prompt(n, turn), 12) for n in range(6) for turn in range(5)}
    assert model.reused_tokens > 300
