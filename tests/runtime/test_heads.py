"""What models with other heads say of texts: scores, labels, places in the caller's text, and what is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.pipelines.text_classification import TextClassificationPipeline
from transformers.pipelines.token_classification import TokenClassificationPipeline

from oxfuse.runtime.artifact import program_width
from oxfuse.runtime.errors import UserError
from oxfuse.runtime.heads import Encoded, Window, answer, classification, tagging, windows
from oxfuse.runtime.manifest import ProgramSpec, TensorSpec
from oxfuse.runtime.model import CompiledModel

from .head_models import LABELS, LETTERS, TASKS, byte_tokenizer, spec, table_head, toy_head, word_tokenizer
from .toy import ToyModel, toy_engine

TEXT = "Ada  Löwe 👩‍👧 in 東京."
WIDTHS = {"text-classification": 5, "token-classification": 5, "question-answering": 2, "feature-extraction": 7}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def opened(task: str, **options: Any) -> CompiledModel:
    width = WIDTHS.get(task, 11)
    labels = LABELS if "classification" in task else ()
    return toy_head(spec(task, labels, pad=options.pop("pad", None)), width, **{"tokenizer": byte_tokenizer(), **options})[0]


# Classification


@pytest.mark.parametrize(
    "problem_type", [None, "single_label_classification", "multi_label_classification", "regression"], ids=str
)
def test_scores_are_those_of_transformers_pipeline(problem_type: str | None) -> None:
    for seed in range(20):
        values = random(5, seed=seed) * 2
        found = classification(values, spec("text-classification", LABELS, problem_type=problem_type))
        config = SimpleNamespace(problem_type=problem_type, num_labels=5, id2label=dict(enumerate(LABELS)))
        pipeline = object.__new__(TextClassificationPipeline)
        pipeline.model = SimpleNamespace(config=config)
        expected = pipeline.postprocess({"logits": values[None]}, top_k=None, _legacy=False)
        assert found.scores == pytest.approx({each["label"]: each["score"] for each in expected}, rel=1e-6)
        assert (found.label, found.score) == (expected[0]["label"], pytest.approx(expected[0]["score"], rel=1e-6))
        if problem_type == "multi_label_classification":
            assert found.labels == tuple(label for label, value in zip(LABELS, values.tolist(), strict=True) if value > 0)
        else:
            assert found.labels == (found.label,)
        if problem_type in (None, "single_label_classification"):
            assert sum(found.scores.values()) == pytest.approx(1)


def test_one_label_is_a_number() -> None:
    assert classification(torch.tensor([7.5]), spec("text-classification", ("stars",))).scores == {"stars": 7.5}


def test_several_labels_or_none_apply() -> None:
    model = spec("text-classification", ("a", "b", "c"), problem_type="multi_label_classification")
    assert classification(torch.tensor([1.0, -1.0, 0.1]), model).labels == ("a", "c")
    none = classification(torch.tensor([-3.0, -1.0, -2.0]), model)
    assert none.labels == () and none.label == "b"


def test_labels_of_one_name_do_not_hide_each_other() -> None:
    found = classification(torch.tensor([2.0, 1.0, 0.0]), spec("text-classification", ("a", "b", "a")))
    first, second, _ = torch.tensor([2.0, 1.0, 0.0]).softmax(0).tolist()
    assert (found.label, found.score, found.scores) == ("a", first, {"a": first, "b": second})


def test_each_text_is_classified_by_its_rightmost_token() -> None:
    tokenizer = byte_tokenizer()
    model, dense = toy_head(spec("text-classification", LABELS, pad=1), 5, tokenizer)
    texts = ["short", TEXT, "a", "x" * 60]
    for text, found in zip(texts, model.classify(texts), strict=True):
        expected = dense(tokenizer.encode(text))[-1].softmax(-1)
        assert list(found.scores.values()) == pytest.approx(expected.tolist(), abs=1e-5)
        assert model.classify(text) == [found] == model.classify(torch.tensor(tokenizer.encode(text)))
        assert model.classify([tokenizer.encode(text)])[0].scores == pytest.approx(found.scores)
    ids = tokenizer.encode("ab")
    assert model.classify([*ids, 1, 1])[0].scores == pytest.approx(model.classify("ab")[0].scores)  # pads are skipped


# Tagging


def test_tokens_and_places_are_of_the_callers_text() -> None:
    tokenizer = byte_tokenizer()
    model, dense = toy_head(spec("token-classification", LABELS), 5, tokenizer)
    (found,) = model.tag(TEXT)
    values = dense(tokenizer.encode(TEXT))[1:].softmax(-1)  # <s> is no text
    assert len(found.tokens) == len(TEXT.encode()) == len(values)
    at = [i for i, char in enumerate(TEXT) for _ in char.encode()]  # a byte stands where its character does
    assert [(token.start, token.end, token.text) for token in found.tokens] == [(i, i + 1, TEXT[i]) for i in at]
    assert [token.label for token in found.tokens] == [LABELS[n] for n in values.argmax(-1).tolist()]
    assert [token.score for token in found.tokens] == pytest.approx(values.amax(-1).tolist(), abs=1e-5)
    assert found.entities and all(span.text == TEXT[span.start : span.end] != "" for span in found.entities)
    assert model.tag([TEXT, "x"]) == [found, *model.tag("x")]


def test_a_text_in_another_unicode_form_keeps_its_own_places() -> None:
    text = "e\u0301 a\u0308b \u1100\u1161\u11a8 q\u0307\u0323 a\u0302\u0323 x"  # NFC makes fewer characters of them
    tokenizer = byte_tokenizer(nfc=True)
    model = table_head(spec("token-classification", ("O", "X")), {tokenizer.encode("x")[1]: (0.0, 9.0)}, 2, tokenizer)
    (found,) = model.tag(text)
    assert [(span.start, span.end, span.text) for span in found.entities] == [(len(text) - 1, len(text), "x")]
    assert len(found.tokens) < len(text.encode()) and all(span.text == text[span.start : span.end] for span in found.tokens)
    parts = list(dict.fromkeys((span.start, span.text) for span in found.tokens))
    assert "".join(part for _, part in parts) == text
    assert {"e\u0301", "a\u0308", "\u1100\u1161\u11a8", "a\u0302\u0323"} <= {part for _, part in parts}
    reader = table_head(spec("question-answering"), {tokenizer.encode("é")[-1]: (9.0, 9.0)}, 2, tokenizer)
    assert reader.answer("e\u0301?", text).text == "e\u0301"
    words = word_tokenizer("? cafe\u0301s ")
    assert opened("feature-extraction", tokenizer=words).embed("cafe\u0301s ?")[0].offsets == [(0, 6), (7, 8)]


def words(labels: str, text: str = "a bb ccc dddd eeeee ffffff") -> tuple[Encoded, Tensor, tuple[str, ...]]:
    """A text whose words are tokens, each with the space before it, and values by which they have these labels."""
    names, offsets, at = tuple(dict.fromkeys(labels.split())), [], 0
    for word in text.split():
        offsets.append((max(0, at - 1), at + len(word)))
        at += len(word) + 1
    values = random(len(offsets), len(names))
    for row, label in zip(values, labels.split(), strict=True):
        row[names.index(label)] += 5
    return Encoded(text=text, ids=[0] * len(offsets), offsets=offsets), values, names


@pytest.mark.parametrize(
    ("labels", "entities"),
    [
        ("O B-X I-X O B-Y I-Y", ["X:bb ccc", "Y:eeeee ffffff"]),
        ("B-X B-X I-X I-X O O", ["X:a", "X:bb ccc dddd"]),
        ("I-X I-X I-Y I-Y I-X O", ["X:a bb", "Y:ccc dddd", "X:eeeee"]),
        ("B-X I-Y B-Y O I-Y O", ["X:a", "Y:bb", "Y:ccc", "Y:eeeee"]),
        ("X X O Y Y X", ["X:a bb", "Y:dddd eeeee", "X:ffffff"]),
        ("B-A-B I-A-B O B-A I-A I-A-B", ["A-B:a bb", "A:dddd eeeee", "A-B:ffffff"]),
        ("A-C A-C D-C O D-C O", ["A-C:a bb", "D-C:ccc", "D-C:eeeee"]),
        ("O O O O O O", []),
        ("B-X B-X B-X B-X B-X B-X", [f"X:{word}" for word in ("a", "bb", "ccc", "dddd", "eeeee", "ffffff")]),
    ],
)
def test_neighbours_of_one_label_are_an_entity(labels: str, entities: list[str]) -> None:
    encoded, values, names = words(labels)
    found = tagging(encoded, values, names)
    assert [token.label for token in found.tokens] == labels.split()
    assert [f"{span.label}:{span.text}" for span in found.entities] == entities
    pipeline = object.__new__(TokenClassificationPipeline)
    pipeline.tokenizer = SimpleNamespace(convert_tokens_to_string="".join)
    each = [{"entity": t.label, "score": t.score, "word": t.text, "start": t.start, "end": t.end} for t in found.tokens]
    theirs = [group for group in pipeline.group_entities(each) if group["entity_group"] != "O"]
    assert [span.score for span in found.entities] == pytest.approx([group["score"] for group in theirs])
    assert [span.end for span in found.entities] == [group["end"] for group in theirs]
    assert [span.label.rpartition("-")[2] for span in found.entities] == [
        group["entity_group"].rpartition("-")[2] for group in theirs
    ]


def test_an_entity_has_no_white_space_at_its_ends() -> None:
    encoded, values, names = words("O B-X I-X O B-Y I-Y")
    (first, _) = tagging(encoded, values, names).entities
    assert (first.start, first.end) == (2, 8) and encoded.offsets[1] == (1, 4)
    blank = Encoded(text="a  \n b", ids=[0, 0, 0], offsets=[(0, 1), (1, 4), (4, 6)])
    found = tagging(blank, torch.eye(2)[[0, 1, 0]] * 9, ("O", "X"))
    assert len(found.tokens) == 3 and found.entities == ()


def test_token_ids_have_tags_without_places() -> None:
    model = opened("token-classification")
    ids = byte_tokenizer().encode("Ada")
    (of_ids,), (of_text,) = model.tag(ids), model.tag("Ada")
    assert [token.label for token in of_ids.tokens[1:]] == [token.label for token in of_text.tokens]
    assert len(of_ids.tokens) == len(ids) and of_ids.entities == ()
    assert all((token.text, token.start, token.end) == ("", 0, 0) for token in of_ids.tokens)


# Answers


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
    value = random(count, 2)
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


# Hidden states


def test_embeddings_are_the_hidden_states() -> None:
    tokenizer = byte_tokenizer()
    model, dense = toy_head(spec("feature-extraction"), 7, tokenizer)
    texts = [TEXT, "b"]
    for text, found in zip(texts, model.embed(texts), strict=True):
        ids, offsets = tokenizer.encode_with_offsets(text)
        torch.testing.assert_close(found.hidden, dense(ids), atol=1e-5, rtol=1e-5)
        assert (found.token_ids, found.offsets) == (ids, offsets)
        torch.testing.assert_close(found.mean, dense(ids).mean(0), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found.last, dense(ids)[-1], atol=1e-5, rtol=1e-5)
    (of_ids,) = model.embed([3, 4, 5])
    assert of_ids.hidden.shape == (3, 7) and of_ids.offsets == [] and of_ids.token_ids == [3, 4, 5]


# What is refused


@pytest.mark.parametrize("method", ["classify", "tag", "embed"])
@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ("", "The text has no tokens"),
        (["a", ""], "Text 2 of 2 has no tokens"),
        ("x" * 97, "The text has 97 tokens, max_context is 96"),
        (["a", [5] * 97], "Text 2 of 2 has 97 tokens"),
        ([], "no texts"),
        ([[]], "no token ids"),
        ([[LETTERS]], f"hold {LETTERS} at index 0"),
        ([1, -1], "hold -1 at index 1"),
        ([0.5], "0.5"),
        (torch.tensor([0.5]), "float32"),
        (torch.tensor(3), "The text is tensor"),
        (None, "The text is None"),
        (3, "The text is 3"),
        (b"abc", "The text is b'abc'"),
        ([b"abc"], "The text is b'abc'"),
        ({"text": "a"}, "The text is {'text'"),
        ([{"role": "user"}], "The text is {'role'"),
        ([None], "None"),
        ("a\udcff", "UTF-8"),
    ],
    ids=str,
)
def test_texts_that_do_not_fit(method: str, texts: Any, message: str) -> None:
    task = next(task for task, name in TASKS.items() if name == method)
    with pytest.raises(UserError) as raised:
        getattr(opened(task, tokenizer=byte_tokenizer(special=False)), method)(texts)
    assert message in str(raised.value)


def test_one_or_several_in_any_form() -> None:
    model = opened("text-classification", pad=1)
    for many in (["a"], ("a",), [[5, 6]], torch.tensor([[5, 6]]), [torch.tensor([5, 6])], [5, 6], torch.tensor([5, 6])):
        assert len(model.classify(many)) == 1
    for many in (["a", [5, 6]], torch.tensor([[5, 6], [7, 8]]), iter(["a", "b"]), ("a", "b")):
        assert len(model.classify(many)) == 2
    numpy = torch.tensor([5, 6]).numpy()
    assert model.classify(numpy) == model.classify([5, 6]) == model.classify(list(numpy))


@pytest.mark.parametrize("task", TASKS)
def test_every_method_of_another_task_says_what_to_compile_for(task: str) -> None:
    model = opened(task)
    for other, method in TASKS.items():
        arguments = ("Who?", "Ada.") if method == "answer" else ("abc",)
        if other == task:
            getattr(model, method)(*arguments)
            continue
        with pytest.raises(UserError, match=f"is for {task}, which cannot {method}: compile with --task {other}"):
            getattr(model, method)(*arguments)


def test_a_model_without_artifact_has_no_head() -> None:
    model = CompiledModel(toy_engine(ToyModel()), vocab_size=61)
    with pytest.raises(UserError, match="not loaded from an artifact"):
        model.classify("a")


@pytest.mark.parametrize("method", ["classify", "tag", "embed", "answer"])
def test_without_a_tokenizer_only_ids_are_taken(method: str) -> None:
    task = next(task for task, name in TASKS.items() if name == method)
    model = opened(task, tokenizer=None)
    with pytest.raises(UserError, match=r"has no tokenizer.*--tokenizer"):
        getattr(model, method)(*(("Who?", "Ada.") if method == "answer" else ("abc",)))
    if method != "answer":
        assert len(getattr(model, method)([[3, 4], [5]])) == 2


@pytest.mark.parametrize("method", ["classify", "tag", "embed", "answer"])
def test_a_tokenizer_with_more_tokens_than_the_model(method: str) -> None:
    """Its ids would be read beyond the embedding."""
    task = next(task for task, name in TASKS.items() if name == method)
    tokenizer = word_tokenizer("? " + " ".join(f"w{i}" for i in range(LETTERS + 5)))
    model = opened(task, tokenizer=tokenizer)
    for inside in (True, False):
        text = "w5" if inside else f"w5 w{LETTERS + 2}"
        arguments = ("w6", text) if method == "answer" else (text,)
        if inside:
            getattr(model, method)(*arguments)
        else:
            with pytest.raises(UserError, match="outside the vocabulary"):
                getattr(model, method)(*arguments)


# Logits of a classifier of sequences

PAD = 1


@pytest.fixture(scope="module")
def pooled() -> tuple[CompiledModel, Any]:
    return toy_head(spec("text-classification", LABELS, pad=PAD), 5)


def test_the_rightmost_token_that_is_not_padding_is_pooled(pooled: tuple[CompiledModel, Any]) -> None:
    model, dense = pooled
    row = [9, 8, PAD, 7, 30]
    at = model.logits([row, row[:1], [5] * 40])
    expected = torch.stack([dense(row)[4], dense(row[:1])[0], dense([5] * 40)[39]])
    torch.testing.assert_close(at, expected, atol=1e-5, rtol=1e-5)
    assert at.shape == (3, 5)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side(pooled: tuple[CompiledModel, Any], side: str, masked: bool) -> None:
    model, dense = pooled
    row, pads = [9, 8, 7, 30], [PAD] * 3
    ids = pads + row if side == "left" else row + pads
    mask = [[int(token != PAD) for token in ids]] if masked else None
    if side == "right":
        expected = dense(row)[3]
    elif masked:  # positions count the padding
        expected = dense(row, list(range(3, 7)))[3]
    else:
        expected = dense(ids)[6]
    torch.testing.assert_close(model.logits([ids], attention_mask=mask)[0], expected, atol=1e-5, rtol=1e-5)
    tensor = model.logits(torch.tensor([ids]), attention_mask=None if mask is None else torch.tensor(mask))
    torch.testing.assert_close(tensor[0], expected, atol=1e-5, rtol=1e-5)


def test_a_row_of_pads_pools_its_first_token(pooled: tuple[CompiledModel, Any]) -> None:
    model, dense = pooled
    torch.testing.assert_close(model.logits([[PAD] * 4])[0], dense([PAD])[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("mask", "index"), [([1, 1, 0, 0], 2), ([0, 0, 0, 1], 2)])
def test_a_mask_that_hides_the_pooled_token(pooled: tuple[CompiledModel, Any], mask: list[int], index: int) -> None:
    with pytest.raises(UserError, match=rf"Row 1: .*\(1\), at index {index}, which attention_mask hides.*, or 1 where"):
        pooled[0].logits([[5, 6, 7, 8], [5, 6, 7, PAD]], attention_mask=[[1] * 4, mask])


def test_without_a_padding_token_the_last_is_pooled() -> None:
    model, dense = toy_head(spec("text-classification", LABELS), 5)
    got = model.logits([[5, 6, PAD], [7]])
    torch.testing.assert_close(got, torch.stack([dense([5, 6, PAD])[2], dense([7])[0]]), atol=1e-5, rtol=1e-5)
    with pytest.raises(UserError, match=r"Row 0: the model has no padding token.*at index 2.*without padding"):
        model.logits([[5, 6, 7]], attention_mask=[[1, 1, 0]])


# The program's outputs


@pytest.mark.parametrize(
    ("task", "labels", "shapes", "width"),
    [
        ("text-generation", (), [("R", LETTERS)], LETTERS),
        ("text-classification", LABELS, [("R", 5)], 5),
        ("question-answering", (), [("R", 2)], 2),
        ("feature-extraction", (), [("R", 64)], 64),
        ("text-generation", (), [("R", LETTERS - 1)], None),
        ("text-classification", LABELS, [("R", 4)], None),
        ("token-classification", (), [("R", 4)], None),
        ("question-answering", (), [("R", 3)], None),
        ("feature-extraction", (), [("R", "H")], None),
        ("feature-extraction", (), [("R", 0)], None),
        ("feature-extraction", (), [("R", 4, 4)], None),
        ("feature-extraction", (), [("R", 4), ("R", 4)], None),
        ("feature-extraction", (), [], None),
    ],
)
def test_outputs_that_do_not_fit_the_task(
    task: str, labels: tuple[str, ...], shapes: list[tuple[str | int, ...]], width: int | None
) -> None:
    outputs = tuple(TensorSpec(name="values", dtype="float32", shape=shape) for shape in shapes)
    empty: dict[str, Any] = {"inputs": (), "dims": {}, "constants": {}, "files": {}}
    program = ProgramSpec(name="step", target="cpu", kind="aoti", path="p", library="l", outputs=outputs, **empty)
    if width is not None:
        assert program_width(program, spec(task, labels)) == width
        return
    with pytest.raises(UserError, match="the manifest is damaged"):
        program_width(program, spec(task, labels))


def test_blocks_return_after_every_method() -> None:
    for task, method in TASKS.items():
        if method != "generate":
            model = opened(task)
            getattr(model, method)(*(("Who?", "Ada. " * 40) if method == "answer" else (["abc", "de"],)))
            assert model.scheduler.engine.used_blocks == 0 and not model.scheduler.running
