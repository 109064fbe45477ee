"""Models with other heads for tests, without a compiler: a toy that computes, and one whose values are looked up by token."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor

from oxfuse.runtime.engine import Engine
from oxfuse.runtime.manifest import CacheGroup, CacheSpec, Limits, ModelSpec
from oxfuse.runtime.model import CompiledModel
from oxfuse.runtime.tokenizer import TextTokenizer

from .toy import HIDDEN, ToyModel, toy_engine

LETTERS = 300
"""Tokens of the models: more than the tokenizers have."""
TASKS = {
    "text-generation": "generate",
    "text-classification": "classify",
    "token-classification": "tag",
    "question-answering": "answer",
    "feature-extraction": "embed",
}
LABELS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
TEXT = "Ada  Löwe 👩‍👧 in 東京."
_WIDTHS = {"text-classification": 5, "token-classification": 5, "question-answering": 2, "feature-extraction": 7}


def byte_tokenizer(*, special: bool = True, nfc: bool = False, trim: bool = False) -> TextTokenizer:
    """A token a byte. `special` puts <s> before a text and <s>, </s> around the second of a pair."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({"<s>": 0, "</s>": 1, **{char: i + 2 for i, char in enumerate(alphabet)}}, []))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    around = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B:1 </s>:1", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    chosen = [processors.ByteLevel(trim_offsets=True)] * trim + [around] * special
    if chosen:
        tokenizer.post_processor = processors.Sequence(chosen)
    return TextTokenizer(tokenizer)


def word_tokenizer(words: str) -> TextTokenizer:
    """A token for each of the words, told apart by white space, which no token holds."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words.split())}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return TextTokenizer(tokenizer)


def spec(task: str, labels: tuple[str, ...] = (), *, pad: int | None = None, problem_type: str | None = None) -> ModelSpec:
    return ModelSpec(
        model_type="toy",
        task=task,
        dtype="float32",
        vocab_size=LETTERS,
        config={"pad_token_id": pad},
        pooling="rightmost" if task == "text-classification" else "none",
        labels=labels,
        problem_type=problem_type,
    )


def open_head(engine: Engine, model: ModelSpec, width: int, tokenizer: TextTokenizer | None) -> CompiledModel:
    manifest: Any = SimpleNamespace(model=model, generation=SimpleNamespace(eos_token_ids=()))
    return CompiledModel(engine, vocab_size=LETTERS, width=width, tokenizer=tokenizer, manifest=manifest)


def toy_head(
    model: ModelSpec, width: int, tokenizer: TextTokenizer | None = None, max_context: int = 96
) -> tuple[CompiledModel, Callable[[list[int]], Tensor]]:
    """The toy with `width` outputs behind the public surface, and what it says of all tokens of one sequence [T, width]."""
    toy = ToyModel()
    toy.embedding = torch.randn(LETTERS, HIDDEN, generator=torch.Generator().manual_seed(11))
    toy.head = toy.head[:, :width]
    return open_head(toy_engine(toy, max_context=max_context), model, width, tokenizer), toy.dense


def table_head(
    model: ModelSpec, values: Mapping[int, tuple[float, ...]], width: int, tokenizer: TextTokenizer, max_context: int = 96
) -> CompiledModel:
    """A model that says `values` of the tokens that stand there, zeros of all others."""
    table = torch.zeros(LETTERS, width)
    for token, row in values.items():
        table[token] = torch.tensor(row)
    cache = CacheSpec(block_size=4, dtype="float32", kv_heads=(1,), head_dim=(1,), groups=(CacheGroup(window=0, layers=(0,)),))
    engine = Engine(
        lambda inputs: table[inputs[0][inputs[6]]], cache, Limits(max_context=max_context, max_batch=4, max_step_tokens=24)
    )
    return open_head(engine, model, width, tokenizer)


def opened(task: str, **options: Any) -> CompiledModel:
    """The toy for a task, with a tokenizer of bytes unless `options` have another."""
    labels = LABELS if "classification" in task else ()
    model = spec(task, labels, pad=options.pop("pad", None))
    return toy_head(model, _WIDTHS.get(task, 11), **{"tokenizer": byte_tokenizer(), **options})[0]


def random_values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
