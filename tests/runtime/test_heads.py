"""What models with other heads say of texts: scores, hidden states, and what all of them refuse."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.pipelines.text_classification import TextClassificationPipeline

from oxfuse.runtime.artifact import program_width
from oxfuse.runtime.errors import UserError
from oxfuse.runtime.heads import classification
from oxfuse.runtime.manifest import ProgramSpec, TensorSpec
from oxfuse.runtime.model import CompiledModel

from .head_models import LABELS, LETTERS, TASKS, TEXT, byte_tokenizer, opened, random_values, spec, toy_head, word_tokenizer
from .toy import ToyModel, toy_engine

# Classification


@pytest.mark.parametrize(
    "problem_type", [None, "single_label_classification", "multi_label_classification", "regression"], ids=str
)
def test_scores_are_those_of_transformers_pipeline(problem_type: str | None) -> None:
    for seed in range(20):
        values = random_values(5, seed=seed) * 2
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
        (alone,) = model.classify(text)
        assert (alone.label, alone.labels) == (found.label, found.labels)
        assert alone.scores == pytest.approx(found.scores, abs=1e-5)  # a processor may sum a longer batch in another order
        assert model.classify(torch.tensor(tokenizer.encode(text))) == [alone]
        assert model.classify([tokenizer.encode(text)]) == [alone]
    ids = tokenizer.encode("ab")
    assert model.classify([*ids, 1, 1])[0].scores == pytest.approx(model.classify("ab")[0].scores, abs=1e-5)  # pads are skipped


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
