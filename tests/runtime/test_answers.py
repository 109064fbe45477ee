"""What models that answer questions say of a context: spans, their scores, windows over long contexts, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from oxfuse.runtime.errors import UserError
from oxfuse.runtime.heads import Window, answer, windows

from .head_models import LETTERS, TEXT, byte_tokenizer, opened, random_values, spec, table_head, toy_head


def best_spans(context: str, offsets: list[tuple[int, int]], values: Tensor, most: int) -> dict[tuple[int, int], float]:
    """Every place that a span of up to `most` tokens has, and the best score of one that has it."""
    begin, end = (column.softmax(0) for column in values.unbind(-1))
    found: dict[tuple[int, int], float] = {}
    for i in range(len(offsets)):
        for j in range(i, min(i + most, len(offsets))):
            a, b = offsets[i][0], offsets[j][1]
            while a < b and context[a].isspace():
                a += 1
            while b > a and context[b - 1].isspace():
                b -= 1
            if b > a:
                found[a, b] = max(found.get((a, b), 0.0), float(begin[i] * end[j]))
    return found


@pytest.mark.parametrize("most", [1, 2, 7, 1000])
@pytest.mark.parametrize("context", [TEXT, "a", "   \n\n \t  x  \n", "a b  c d"])
def test_the_best_spans_are_the_best_of_all(context: str, most: int) -> None:
    tokenizer = byte_tokenizer()
    model, dense = toy_head(spec("question-answering"), 2, tokenizer)
    ids, offsets, mine = tokenizer.encode_pair("Who?", context)
    first = mine.index(True)
    places = offsets[first : first + sum(mine)]
    spans = best_spans(context, places, dense(ids)[first : first + sum(mine)], most)
    ranked = sorted(spans, key=lambda place: -spans[place])
    found = model.answer("Who?", context, max_answer_tokens=most, top_k=6)
    each = (found, *found.alternatives)
    assert [span.score for span in each] == pytest.approx([spans[place] for place in ranked[:6]], rel=1e-4)
    assert all(spans[span.start, span.end] == pytest.approx(span.score, rel=1e-4) for span in each)
    assert len({(span.start, span.end) for span in each}) == len(each) == min(6, len(spans))
    assert all(span.text == context[span.start : span.end] == span.text.strip() for span in each)
    assert not any(span.alternatives for span in found.alternatives)
    alone = model.answer("Who?", context, max_answer_tokens=most)
    assert (alone.start, alone.end, alone.alternatives) == (found.start, found.end, ())


def test_a_span_longer_than_allowed_is_not_chosen() -> None:
    """Start and end that are certain of themselves, four tokens apart."""
    value = torch.zeros(6, 2)
    value[0, 0] = value[3, 1] = 50.0
    window = Window(ids=[0] * 6, first=0, offsets=[(i, i + 1) for i in range(6)])
    for most, expected in ((3, None), (4, "abcd"), (5, "abcd"), (100, "abcd")):
        found = answer("abcdef", [window], [value], most_tokens=most, top_k=1)
        assert (found.text == expected) if expected else (len(found.text) <= 3 and found.score < 0.5)


def test_an_end_before_its_start_is_not_chosen() -> None:
    value = torch.zeros(6, 2)
    value[4, 0] = value[1, 1] = 50.0
    window = Window(ids=[0] * 6, first=0, offsets=[(i, i + 1) for i in range(6)])
    found = answer("abcdef", [window], [value], most_tokens=6, top_k=30)
    assert all(span.start < span.end for span in (found, *found.alternatives)) and len(found.alternatives) == 20


def test_alternatives_are_other_places() -> None:
    """Twenty blanks before a word: each is another first token of the same text, and they score best."""
    value = torch.zeros(23, 2)
    value[:21, 0] = value[20, 1] = 9.0
    context = " " * 20 + "abc"
    window = Window(ids=[0] * 23, first=0, offsets=[(i, i + 1) for i in range(23)])
    found = answer(context, [window], [value], most_tokens=30, top_k=3)
    assert found.text == "a" and [span.text for span in found.alternatives] == ["ab", "abc"]


def test_a_long_context_needs_no_square_of_memory() -> None:
    count = 60_000  # squared it would take 14 GB
    value = random_values(count, 2)
    value[41_000, 0] = value[41_002, 1] = 60.0
    window = Window(ids=[0] * count, first=0, offsets=[(i, i + 1) for i in range(count)])
    assert answer("x" * count, [window], [value], most_tokens=30, top_k=3).start == 41_000


@pytest.mark.parametrize(("longest", "length"), [(40, 200), (24, 61), (300, 900), (20, 12)])
def test_windows_cover_the_context(longest: int, length: int) -> None:
    tokenizer, context = byte_tokenizer(), "".join(chr(97 + i % 26) for i in range(length))
    question = tokenizer.encode("Who?")
    parts = windows("Who?", context, tokenizer, LETTERS, longest)
    covered: list[tuple[int, int]] = []
    for part in parts:
        assert len(part.ids) <= longest and part.ids[: len(question)] == question and part.ids[-1] == 1
        assert part.ids[part.first : part.first + len(part.offsets)] == [
            tokenizer.encode(context[a:b])[1] for a, b in part.offsets
        ]
        if covered:
            shared = covered[-1][1] - part.offsets[0][0]
            assert shared == min(128, (longest - part.first - 1) // 2)
        covered += part.offsets
    assert {a for a, _ in covered} == {*range(length)}
    assert (len(parts) > 1) == (length + 7 > longest)


def test_an_answer_is_found_wherever_it_stands() -> None:
    """Two tokens that the model is certain of, at every place of a context of many windows, their edges too."""
    tokenizer = byte_tokenizer()
    start, end = tokenizer.encode("<>")[1:]
    values = {start: (30.0, 0.0), end: (0.0, 30.0)}
    model = table_head(spec("question-answering"), values, 2, tokenizer, max_context=32)
    assert len(windows("Who?", "." * 100, tokenizer, LETTERS, 32)) > 5
    for place in range(99):
        found = model.answer("Who?", "." * place + "<>" + "." * (98 - place))
        assert (found.start, found.end, found.text) == (place, place + 2, "<>") and found.score > 0.99


def test_windows_that_show_one_place_give_it_once() -> None:
    tokenizer = byte_tokenizer()
    model, dense = toy_head(spec("question-answering"), 2, tokenizer, max_context=30)
    context = "Ada was here, and so was the other one."
    found = model.answer("Who?", context, top_k=12, max_answer_tokens=4)
    spans: dict[tuple[int, int], float] = {}
    for part in windows("Who?", context, tokenizer, LETTERS, 30):
        values = dense(part.ids)[part.first : part.first + len(part.offsets)]
        for place, score in best_spans(context, part.offsets, values, 4).items():
            spans[place] = max(score, spans.get(place, 0.0))
    each = (found, *found.alternatives)
    assert [span.score for span in each] == pytest.approx(sorted(spans.values(), reverse=True)[:12], rel=1e-4)
    assert len({(span.start, span.end) for span in each}) == 12


def test_the_surest_of_the_windows_counts() -> None:
    """Both show the place, and one is sure of it."""
    window = Window(ids=[0] * 4, first=0, offsets=[(i, i + 1) for i in range(4)])
    sure, unsure = torch.zeros(4, 2), torch.zeros(4, 2)
    sure[1] = 20.0
    for values in ([sure, unsure], [unsure, sure]):
        found = answer("abcd", [window, window], values, most_tokens=4, top_k=10)
        assert found.text == "b" and found.score == pytest.approx(1, abs=1e-4)
        assert all(span.score == pytest.approx(1 / 16) for span in found.alternatives) and len(found.alternatives) == 9


@pytest.mark.parametrize(
    ("question", "context", "message"),
    [
        ("Who?", "", "context is empty"),
        ("Who?", " \n ", "context is empty"),
        ("", "Ada.", "question is empty"),
        (" \t", "Ada.", "question is empty"),
        ("Who? " * 19, "Ada.", "question takes 98 tokens, which leaves no room for the context in a max_context of 96"),
        (3, "Ada.", "question is 3"),
        ("Who?", ["Ada."], "context is .'Ada.'."),
        ("Who?", "a\udcff", "UTF-8"),
    ],
)
def test_questions_and_contexts_that_do_not_fit(question: Any, context: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        opened("question-answering").answer(question, context)


def test_a_question_that_just_fits_leaves_room_for_one_token() -> None:
    model = opened("question-answering", max_context=9)
    assert len(model.answer("12345", "abc").text) == 1
    with pytest.raises(UserError, match="no room"):
        model.answer("123456", "abc")


def test_a_context_of_tokens_without_text_is_refused() -> None:
    window = Window(ids=[0], first=0, offsets=[(0, 0)])
    with pytest.raises(UserError, match="hold no text"):
        answer("x", [window], [torch.zeros(1, 2)], most_tokens=3, top_k=1)


@pytest.mark.parametrize("options", [{"top_k": 0}, {"top_k": True}, {"max_answer_tokens": 0}, {"max_answer_tokens": 2.0}])
def test_options_of_an_answer(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(options))):
        opened("question-answering").answer("Who?", "Ada.", **options)
