"""What models with other heads say about a text: labels, tags, spans and hidden states, as plain objects.

In: texts (or token ids) and what the step program gives for their tokens. Out: dataclasses with the labels of the manifest and
places in the text: `text[start:end]` counts characters of what the caller gave.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

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
    single = isinstance(texts, str | Tensor) or (len(texts) > 0 and all(isinstance(t, int) for t in texts))
    found = []
    for number, text in enumerate([texts] if single else texts):
        if isinstance(text, str):
            if tokenizer is None:
                raise UserError("The artifact has no tokenizer: give token ids, or compile with --tokenizer.")
            ids, offsets = tokenizer.encode_with_offsets(text)
            entry = Encoded(text=text, ids=ids, offsets=offsets)
        else:
            entry = Encoded(text="", ids=token_list(text, vocab_size), offsets=[])
        if not 0 < len(entry.ids) <= longest:
            raise UserError(f"Text {number} has {len(entry.ids)} tokens; give 1 to {longest}, the artifact's max_context.")
        found.append(entry)
    if not found:
        raise UserError("There are no texts: give at least one.")
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
    named = dict(zip(model.labels, scores.tolist(), strict=True))
    label = max(named, key=named.__getitem__)
    some = tuple(name for name, score in named.items() if score > 0.5) if kind == "multi_label_classification" else (label,)
    return Classification(label=label, score=named[label], labels=some, scores=named)


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


def windows(question: str, context: str, tokenizer: TextTokenizer | None, longest: int) -> list[Window]:
    """Return the runs that cover the context, each of at most `longest` tokens. Raises UserError if the question fills that."""
    if tokenizer is None:
        raise UserError("The artifact has no tokenizer, which an answer needs: compile with --tokenizer.")
    ids, offsets, of_context = tokenizer.encode_pair(question, context)
    if not any(of_context):
        raise UserError("The context has no tokens: give the text in which the answer is to be found.")
    first, last = of_context.index(True), len(ids) - of_context[::-1].index(True)
    room = longest - first - (len(ids) - last)
    if room < 1:
        raise UserError(f"The question has {first} tokens, which leaves no room in a max_context of {longest}: shorten it.")
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
    """Return the best span of up to `most_tokens` tokens over all windows, values float32 [T, 2], with `top_k` - 1 others."""
    found: dict[tuple[int, int], float] = {}
    for window, value in zip(parts, values, strict=True):
        count = len(window.offsets)
        begin, end = value[window.first : window.first + count].softmax(0).unbind(-1)
        scores = torch.outer(begin, end).triu().tril(most_tokens - 1)
        for flat in scores.flatten().topk(min(top_k + 8, count * count)).indices.tolist():
            i, j = divmod(flat, count)
            place = _trimmed(context, window.offsets[i][0], window.offsets[j][1])
            if i <= j < i + most_tokens and place[1] > place[0]:
                found[place] = max(found.get(place, 0.0), float(scores[i, j]))
    ranked = sorted(found, key=lambda place: (-found[place], place))[:top_k]
    if not ranked:
        raise UserError("No span of the context could be chosen: it holds no text besides special tokens. Give another context.")
    first, *others = (Answer(text=context[a:b], start=a, end=b, score=found[a, b]) for a, b in ranked)
    return Answer(text=first.text, start=first.start, end=first.end, score=first.score, alternatives=tuple(others))
