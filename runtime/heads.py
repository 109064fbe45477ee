"""What models with other heads say about a text: labels, tags, spans and hidden states, as plain objects.

In: texts (or token ids) and what the step program gives for their tokens. Out: dataclasses with the labels of the manifest and
places in the text: `text[start:end]` counts characters of what the caller gave.
"""

from __future__ import annotations

import dataclasses
import unicodedata
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from oxfuse.runtime.errors import UserError
from oxfuse.runtime.inputs import TokenIds, token_list
from oxfuse.runtime.manifest import ModelSpec
from oxfuse.runtime.tokenizer import TextTokenizer

Text = str | TokenIds
LARGEST_OVERLAP = 128
"""Tokens that two windows of a long context share, so that an answer at the edge of one lies inside the other."""


@dataclass(frozen=True, kw_only=True)
class Classification:
    """What a classifier says about a text.

    `scores` has a number for each label: probabilities that add up to 1, or each label's own (several labels at once), or the
    value itself (regression). `label` is the one with the largest score, `labels` those that apply: that one, or all above 0.5.
    """

    label: str
    score: float
    labels: tuple[str, ...]
    scores: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Span:
    """A stretch of the text with a label and its probability; of several tokens the mean."""

    text: str
    start: int
    end: int
    label: str
    score: float


@dataclass(frozen=True, kw_only=True)
class Tagging:
    """What a tagger says about a text: one span a token, and `entities`, neighbouring tokens of one label together.

    Labels of the forms B-X and I-X make entities X, each B beginning another; other labels are taken as they are; O is none.
    """

    tokens: tuple[Span, ...]
    entities: tuple[Span, ...]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A span of the context that answers the question; `score` is the probability of its beginning times that of its end."""

    text: str
    start: int
    end: int
    score: float
    alternatives: tuple[Answer, ...] = field(default=())


@dataclass(frozen=True, kw_only=True)
class Embedding:
    """The last hidden state of a text's tokens, float32 [T, H], and where each token lies in the text (empty for token ids)."""

    token_ids: list[int]
    offsets: list[tuple[int, int]]
    hidden: Tensor

    @property
    def mean(self) -> Tensor:
        """The mean over the tokens, float32 [H]."""
        return self.hidden.mean(0)

    @property
    def last(self) -> Tensor:
        """The last token's, float32 [H]: the only one that has seen the whole text."""
        return self.hidden[-1]


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """A text as token ids, and where each lies in it: (0, 0) for a token that is not of the text; none for given ids."""

    text: str
    ids: list[int]
    offsets: list[tuple[int, int]]


def encode_texts(texts: Text | Sequence[Text], tokenizer: TextTokenizer | None, vocab_size: int, longest: int) -> list[Encoded]:
    """Return one text, or each of several, as tokens. Raises UserError where one is empty, too long, or needs a tokenizer."""
    many = _split(texts)
    found = []
    for number, text in enumerate(many, 1):
        name = "The text" if len(many) == 1 else f"Text {number} of {len(many)}"
        ids: TokenIds = text
        offsets: list[tuple[int, int]] = []
        if isinstance(text, str):
            if tokenizer is None:
                raise UserError("The artifact has no tokenizer: give token ids, or compile with --tokenizer.")
            ids, places = tokenizer.encode_with_offsets(text)
            offsets = _whole_characters(text, places)
            if not ids:
                raise UserError(f"{name} has no tokens: give one that is not empty.")
        elif isinstance(text, (bytes, bytearray, Mapping)):
            raise UserError(f"{name} is {text!r:.60}: give a text or token ids.")
        tokens = token_list(ids, vocab_size)  # of a text too: a tokenizer may know more tokens than the model
        if len(tokens) > longest:
            raise UserError(
                f"{name} has {len(tokens)} tokens, max_context is {longest}: shorten it, or compile with a larger one."
            )
        found.append(Encoded(text=text if isinstance(text, str) else "", ids=tokens, offsets=offsets))
    return found


def _split(texts: Any) -> list[Any]:
    """Return the texts one by one: a string, or ids (whole numbers, or a tensor of them) is one."""
    if isinstance(texts, str) or (isinstance(texts, Tensor) and texts.dim() == 1):
        return [texts]
    single = isinstance(texts, (bytes, bytearray, Mapping, AbstractSet)) or (isinstance(texts, Tensor) and texts.dim() == 0)
    if single or not isinstance(texts, Iterable):
        raise UserError(f"The text is {texts!r:.60}: give a text or token ids, or a list of them.")
    many = list(texts)
    if not many:
        raise UserError("There are no texts: give at least one.")
    is_number = hasattr(many[0], "__index__") and getattr(many[0], "ndim", 0) == 0  # arrays have the method, whatever their shape
    return [many] if is_number else many


def _whole_characters(text: str, offsets: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return places that take in what a character was composed of.

    Where a tokenizer normalises to NFC, an e and its accent become one character, and the tokenizers library says that it stands
    where the e does.
    """
    if unicodedata.is_normalized("NFC", text):
        return list(offsets)
    starts = sorted({start for start, end in offsets if end > start} | {len(text)})
    found = []
    for start, end in offsets:
        base = end - 1
        limit = starts[bisect_left(starts, end)] if end > start else end
        while end < limit and len(unicodedata.normalize("NFC", text[base : end + 1])) == 1:
            end += 1
        found.append((start, end))
    return found


def problem_type(model: ModelSpec) -> str:
    """Return how a classifier's values are meant: as its configuration says, else a number if there is one label."""
    return model.problem_type or ("regression" if len(model.labels) == 1 else "single_label_classification")


def classification(values: Tensor, model: ModelSpec) -> Classification:
    """Return what values float32 [labels] say."""
    kind = problem_type(model)
    if kind == "regression":
        scores = values
    elif kind == "multi_label_classification":
        scores = values.sigmoid()
    else:
        scores = values.softmax(-1)
    values_of = list(zip(model.labels, scores.tolist(), strict=True))
    label, score = max(values_of, key=lambda item: item[1])
    named: dict[str, float] = {}
    for name, value in values_of:  # two labels of one name are one, as likely as the likelier
        named[name] = max(value, named.get(name, value))
    some = tuple(name for name, value in named.items() if value > 0.5) if kind == "multi_label_classification" else (label,)
    return Classification(label=label, score=score, labels=some, scores=named)


def tagging(encoded: Encoded, values: Tensor, labels: Sequence[str]) -> Tagging:
    """Return what values float32 [T, labels] say. Tokens that are not of the text have none."""
    best = values.softmax(-1).max(-1)
    tokens = [
        Span(text=encoded.text[start:end], start=start, end=end, label=labels[number], score=score)
        for (start, end), number, score in zip(
            encoded.offsets or [(0, 0)] * len(encoded.ids), best.indices.tolist(), best.values.tolist(), strict=True
        )
        if end > start or not encoded.offsets
    ]
    return Tagging(tokens=tuple(tokens), entities=tuple(_entities(encoded.text, tokens)) if encoded.offsets else ())


def _trimmed(text: str, start: int, end: int) -> tuple[int, int]:
    """Return the place without white space at its ends, which a tokenizer may count to a word."""
    part = text[start:end]
    return start + len(part) - len(part.lstrip()), end - (len(part) - len(part.rstrip()))


def _entities(text: str, tokens: Sequence[Span]) -> list[Span]:
    groups: list[tuple[str, list[Span]]] = []
    open_label = None
    for token in tokens:
        mark, _, name = token.label.partition("-")
        begins = name and mark == "B"
        label = name if name and mark in ("B", "I") else token.label
        if token.label == "O":
            open_label = None
            continue
        if label != open_label or begins:
            groups.append((label, []))
        groups[-1][1].append(token)
        open_label = label
    entities = []
    for label, parts in groups:
        start, end = _trimmed(text, parts[0].start, parts[-1].end)
        score = sum(part.score for part in parts) / len(parts)
        if end > start:
            entities.append(Span(text=text[start:end], start=start, end=end, label=label, score=score))
    return entities


@dataclass(frozen=True, kw_only=True)
class Window:
    """Tokens of one run: the question and a part of the context, whose tokens stand at [first, first + len(offsets))."""

    ids: list[int]
    first: int
    offsets: list[tuple[int, int]]


def windows(question: str, context: str, tokenizer: TextTokenizer | None, vocab_size: int, longest: int) -> list[Window]:
    """Return the runs that cover the context, each of at most `longest` tokens. Raises UserError if the question fills that."""
    for name, text in (("question", question), ("context", context)):
        if not isinstance(text, str):
            raise UserError(f"The {name} is {text!r:.60}: give a text.")
    if tokenizer is None:
        raise UserError("The artifact has no tokenizer, which an answer needs: compile with --tokenizer.")
    if not question.strip():
        raise UserError("The question is empty: give the text of a question.")
    found_ids, offsets, of_context = tokenizer.encode_pair(question, context)
    if not any(of_context) or not context.strip():
        raise UserError("The context is empty: give the text in which the answer is to be found.")
    ids = token_list(found_ids, vocab_size)  # a tokenizer may know more tokens than the model
    first, last = of_context.index(True), len(ids) - of_context[::-1].index(True)
    room = longest - first - (len(ids) - last)
    if room < 1:
        raise UserError(
            f"The question takes {longest - room} tokens, which leaves no room for the context in a max_context of {longest}: "
            "shorten it, or compile with a larger one."
        )
    offsets = [(0, 0)] * first + _whole_characters(context, offsets[first:last])
    step = max(1, room - min(LARGEST_OVERLAP, room // 2))
    starts = range(first, last, step) if last - first > room else [first]
    found = []
    for start in starts:
        end = min(start + room, last)
        found.append(Window(ids=ids[:first] + ids[start:end] + ids[last:], first=first, offsets=offsets[start:end]))
        if end == last:
            break
    return found


def answer(context: str, parts: Sequence[Window], values: Sequence[Tensor], *, most_tokens: int, top_k: int) -> Answer:
    """Return the best span of up to `most_tokens` tokens over all windows, values float32 [T, 2], with `top_k` - 1 others.

    A span's score is softmax(start)[i] * softmax(end)[j], i <= j < i + most_tokens, over the tokens of the window's context, as
    in the question-answering pipeline that transformers had. Spans of one text at one place, as of white space before a word,
    count once.
    """
    found: dict[tuple[int, int], float] = {}
    for window, value in zip(parts, values, strict=True):
        count = len(window.offsets)
        begin, end = value[window.first : window.first + count].softmax(0).unbind(-1)
        for place, score in _best_spans(context, window.offsets, begin, end, min(most_tokens, count), top_k).items():
            found[place] = max(found.get(place, 0.0), score)
    ranked = sorted(found, key=lambda place: (-found[place], place))[:top_k]
    if not ranked:
        raise UserError("No span of the context could be chosen: its tokens hold no text. Give another context.")
    first, *others = (Answer(text=context[a:b], start=a, end=b, score=found[a, b]) for a, b in ranked)
    return dataclasses.replace(first, alternatives=tuple(others))


def _best_spans(
    context: str, offsets: Sequence[tuple[int, int]], begin: Tensor, end: Tensor, width: int, top_k: int
) -> dict[tuple[int, int], float]:
    """Return the places of the `top_k` best spans of up to `width` tokens, and their scores; begin, end float32 [T]."""
    count = len(offsets)
    padded = torch.nn.functional.pad(end, (0, width - 1), value=-1.0)
    scores = begin[:, None] * padded.unfold(0, width, 1)  # [T, width]: not [T, T], which a long context has no memory for
    scores = scores.masked_fill(torch.arange(count)[:, None] + torch.arange(width) >= count, -1.0).flatten()
    taken, asked = dict[tuple[int, int], float](), 4 * top_k
    while True:
        best = scores.topk(min(asked, len(scores)))
        for flat, score in zip(best.indices.tolist(), best.values.tolist(), strict=True):
            i, further = divmod(flat, width)
            if score < 0 or len(taken) == top_k:  # < 0: beyond the last token
                return taken
            place = _trimmed(context, offsets[i][0], offsets[i + further][1])
            if place[1] > place[0]:
                taken.setdefault(place, score)
        if len(best.indices) == len(scores):
            return taken
        asked, taken = 4 * asked, {}  # too many of them were white space, or the same text again
