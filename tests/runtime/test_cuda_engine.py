"""The engine on a device with graphs: however a sequence is padded, replayed or run, it gets what it gets alone."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from oxfuse.runtime import graphs
from oxfuse.runtime.cache_size import CacheSize
from oxfuse.runtime.engine import Engine
from oxfuse.runtime.errors import InternalError, UserError
from oxfuse.runtime.graphs import BUCKETS, bucket_sizes, same_bits
from oxfuse.runtime.manifest import CacheSpec, Limits
from oxfuse.runtime.model import CompiledModel
from oxfuse.runtime.sequence import Feed, TokenSequence, split_feeds

from .fake_accelerator import CheckedDevice, FakeAccelerator, ToyDecode, toy_device

# The same tests as on the CPU, on the device of `open_model` below.
from .test_scheduling import (  # noqa: F401
    test_a_long_prefill_does_not_hold_up_decodes,
    test_a_sequence_that_never_fits_fails_alone,
    test_a_small_cache_pushes_out_and_recomputes,
    test_any_chunk_size,
    test_chosen_rows,
    test_explicit_positions,
    test_greedy_batch_equals_separate_runs,
    test_logits_of_one_row,
    test_padding_on_either_side,
    test_ragged_rows_are_padded_right,
    test_sliding_blocks_are_freed,
    test_stop_tokens_free_the_place_for_others,
    test_the_whole_cache_holds_the_longest_batch,
    test_threads_share_the_steps,
)
from .test_session import (  # noqa: F401
    test_forks_share_blocks_and_then_part,
    test_prefill_and_decode,
    test_rewind,
)
from .toy import VOCAB, ToyModel, tokens, toy_engine, toy_model

Open = Callable[..., CompiledModel]


@pytest.fixture
def open_model(toy: ToyModel) -> Iterator[Open]:
    """Make models over `toy` whose decodes are replayed; afterwards all their blocks must be free, and no job left."""
    models: list[CompiledModel] = []

    def make(*, max_batch: int = 4, max_context: int = 96, most_rows: int | None = None, **options: object) -> CompiledModel:
        device = toy_device(toy, most=max_batch, max_context=max_context, most_rows=most_rows)
        models.append(toy_model(toy, max_batch=max_batch, max_context=max_context, device=device, **options))
        return models[-1]

    yield make
    gc.collect()
    for model in models:
        assert model.scheduler.engine.used_blocks == 0, "blocks did not return to the pool"
        assert not model.scheduler.running and not model.scheduler.waiting


def parts(model: CompiledModel) -> tuple[CheckedDevice, FakeAccelerator, ToyDecode]:
    device = model.scheduler.engine.device
    assert isinstance(device, CheckedDevice) and isinstance(device._decode, ToyDecode)
    assert isinstance(device.accelerator, FakeAccelerator)
    return device, device.accelerator, device._decode


def test_bucket_sizes() -> None:
    assert BUCKETS == (1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64)
    assert [bucket_sizes(n) for n in (1, 2, 3, 8, 9, 64)] == [(1,), (1, 2), (1, 2, 3), (1, 2, 4, 8), (1, 2, 4, 8, 9), BUCKETS]


def test_batches_grow_and_shrink(open_model: Open, toy: ToyModel) -> None:
    """Sequences come and go one by one, so that every batch size occurs, rising and falling."""
    model = open_model(max_batch=11, max_step_tokens=40)
    prompts = [tokens(1 + 3 * n % 8, seed=n) for n in range(11)]
    jobs = []
    for n, prompt in enumerate(prompts):
        jobs += model.generation_jobs(prompt, **options(max_new_tokens=28 + 9 * n % 13))
        model.scheduler.submit(jobs[-1])
        for _ in range(2):  # its prompt, and then a decode of all
            model.scheduler.advance(lambda: False)
    while model.scheduler.advance(lambda: all(job.done for job in jobs)):
        pass
    expected = toy_model(ToyModel(), max_batch=11, max_step_tokens=40).generate(prompts, max_new_tokens=40)
    for n, (job, whole) in enumerate(zip(jobs, expected, strict=True)):
        assert job.result().token_ids == whole.token_ids[: 28 + 9 * n % 13]
    _, accelerator, decode = parts(model)
    sizes = bucket_sizes(11)
    assert sizes == (1, 2, 4, 8, 11) and {size for size, _ in decode.batches} == {*sizes}
    assert all(size == next(s for s in sizes if s >= live) for size, live in decode.batches), "not the smallest bucket"
    lives = [live for _, live in decode.batches]
    top = lives.index(max(lives))
    assert len({*lives[:top]}) > 7 and len({*lives[top:]}) > 7 and max(lives) == 11, "it grew and shrank"
    assert accelerator.records == len(sizes) and accelerator.replays == len(decode.batches)


def options(**chosen: object) -> dict[str, object]:
    return {
        "max_new_tokens": 8,
        "temperature": 0.0,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "seed": None,
        "stop": (),
        "stop_token_ids": None,
        "logprobs": False,
    } | chosen


@pytest.mark.parametrize("seed", range(4))
def test_any_history(open_model: Open, toy: ToyModel, seed: int) -> None:
    """Sessions that prefill, decode, go back, part and close, with generations between them, in random order."""
    choose, model = random.Random(seed), open_model(max_batch=6)
    sessions: list[tuple[object, list[int]]] = []
    for _ in range(60):
        action = choose.choice(["open", "decode", "decode", "decode", "prefill", "rewind", "fork", "close", "generate"])
        if not sessions or (action == "open" and len(sessions) < 4):
            sessions.append((model.session(), []))
        session, text = sessions[choose.randrange(len(sessions))]
        new = tokens({"decode": 1, "open": 1, "prefill": choose.randint(2, 9)}.get(action, 0), seed=choose.randrange(99))
        if action == "rewind" or len(text) + len(new) > 90:
            del text[choose.randint(0, len(text)) :]
            session.rewind(len(text))  # type: ignore[attr-defined]
        elif action == "fork" and len(sessions) < 4:
            sessions.append((session.fork(), [*text]))  # type: ignore[attr-defined]
        elif action == "close":
            session.close()  # type: ignore[attr-defined]
            sessions.remove((session, text))
        elif action == "generate":
            prompts = [tokens(choose.randint(1, 12), seed=choose.randrange(99)) for _ in range(choose.randint(1, 5))]
            for prompt, found in zip(prompts, model.generate(prompts, max_new_tokens=6), strict=True):
                assert found.token_ids == toy.greedy(prompt, 6)
        elif new:
            text += new
            assert_close(session.prefill(new), toy.dense(text)[-1], rtol=0, atol=2e-5)  # type: ignore[attr-defined]
    for session, _ in sessions:
        session.close()  # type: ignore[attr-defined]
    assert parts(model)[1].replays > 20


@pytest.mark.parametrize(
    "chosen",
    [
        {},
        {"temperature": 0.8, "seed": 5},
        {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "seed": 1},
        {"repetition_penalty": 1.3},
        {"logprobs": True},
    ],
)
def test_options_mean_the_same(open_model: Open, toy: ToyModel, chosen: dict[str, object]) -> None:
    prompts = [tokens(n, seed=n) for n in (3, 11, 6)]
    device, plain = open_model(), toy_model(toy)
    found, expected = (model.generate(prompts, max_new_tokens=15, **chosen) for model in (device, plain))
    assert [g.token_ids for g in found] == [g.token_ids for g in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.logprobs == theirs.logprobs or ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-5)


def test_logits_are_fetched_only_for_those_who_need_them(open_model: Open, toy: ToyModel) -> None:
    model = open_model()
    device, seen = parts(model)[0], list[bool]()
    run = device.run

    def watch(*args: object, **kwargs: object) -> object:
        outcome = run(*args, **kwargs)  # type: ignore[arg-type]
        seen.append(outcome.logits is not None)
        return outcome

    device.run = watch  # type: ignore[method-assign,assignment]
    assert model.generate(tokens(5), max_new_tokens=4)[0].token_ids == toy.greedy(tokens(5), 4)
    assert seen == [False] * 4
    model.generate(tokens(5), max_new_tokens=2, temperature=1.0)
    assert seen[4:] == [True] * 2
    jobs = model.generation_jobs(tokens(5), **options(max_new_tokens=6))
    jobs += model.generation_jobs(tokens(7), **options(max_new_tokens=3, logprobs=True))
    model.scheduler.run(jobs)
    assert [job.result().token_ids for job in jobs] == [toy.greedy(tokens(5), 6), toy.greedy(tokens(7), 3)]
    assert seen[6:] == [True] * 3 + [False] * 3


def test_what_is_no_decode_is_run_as_it_comes(open_model: Open, toy: ToyModel) -> None:
    model = open_model(max_batch=3)
    _, accelerator, decode = parts(model)
    model.logits([tokens(8), tokens(4)])
    assert accelerator.replays == 0
    model.generate([tokens(8), tokens(1)], max_new_tokens=1)  # one of the two has a single token
    assert accelerator.replays == 0
    model.generate(tokens(1), max_new_tokens=2)
    assert decode.batches == [(1, 1)] * 2, "a prompt of one token is a decode, too"
    engine = model.scheduler.engine
    sequence = engine.sequence()
    sequence.append(tokens(3))
    for rows, wanted in (("last", 0), ("all", 1), (frozenset({0}), 0)):
        assert engine.secure(sequence, 1)
        (answer,) = engine.run([Feed(sequence=sequence, count=1, rows=rows)])  # type: ignore[arg-type]
        assert len(answer) == wanted, "a row that nobody wants is dropped"
    engine.release(sequence)


def test_more_rows_than_the_program_takes(toy: ToyModel) -> None:
    device = toy_device(toy, most=2)
    model = toy_model(toy, max_batch=4, device=device)
    prompts = [tokens(4, seed=n) for n in range(4)]
    lengths = (4, 9, 9, 14)
    jobs = [model.generation_jobs(p, **options(max_new_tokens=n))[0] for p, n in zip(prompts, lengths, strict=True)]
    model.scheduler.run(jobs)
    assert [j.result().token_ids for j in jobs] == [toy.greedy(p, n) for p, n in zip(prompts, lengths, strict=True)]
    assert {live for _, live in parts(model)[2].batches} == {1}  # three became one at once
    assert not device._buckets.keys() - {1, 2}


def test_tables_are_copied_when_they_change(open_model: Open, toy: ToyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    copied, copy = list[object](), graphs.copy_tables
    monkeypatch.setattr(graphs, "copy_tables", lambda sequence, into: (copied.append(sequence), copy(sequence, into)))
    model = open_model(reserve=0)
    assert model.generate(tokens(2), max_new_tokens=61)[0].token_ids == toy.greedy(tokens(2), 61)
    assert 15 <= len(copied) <= 2 * 16 + 1, "60 steps: 15 blocks of 4 are taken, as many of a sliding group are freed"


def test_few_rows_at_a_time(open_model: Open, toy: ToyModel) -> None:
    model = open_model(most_rows=5)
    rows = [tokens(n, seed=n) for n in (3, 30, 1, 17, 9, 26)]
    found = model.logits(rows)
    for row, logits in zip(rows, found, strict=True):
        assert_close(logits[: len(row)], toy.dense(row), rtol=0, atol=2e-5)
    assert max(toy.rows) == 5
    assert_close(
        model.row_logits(tokens(40), range(40), [0, 38, 7, 39]), toy.dense(tokens(40))[[0, 38, 7, 39]], rtol=0, atol=2e-5
    )
    prompts = [tokens(n, seed=n) for n in (4, 12)]
    assert [g.token_ids for g in model.generate(prompts, max_new_tokens=5)] == [toy.greedy(p, 5) for p in prompts]


def test_split_feeds() -> None:
    choose = random.Random(0)
    for _ in range(300):
        most, feeds = choose.randint(1, 6), []
        for _ in range(choose.randint(1, 5)):
            sequence = TokenSequence(1)
            sequence.append(range(choose.randint(1, 12)))
            sequence.cached = choose.randrange(len(sequence.tokens))
            rows = choose.choice(["last", "all", frozenset(choose.sample(range(12), 4))])
            feeds.append(Feed(sequence=sequence, count=choose.randint(1, sequence.pending), rows=rows))
        expected = [list(feed.wanted()) for feed in feeds]
        counts = [feed.count for feed in feeds]
        steps = split_feeds(feeds, most)
        found: list[list[int]] = [[] for _ in feeds]
        for step in steps:
            assert step and sum(len(feed.wanted()) for _, feed in step) <= most
            assert len({number for number, _ in step}) == len(step), "two pieces of a feed in one step"
            for number, feed in step:
                found[number] += feed.wanted()
                feed.sequence.cached += feed.count
                counts[number] -= feed.count
        assert found == expected and not any(counts)


def test_numbers_that_are_none(open_model: Open, toy: ToyModel) -> None:
    model = open_model()
    model.generate(tokens(5), max_new_tokens=3)
    toy.head[:] = torch.nan
    for length, replayed in ((5, False), (1, True)):
        before = parts(model)[1].replays
        with pytest.raises(InternalError, match=r"not finite \(maximum nan\)"):
            model.generate(tokens(length), max_new_tokens=3)
        assert (parts(model)[1].replays > before) == replayed


def test_an_interrupted_fill_is_done_again(open_model: Open, toy: ToyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever the table of a row was when an interrupt came, the next step's is right."""
    model = open_model()
    stream = model.stream(tokens(9), max_new_tokens=30)
    got = [next(stream).token_id for _ in range(3)]
    copy = graphs.copy_tables

    def half(sequence: TokenSequence, into: object) -> None:
        copy(sequence, into)  # type: ignore[arg-type]
        into[:, 1:] = 0  # type: ignore[index]
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(graphs, "copy_tables", half)
        with pytest.raises(KeyboardInterrupt):
            while True:
                got.append(next(stream).token_id)
    assert got + [chunk.token_id for chunk in stream] == toy.greedy(tokens(9), 30)
    assert parts(model)[1].synchronized


def test_a_step_waits_for_an_interrupted_one(open_model: Open, toy: ToyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU may still read the inputs of the step that nobody waited for, and they are about to be written."""
    model = open_model()
    stream = model.stream(tokens(9), max_new_tokens=12)
    got, (_, accelerator, _) = [next(stream).token_id for _ in range(3)], parts(model)
    fill, send, events = graphs._Bucket.fill, CheckedDevice._send, list[str]()

    def interrupted() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(accelerator, "synchronize", interrupted)
        with pytest.raises(KeyboardInterrupt):
            next(stream)
    monkeypatch.setattr(accelerator, "synchronize", lambda: events.append("wait"))
    monkeypatch.setattr(graphs._Bucket, "fill", lambda *args: (events.append("write"), fill(*args))[1])
    monkeypatch.setattr(CheckedDevice, "_send", lambda *args: (events.append("write"), send(*args))[1])
    assert got + [chunk.token_id for chunk in stream] == toy.greedy(tokens(9), 12)
    assert events == ["wait", *["write", "wait"] * (len(events) // 2)] and len(events) > 9


def test_prepare_runs_the_largest_step(toy: ToyModel) -> None:
    device, seen = toy_device(toy, most=5), list[list[tuple[int, ...]]]()
    engine = toy_engine(toy, device=device, max_batch=5)

    def step(inputs: list[Tensor]) -> Tensor:
        tokens_, positions, starts, kv_lens, slots, tables, rows = inputs[:7]
        seen.append([tuple(t.shape) for t in inputs[:7]])
        assert not kv_lens.any() and (slots == -1).all() and starts[0] == 0 and starts[-1] == len(tokens_)
        assert (starts.diff() > 0).all() and not tokens_.any() and not positions.any() and not tables.any() and not rows.any()
        return torch.zeros(len(rows), VOCAB)

    device.prepare(step, engine.caches, Limits(max_context=96, max_batch=5, max_step_tokens=24))
    assert seen == [[(24,), (24,), (6,), (5,), (2, 24), (2, 5, 1), (24,)]]
    assert device._buckets.keys() == {5} and isinstance(device.accelerator, FakeAccelerator)
    assert device.accelerator.records == 1 and device.accelerator.replays == 0
    device.record_all(engine.caches)
    assert device._buckets.keys() == {1, 2, 4, 5} and device.accelerator.records == 4


def test_a_step_that_finds_no_memory(toy: ToyModel) -> None:
    def step(inputs: list[Tensor]) -> Tensor:
        raise errors[-1]

    short = InternalError("The program step failed: CUDA out of memory.")
    errors: list[Exception] = [short, torch.OutOfMemoryError("CUDA out of memory.")]
    while errors:
        device = toy_device(toy, most=2)
        engine = toy_engine(toy, device=device)
        with pytest.raises(
            UserError, match=r"no room for a step of 24 tokens: .* take 123,456 bytes, and 8,589,934,592 are free"
        ):
            device.prepare(step, engine.caches, engine.limits)
        errors.pop()
    errors = [InternalError("The program step failed: something else")]
    with pytest.raises(InternalError, match="something else"):
        device.prepare(step, engine.caches, engine.limits)


class _Shifted(CheckedDevice):
    """Gives caches that begin 4 bytes too late, or are a part of others."""

    def __init__(self, device: CheckedDevice, kind: str) -> None:
        super().__init__(device.accelerator, decode=device._decode, most=2, table=24)
        self.kind = kind

    def allocate(self, spec: CacheSpec, size: CacheSize) -> list[Tensor]:
        caches = super().allocate(spec, size)
        last = caches[-1]
        if self.kind == "shifted":
            caches[-1] = torch.empty(last.numel() + 1)[1:].view(last.shape)
        elif self.kind == "strided":
            caches[-1] = torch.empty(*last.shape[:-1], last.shape[-1] + 4)[..., :-4]
        else:
            caches[-1] = last[1:]
        return caches


@pytest.mark.parametrize(
    ("kind", "reason"), [("shifted", "not at a multiple of 16"), ("strided", "in one piece"), ("short", "of")]
)
def test_caches_that_a_program_would_copy(toy: ToyModel, kind: str, reason: str) -> None:
    with pytest.raises(InternalError, match=f"Cache 7 .*{reason}"):
        toy_engine(toy, device=_Shifted(toy_device(toy, most=2), kind))


def test_caches_are_looked_at_before_each_recording(open_model: Open) -> None:
    model = open_model()
    model.generate([tokens(3), tokens(4)], max_new_tokens=3)
    engine: Engine = model.scheduler.engine
    cache = engine.caches[2]
    engine.caches[2] = torch.full((cache.numel() + 1,), torch.nan)[1:].view(cache.shape)
    with pytest.raises(InternalError, match="Cache 2 begins at address"):
        model.generate(tokens(3), max_new_tokens=3)


def test_a_recording_that_fails(open_model: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    model = open_model()

    def refuse(work: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(parts(model)[1], "capture", refuse)
    with pytest.raises(InternalError, match=r"cannot be recorded for 1 rows: operation not permitted when stream is capturing$"):
        model.generate(tokens(3), max_new_tokens=3)


def test_check_replay(open_model: Open, toy: ToyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    model = open_model()
    device, accelerator, _ = parts(model)
    with pytest.raises(InternalError, match="no decode"):
        device.check_replay(model.scheduler.engine.caches)
    session = model.session()
    session.prefill(tokens(9))
    session.decode(5)
    caches = model.scheduler.engine.caches
    found = device.check_replay(caches)
    assert (found.bucket, found.rows, found.logits, found.caches, found.finite) == (1, 1, True, True, True)
    assert_close(session.decode(6), toy.dense([*tokens(9), 5, 6])[-1], rtol=0, atol=2e-5)  # it changed nothing

    step = toy.step

    def other(inputs: list[Tensor]) -> Tensor:
        logits = step(inputs)
        if accelerator.phase == "replay":
            logits[0, 3] = torch.nextafter(logits[0, 3], torch.tensor(9.0))
        return logits

    def lost(inputs: list[Tensor]) -> Tensor:
        if accelerator.phase == "replay":
            return step([*inputs[:7], *(cache.clone() for cache in inputs[7:])])
        return step(inputs)

    for wrong, seen in ((other, (False, True)), (lost, (True, False))):
        monkeypatch.setattr(toy, "step", wrong)
        found = device.check_replay(caches)
        assert (found.logits, found.caches) == seen
    monkeypatch.setattr(toy, "step", step)
    device.check_replay(caches)  # and what was lost is there again
    assert_close(session.decode(7), toy.dense([*tokens(9), 5, 6, 7])[-1], rtol=0, atol=2e-5)
    session.close()


def test_same_bits() -> None:
    nan = torch.tensor([torch.nan, 1.0])
    assert same_bits(nan, nan.clone()) and not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert not same_bits(nan, nan.double()) and not same_bits(nan, nan[:1])
    assert same_bits(torch.zeros(2, 3)[:, :2], torch.zeros(2, 2))


def test_sequences_that_begin_alike_share_blocks_under_graphs(open_model: Open, toy: ToyModel) -> None:
    """Tables that change between replays, by blocks that are found or shared, reach the device; all of the cache may be kept."""
    model = open_model(prefix_cache_bytes=None, most_rows=3)
    engine = model.scheduler.engine
    assert engine.prefixes.bound == engine.size.bytes
    system = tokens(26)
    prompts = [[*system, *tokens(1 + 3 * n, seed=n)] for n in range(4)] + [tokens(5)] * 2
    for turn in range(3):
        found = model.generate(prompts, max_new_tokens=14)
        assert [generation.token_ids for generation in found] == [toy.greedy(prompt, 14) for prompt in prompts]
        assert [generation.reused_tokens >= 24 for generation in found] == [turn > 0, True, True, True, False, False]
    with model.session() as session:
        for token in prompts[3]:
            logits = session.decode(token)
        assert_close(logits, toy.dense(prompts[3])[-1], rtol=0, atol=2e-5)
        session.rewind(20)
        assert_close(session.prefill([1, 2]), toy.dense([*system[:20], 1, 2])[-1], rtol=0, atol=2e-5)
