"""Pieces of text: they add up to the whole, and neither split a character nor let a stop string through."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from oxfuse.runtime.generate import Generation
from oxfuse.runtime.model import CompiledModel
from oxfuse.runtime.text import REPLACEMENT, Detokenizer, StopFilter
from oxfuse.runtime.tokenizer import TextTokenizer

from .toy import VOCAB, ToyModel, tokens, toy_engine

SAMPLE = "Grüße, 世界! 👩‍👩‍👧 naïve café — ∑∫ 🏳️‍🌈 plain words and more plain words. "


def byte_level(vocabulary: int = 290) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"initial_alphabet": alphabet, "special_tokens": ["<s>", "</s>"], "show_progress": False}  # it goes to stdout
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, **options)
    tokenizer.train_from_iterator([SAMPLE * 3], trainer)
    return tokenizer


def metaspace() -> Tokenizer:
    """Words with a leading mark that the decoder strips from the first one only: what a piece is depends on what came before."""
    tokenizer = Tokenizer(models.WordLevel({"▁plain": 0, "▁words": 1, "s": 2, "▁": 3}, unk_token="s"))
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def pieces(tokenizer: TextTokenizer, ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer.decode)
    return [*(detokenizer.add(token) for token in ids), detokenizer.finish()]


def test_pieces_add_up_and_split_no_character() -> None:
    tokenizer = TextTokenizer(byte_level())
    ids = tokenizer.encode(SAMPLE * 2)
    found = pieces(tokenizer, ids)
    assert "".join(found) == SAMPLE * 2 == tokenizer.decode(ids)
    assert not any(REPLACEMENT in piece for piece in found) and sum(not piece for piece in found) > 20
    assert pieces(tokenizer, ids[:2])[0]  # plain letters come at once


@pytest.mark.parametrize("make", [byte_level, metaspace])
def test_any_tokens_add_up_to_their_text(make: Callable[[], Tokenizer]) -> None:
    tokenizer, choose = TextTokenizer(make()), random.Random(0)
    for length in (1, 2, 5, 60):
        for _ in range(40):
            ids = [choose.randrange(tokenizer.vocab_size) for _ in range(length)]
            assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids)


def test_special_tokens_give_no_text() -> None:
    tokenizer = TextTokenizer(byte_level())
    (begin, end), word = (tokenizer.token_id(t) for t in ("<s>", "</s>")), tokenizer.encode("plain")
    assert pieces(tokenizer, [begin, *word, end, *word, end])[0] == ""
    assert "".join(pieces(tokenizer, [begin, *word, end, *word, end])) == "plainplain"


def brute_force(text: str, stops: list[str]) -> str:
    for end in range(len(text) + 1):
        if found := [stop for stop in stops if text[:end].endswith(stop)]:
            return text[: end - max(map(len, found))]
    return text


def test_stop_strings_never_pass() -> None:
    choose = random.Random(1)
    for _ in range(2000):
        text = "".join(choose.choice("ab") for _ in range(choose.randint(0, 14)))
        stops = ["".join(choose.choice("ab") for _ in range(choose.randint(1, 5))) for _ in range(choose.randint(0, 3))]
        stop_filter, given, at = StopFilter(stops), "", 0
        while at < len(text):
            size = choose.randint(1, 4)
            given += stop_filter.add(text[at : at + size])
            at += size
            assert brute_force(text, stops).startswith(given)
        given += stop_filter.finish()
        assert given == brute_force(text, stops) and stop_filter.stopped == any(stop in text for stop in stops)


def test_only_a_possible_beginning_is_held_back() -> None:
    stop_filter = StopFilter(["END"])
    assert [stop_filter.add(piece) for piece in ("one E", "ND", "more")] == ["one ", "", ""]
    stop_filter = StopFilter(["END"])
    assert [stop_filter.add(piece) for piece in ("one E", "N", "x", "E")] == ["one ", "", "ENx", ""]
    assert stop_filter.finish() == "E"


@pytest.fixture
def speaking(toy: ToyModel) -> CompiledModel:
    """The toy model, whose 61 tokens now mean single letters of some words with a two-byte character, 30 to 60."""
    return CompiledModel(toy_engine(toy), vocab_size=VOCAB, tokenizer=TextTokenizer(byte_level(290)))


def whole(model: CompiledModel, **options: object) -> Generation:
    return model.generate(tokens(8), max_new_tokens=30, **options)[0]  # type: ignore[arg-type]


def test_stream_equals_generate(speaking: CompiledModel) -> None:
    expected = whole(speaking, temperature=2.0, seed=4)
    assert speaking.tokenizer and expected.text == speaking.tokenizer.decode(expected.token_ids) and len(expected.text) > 15
    chunks = list(speaking.stream(tokens(8), max_new_tokens=30, temperature=2.0, seed=4))
    assert [chunk.token_id for chunk in chunks] == expected.token_ids
    assert "".join(chunk.text for chunk in chunks) == expected.text

    async def collect() -> list[int]:
        return [c.token_id async for c in speaking.astream(tokens(8), max_new_tokens=30, temperature=2.0, seed=4)]

    assert asyncio.run(collect()) == expected.token_ids


def test_stop_string_and_stop_token(speaking: CompiledModel) -> None:
    full = whole(speaking, temperature=2.0, seed=4)
    stop = full.text[6:9]
    cut = whole(speaking, temperature=2.0, seed=4, stop=["never there", stop])
    assert cut.text == full.text[: full.text.index(stop)] and cut.finish_reason == "stop"
    assert cut.token_ids == full.token_ids[: len(cut.token_ids)] and len(cut.token_ids) < 30
    chunks = speaking.stream(tokens(8), max_new_tokens=30, temperature=2.0, seed=4, stop=stop)
    assert "".join(chunk.text for chunk in chunks) == cut.text
    token = full.token_ids[12]
    ended = whole(speaking, temperature=2.0, seed=4, stop_token_ids=[token])
    assert ended.token_ids == full.token_ids[: full.token_ids.index(token) + 1] and ended.finish_reason == "stop"
    assert speaking.tokenizer and ended.text == speaking.tokenizer.decode(ended.token_ids[:-1])
    assert speaking.scheduler.engine.used_blocks == 0


def test_leaving_a_stream_gives_the_blocks_back(speaking: CompiledModel) -> None:
    engine = speaking.scheduler.engine
    for leave in ("close", "drop", "break"):
        stream = speaking.stream(tokens(8), max_new_tokens=30)
        assert engine.used_blocks == 0  # nothing runs before the first chunk is wanted
        next(stream)
        assert engine.used_blocks
        if leave == "close":
            stream.close()  # type: ignore[attr-defined]
            assert list(stream) == []
        elif leave == "break":
            for _ in stream:
                break
        del stream
        assert engine.used_blocks == 0 and not speaking.scheduler.running

    async def two() -> None:
        chunks = speaking.astream(tokens(8), max_new_tokens=30)
        await anext(chunks)
        await anext(chunks)
        await chunks.aclose()  # type: ignore[attr-defined]

    asyncio.run(two())
    assert engine.used_blocks == 0


def test_a_cancelled_task_gives_the_blocks_back(speaking: CompiledModel) -> None:
    async def cancel() -> None:
        async def read() -> None:
            async for _ in speaking.astream(tokens(8), max_new_tokens=80):
                pass

        task = asyncio.create_task(read())
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel())
    assert speaking.scheduler.engine.used_blocks == 0


def test_the_event_loop_goes_on(speaking: CompiledModel) -> None:
    async def both() -> int:
        ticks, running = 0, True

        async def clock() -> None:
            nonlocal ticks
            while running:
                ticks += 1
                await asyncio.sleep(0)

        ticking = asyncio.create_task(clock())
        async for _ in speaking.astream(tokens(8), max_new_tokens=20):
            pass
        running = False
        await ticking
        return ticks

    assert asyncio.run(both()) > 20
