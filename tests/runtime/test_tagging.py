"""What models that label tokens say of texts: labels, entities, and their places in the caller's text."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from transformers.pipelines.token_classification import TokenClassificationPipeline

from oxfuse.runtime.heads import Encoded, tagging

from .head_models import LABELS, TEXT, byte_tokenizer, opened, random_values, spec, table_head, toy_head, word_tokenizer


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
    spans, expected = (
        [span for text in texts for span in (*text.tokens, *text.entities)]
        for texts in (model.tag([TEXT, "x"]), [found, *model.tag("x")])
    )
    assert [dataclasses.replace(span, score=0) for span in spans] == [dataclasses.replace(span, score=0) for span in expected]
    # A processor may sum a longer batch in another order.
    assert [span.score for span in spans] == pytest.approx([span.score for span in expected], abs=1e-5)


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
    values = random_values(len(offsets), len(names))
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
