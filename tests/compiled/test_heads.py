"""Artifacts of every head, against transformers' class of the same weights: values, labels, places, and what is said of them."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import oxfuse
from oxfuse.errors import UserError
from oxfuse.models import gpt_oss
from oxfuse.runtime.summary import outputs
from oxfuse.runtime.verify import verify_artifact

from ..checkpoints import TINY
from ..compiler.test_report import REPORT
from ..neox import random_gpt_neox, transformers_neox
from ..runtime.commands import run
from ..runtime.head_models import spec

TOKENIZER = Path(__file__).parents[2] / "artifacts" / "tiny-gpt-oss" / "tokenizer.json"
VOCAB, PAD, LONGEST = 2048, 0, 128
LABELS = ("O", "B-CODE", "I-CODE", "B-TEXT")
CONFIG: dict[str, Any] = {
    "vocab_size": VOCAB,
    "max_position_embeddings": LONGEST,
    "pad_token_id": PAD,
    "id2label": {str(number): label for number, label in enumerate(LABELS)},
    "label2id": {label: number for number, label in enumerate(LABELS)},
}
TEXTS = ["def main(path):\n    return open(path)", "x = 1", "import os  # naïve 世界 👩‍👧 e\u0301\nprint('Grüße')"]
METHODS = {
    "text-classification": "classify",
    "token-classification": "tag",
    "question-answering": "answer",
    "feature-extraction": "embed",
    "text-generation": "generate",
}
OSS_CLASSES = {
    "text-classification": "GptOssForSequenceClassification",
    "token-classification": "GptOssForTokenClassification",
    "feature-extraction": "GptOssModel",
}


@dataclass(frozen=True)
class Head:
    family: str
    task: str
    dtype: str = "float32"
    target: str = "cpu"

    def __str__(self) -> str:
        return f"{self.family}-{self.task}-{self.dtype}-{self.target}"

    def write(self, folder: Path) -> Path:
        """Write a random checkpoint with the bundled tokenizer, and return its folder."""
        if self.family == "gpt_neox":
            random_gpt_neox(folder, task=self.task, **CONFIG)
        else:
            torch.manual_seed(0)
            model = getattr(gpt_oss, OSS_CLASSES[self.task])(gpt_oss.GptOssConfig(**{**TINY, **CONFIG}))
            with torch.no_grad():
                for name, weight in model.named_parameters():
                    if weight.dim() == 1 or name.endswith("_bias"):
                        weight.normal_(1.0 if "norm" in name else 0.0, 0.2)
                    else:
                        weight.normal_(
                            0.0, 1.0 if "embed" in name else 1.5 * (weight.shape[-2 if "experts" in name else -1]) ** -0.5
                        )
            model.save_pretrained(folder)
        shutil.copy(TOKENIZER, folder)
        return folder

    def transformers(self, folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
        if self.family == "gpt_neox":
            return transformers_neox(folder, dtype, task=self.task)
        kind = getattr(transformers, OSS_CLASSES[self.task])
        options = {"attn_implementation": "eager", "experts_implementation": "eager"}
        return kind.from_pretrained(folder, dtype=dtype, **options).eval()

    def values(self, model: nn.Module, **inputs: Tensor) -> Tensor:
        """Return what transformers' model says, in the shape of `model.logits`."""
        with torch.no_grad():
            out = model(**inputs)
        if self.task == "question-answering":
            return torch.stack([out.start_logits, out.end_logits], -1).float()
        return (out.last_hidden_state if self.task == "feature-extraction" else out.logits).float()


Made = tuple[Path, Path]
ALWAYS = (
    Head("gpt_neox", "text-classification"),
    Head("gpt_neox", "question-answering", target="onnx"),
    Head("gpt_oss", "text-classification", target="onnx-portable"),
)
ALL = [
    Head(family, task, target=target)
    for target in ("cpu", "onnx", "onnx-portable")
    for family, tasks in (("gpt_neox", METHODS), ("gpt_oss", OSS_CLASSES))
    for task in tasks
]
HEADS = [pytest.param(head, id=str(head), marks=() if head in ALWAYS else pytest.mark.slow) for head in ALL]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Head], Made]:
    """Return checkpoint and artifact of a head, each compiled once."""
    made: dict[Head, Made] = {}

    def get(head: Head) -> Made:
        if head not in made:
            place = tmp_path_factory.mktemp(str(head))
            folder = head.write(place / "checkpoint")
            made[head] = folder, oxfuse.compile(folder, place / "artifact", dtype=head.dtype, target=head.target)
        return made[head]

    return get


def random_ids(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(1, VOCAB, shape, generator=torch.Generator().manual_seed(seed))  # without PAD


def close(got: Tensor, expected: Tensor, what: str) -> None:
    assert got.shape == expected.shape and got.dtype == torch.float32, what
    error, bound = float((got - expected).abs().max()), 1e-4 * max(1.0, float(expected.abs().max()))
    assert error <= bound, f"{what}: error {error:.1e}, at most {bound:.1e} is allowed"


@pytest.mark.parametrize("head", HEADS)
def test_values_are_those_of_transformers(make: Callable[[Head], Made], head: Head) -> None:
    folder, artifact = make(head)
    model, theirs = oxfuse.load(artifact), head.transformers(folder)
    pooled = head.task == "text-classification"
    for length in (1, 20, LONGEST):
        ids = random_ids(1, length, seed=length)
        expected = head.values(theirs, input_ids=ids)
        close(model.logits(ids), expected, f"{length} tokens")
    many = torch.cat([head.values(theirs, input_ids=random_ids(1, 9, seed=n)).flatten(0, -2) for n in range(8)])
    assert many.std(0).mean() > 0.3, "the values hardly vary: the checkpoint hides defects"

    ragged = [random_ids(n, seed=n) for n in (5, 50, 33)]
    got = model.logits([row.tolist() for row in ragged])
    for row, ids in enumerate(ragged):
        mine = got[row] if pooled else got[row, : len(ids)]
        close(mine, head.values(theirs, input_ids=ids[None])[0], f"ragged row {row}")

    for side in ("left", "right"):
        ids = random_ids(3, 40)
        mask = torch.ones_like(ids)
        for row, pads in enumerate((0, 13, 30)):
            mask[row, slice(0, pads) if side == "left" else slice(40 - pads, 40)] = 0
        ids[mask == 0] = PAD
        got, expected = model.logits(ids, attention_mask=mask), head.values(theirs, input_ids=ids, attention_mask=mask)
        if pooled:
            close(got, expected, f"{side} padding")
        else:
            assert not got[mask == 0].any(), "padding has values"
            close(got[mask == 1], expected[mask == 1], f"{side} padding")


@pytest.mark.parametrize("head", HEADS)
def test_what_it_says_of_texts_follows_from_transformers_values(make: Callable[[Head], Made], head: Head) -> None:
    folder, artifact = make(head)
    model, theirs = oxfuse.load(artifact), head.transformers(folder)
    assert model.tokenizer is not None
    ids = [model.tokenizer.encode(text) for text in TEXTS]
    values = [head.values(theirs, input_ids=torch.tensor([row]))[0] for row in ids]
    if head.task == "text-classification":
        for found, value in zip(model.classify(TEXTS), values, strict=True):
            scores = dict(zip(LABELS, value.softmax(-1).tolist(), strict=True))
            assert found.scores == pytest.approx(scores, abs=1e-4) and found.label == LABELS[int(value.argmax())]
    elif head.task == "token-classification":
        for text, row, found, value in zip(TEXTS, ids, model.tag(TEXTS), values, strict=True):
            assert [token.label for token in found.tokens] == [LABELS[n] for n in value.argmax(-1).tolist()]
            assert [token.score for token in found.tokens] == pytest.approx(value.softmax(-1).amax(-1).tolist(), abs=1e-4)
            assert len(found.tokens) == len(row) and all(token.text == text[token.start : token.end] for token in found.tokens)
            assert {entity.label for entity in found.entities} <= {"CODE", "TEXT"}
    elif head.task == "feature-extraction":
        for row, found, value in zip(ids, model.embed(TEXTS), values, strict=True):
            close(found.hidden, value, "hidden states")
            assert found.token_ids == row and len(found.offsets) == len(row)
    elif head.task == "question-answering":
        question, context = "Who opens the path?", TEXTS[0]
        pair, offsets, of_context = model.tokenizer.encode_pair(question, context)
        value = head.values(theirs, input_ids=torch.tensor([pair]))[0][of_context.index(True) :]
        places = offsets[of_context.index(True) :]
        begin, end = value.softmax(0).unbind(-1)
        spans = {(i, j): float(begin[i] * end[j]) for i in range(len(places)) for j in range(i, len(places))}
        spans = {s: p for s, p in spans.items() if context[places[s[0]][0] : places[s[1]][1]].strip()}
        (i, j), score = max(spans.items(), key=lambda item: item[1])
        found = model.answer(question, context)
        assert found.text == context[places[i][0] : places[j][1]].strip() == context[found.start : found.end]
        assert found.score == pytest.approx(score, abs=1e-4)
        windowed = model.answer(question, context * 8, top_k=5)  # longer than the model reaches
        assert windowed.text == (context * 8)[windowed.start : windowed.end] and len(windowed.alternatives) == 4
    else:
        generated = model.generate(TEXTS, max_new_tokens=1, stop_token_ids=[])
        assert [each.token_ids for each in generated] == [[int(value[-1].argmax())] for value in values]


@pytest.mark.parametrize("head", HEADS)
def test_what_is_said_of_the_artifact(make: Callable[[Head], Made], head: Head) -> None:
    """`verify` passes, `inspect` tells the task and the labels, the report names the command, other methods the task."""
    _, artifact = make(head)
    result = verify_artifact(artifact)
    assert result["ok"], result["problems"]
    shown = run("inspect", artifact)
    assert shown.code == 0 and head.task in shown.out and "Runs on this machine" in shown.out
    labelled = head.task in ("text-classification", "token-classification")
    assert all((label in shown.out) == labelled for label in LABELS[1:])
    assert ("rightmost" in shown.out) == (head.task == "text-classification")
    assert json.loads(run("inspect", artifact, "--json").out)["model"]["labels"] == (list(LABELS) if labelled else [])
    report = (artifact / "report.md").read_text()
    assert f"oxfuse {METHODS[head.task]} ." in report
    assert ("best token" in report) == (head.task == "text-generation")
    model = oxfuse.load(artifact)
    for task, method in METHODS.items():
        if task != head.task:
            arguments = ("Who?", "Me.") if method == "answer" else ("x = 1",)
            with pytest.raises(UserError, match=f"--task {task}"):
                getattr(model, method)(*arguments)


@pytest.mark.parametrize("task", METHODS)
def test_the_report_tells_what_was_compared(task: str) -> None:
    """The largest of a row is the best token or label; of two ends of an answer, or of hidden states, it is nothing."""
    for labels, kind in ((LABELS, None), (LABELS, "multi_label_classification"), (LABELS, "regression"), (("one",), None)):
        labelled = labels if "classification" in task else ()
        model = dataclasses.replace(REPORT.model, task=task, labels=labelled, problem_type=kind)
        text = dataclasses.replace(REPORT, model=model).to_markdown()
        assert f"oxfuse {METHODS[task]} ." in text and f"model for {task}" in text
        words = {"text-generation": "logits", "question-answering": "start and end logits", "feature-extraction": "hidden states"}
        assert f"32 rows of {words.get(task, 'label logits')} for" in text
        one_of = kind is None and len(labels) > 1
        best = {"text-generation": "token", "token-classification": "label", "text-classification": "label" if one_of else ""}
        for each in ("token", "label"):
            said = f"best {each} the same in 96.9%" in text, f"The best {each} is the same in 96.9% of the rows." in text
            assert said == (best.get(task) == each,) * 2, text


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"labels": LABELS, "pad": 7}, ("one of 4 labels, of a text", "padding (id 7)", "O, B-CODE, I-CODE, B-TEXT")),
        ({"labels": LABELS}, ("one of 4 labels, of a text", "padding (no token is)")),
        ({"labels": LABELS, "problem_type": "multi_label_classification"}, ("any of 4 labels",)),
        ({"labels": LABELS, "problem_type": "regression"}, ("a value for 4 labels",)),
        ({"labels": ("stars",)}, ("a value for 1 label, of a text", "stars")),
        ({"labels": tuple(f"L{i}" for i in range(1400))}, ("one of 1,400 labels", "L0, L1, ", "L11, and 1,388 more")),
        ({"task": "token-classification", "labels": LABELS}, ("one of 4 labels, of each token", "B-TEXT")),
        ({"task": "question-answering"}, ("start and end of the answer, of each token",)),
        ({"task": "feature-extraction"}, ("the last hidden state, of each token",)),
        ({"task": "text-generation"}, ()),
    ],
    ids=str,
)
def test_inspect_tells_what_the_head_gives(model: dict[str, Any], words: tuple[str, ...]) -> None:
    told = "\n".join(outputs(spec(**{"task": "text-classification", **model})))
    assert all(word in told for word in words), told
    assert bool(told) == bool(words) and told.count("gives") == bool(words) and "L12" not in told


@pytest.mark.slow
def test_bfloat16_is_as_good_as_transformers_bfloat16(make: Callable[[Head], Made]) -> None:
    """The error against transformers in float32 is at most twice that of transformers in bfloat16."""
    head = Head("gpt_neox", "token-classification", "bfloat16")
    folder, artifact = make(head)
    model, exact, theirs = oxfuse.load(artifact), head.transformers(folder), head.transformers(folder, torch.bfloat16)
    errors: dict[str, list[Tensor]] = {"ours": [], "theirs": []}
    for seed in range(6):
        ids = random_ids(1, 50, seed=seed)
        expected = head.values(exact, input_ids=ids)
        errors["ours"].append(model.logits(ids) - expected)
        errors["theirs"].append(head.values(theirs, input_ids=ids) - expected)
    ours, reference = (torch.cat(errors[name]).square().mean().sqrt() for name in ("ours", "theirs"))
    assert 0 < ours <= 2 * reference
    assert verify_artifact(artifact)["ok"] and model.tag(TEXTS[0])[0].tokens[0].text == "def"
