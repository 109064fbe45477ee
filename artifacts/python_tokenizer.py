"""A small byte-level BPE for Python source, and the tokenizer files of the bundled checkpoint.

In: texts. Out: a `tokenizers.Tokenizer` whose decode inverts its encode for every text, with the markers of the chat template
as special tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from oxfuse.artifacts.python_corpus import END_OF_TEXT, RETURN, SPECIAL_TOKENS

VOCABULARY = 2048
# A line break goes with the blank lines and the indentation that follow it, and a word with the one sign before it:
# "(self", ".append" and a newline with eight spaces are a token each.
WORDS = r"(?:\n[ ]*)+|[ .(\"'\[]?_*\p{L}+(?:__)?|[ ]?\p{N}|[ ]?[^\s\p{L}\p{N}]+|[^\S\n]+(?=\S)|\s+"
TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "eos_token": RETURN,
    "pad_token": END_OF_TEXT,
    "clean_up_tokenization_spaces": False,
}


def train_tokenizer(texts: Iterable[str], kept: Path) -> Tokenizer:
    """Learn the merges from `texts` and keep the tokenizer in `kept`; a tokenizer that lies there already is taken instead."""
    if not kept.exists():
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(WORDS), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        tokenizer.save(str(kept))
    return Tokenizer.from_file(str(kept))
