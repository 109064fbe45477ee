"""GPT-NeoX's tokenizer: NFC, byte-level BPE, and the special tokens that a checkpoint names.

In: tokenizer.json, or vocab.json and merges.txt, in a folder or in memory. Out: token ids, offsets, text, and a tokenizer.json
that gives the same everywhere. It agrees with transformers' GPTNeoXTokenizer, which takes no more from a tokenizer.json than
vocabulary, merges and added tokens, and builds the rest anew. Three differences, each on purpose: `errors` works (transformers
accepts it and always replaces); words without `add_prefix_space` are refused; ids that would shift are refused.
"""

from __future__ import annotations

import functools
import json
import operator
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, SupportsIndex, TypeAlias, overload

import torch
from tokenizers import AddedToken, Encoding, processors
from torch import Tensor

from oxfuse.errors import UserError, shown
from oxfuse.models.gpt_neox.tokenizer_backend import add_tokens, around_texts, build_backend
from oxfuse.models.gpt_neox.tokenizer_files import (
    CLASSES,
    FILES,
    MOST_ID,
    NAMED,
    OPTIONS,
    Merges,
    added_token,
    check_merges,
    is_ours,
    merge_pairs,
    model_of,
    read_json,
    read_settings,
    valid_text,
    vocabulary,
)

Text: TypeAlias = str | Sequence[str]
"""A text, or the words that it was split into."""
Token: TypeAlias = str | AddedToken

ERRORS = ("replace", "strict", "ignore")


class GPTNeoXTokenizer:
    """Text to token ids and back. The arguments are those of transformers' class of this name."""

    def __init__(
        self,
        vocab: str | Path | Mapping[str, int] | None = None,
        merges: str | Path | Merges | None = None,
        *,
        tokenizer_file: str | Path | None = None,
        errors: str = "replace",
        unk_token: Token | None = "<|endoftext|>",
        bos_token: Token | None = "<|endoftext|>",
        eos_token: Token | None = "<|endoftext|>",
        pad_token: Token | None = "<|padding|>",
        add_prefix_space: bool = False,
        add_bos_token: bool = False,
        add_eos_token: bool = False,
        trim_offsets: bool = True,
        padding_side: str = "right",
        extra_special_tokens: Sequence[Token] = (),
        added_tokens: Mapping[int, AddedToken] | None = None,
    ) -> None:
        """Build from `vocab` and `merges`, each a file or its contents, or from what a tokenizer.json has of them.

        errors: what `decode` does with bytes that are no UTF-8: "replace" by U+FFFD, "strict" refuses, "ignore" drops them.
        trim_offsets: kept for files that transformers reads; as there it changes no offsets, see `encode_with_offsets`.
        added_tokens: tokens beside the vocabulary, by id. A special token that is in neither gets the next free id.

        Raises UserError where files cannot be read, merges and vocabulary do not fit, or an option has an impossible value.
        """
        if tokenizer_file is not None:
            if vocab is not None or merges is not None or added_tokens is not None:
                raise UserError(
                    "tokenizer_file was given, and so were vocab, merges or added_tokens, which it has. Give one of both."
                )
            entries, pairs, added_tokens = model_of(Path(tokenizer_file), read_json(Path(tokenizer_file)))
        elif vocab is None:
            if merges:
                raise UserError("There are merges but no vocab. Give the vocabulary that they were learnt with.")
            entries, pairs = {str(token): i for i, token in enumerate((unk_token, pad_token)) if token is not None}, []
        else:
            entries, pairs = vocabulary(vocab), merge_pairs(merges)
        check_merges(entries, pairs)
        if errors not in ERRORS:
            raise UserError(f"errors is {shown(errors)}; it must be one of {', '.join(ERRORS)}. Choose one.")
        _check_side(padding_side)
        flags = dict(
            add_prefix_space=add_prefix_space, add_bos_token=add_bos_token, add_eos_token=add_eos_token, trim_offsets=trim_offsets
        )
        for name, value in flags.items():
            if not isinstance(value, bool):
                raise UserError(f"{name} is {shown(value)}; it must be true or false. Correct it.")
        self.errors, self.padding_side = errors, padding_side
        self.add_prefix_space, self.trim_offsets = add_prefix_space, trim_offsets
        self.add_bos_token, self.add_eos_token = add_bos_token, add_eos_token
        given = dict(bos_token=bos_token, eos_token=eos_token, unk_token=unk_token, pad_token=pad_token)
        named = {name: added_token(token, name) for name, token in given.items() if token is not None}
        extra = [added_token(token, "extra_special_tokens") for token in extra_special_tokens]
        self._named: dict[str, str] = {name: token.content for name, token in named.items()}
        self._backend = build_backend(entries, pairs, add_prefix_space, trim_offsets)
        known = {**entries, **{token.content: i for i, token in (added_tokens or {}).items()}}
        self._backend.post_processor = around_texts(
            self._around("bos_token", known) if add_bos_token else None,
            self._around("eos_token", known) if add_eos_token else None,
        )
        add_tokens(self._backend, added_tokens or {}, list(named.values()), extra)
        self._special = {t.content for t in self._backend.get_added_tokens_decoder().values() if t.special}
        self._extra = [token.content for token in extra]

    @classmethod
    def from_pretrained(cls, folder: str | Path, **options: Any) -> GPTNeoXTokenizer:
        """Load a checkpoint's tokenizer as transformers' AutoTokenizer does; `options` of the constructor go before its files.

        Beside a tokenizer.json, add_bos_token and add_eos_token of tokenizer_config.json do not count. If that names another
        class than GPT-NeoX's, such as PreTrainedTokenizerFast, prefix space and special tokens around a text are the
        tokenizer.json's. Raises UserError where a file is missing or damaged.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise UserError(f"{folder} is no folder. Give the folder that holds the tokenizer's files.")
        if unknown := sorted(set(options) - {*NAMED, *OPTIONS}):
            raise UserError(f"A GPT-NeoX tokenizer has no option {', '.join(unknown)}; it has {', '.join((*NAMED, *OPTIONS))}.")
        files = {name: folder / name for name in FILES if (folder / name).exists()}
        return cls(**{**read_settings(files, folder), **options})

    def _around(self, name: str, known: Mapping[str, int]) -> tuple[str, int]:
        """Return a token to put around texts. Raises UserError where it has no id: the model could not have learnt it."""
        token = self._named.get(name)
        if token is None or token not in known:
            what = "there is none" if token is None else f"that is {shown(token)}, which the vocabulary lacks"
            raise UserError(
                f"add_{name} is true, but of {name} {what}. Name a token of the vocabulary, or set add_{name} to false."
            )
        return token, known[token]

    @property
    def bos_token(self) -> str | None:
        """Begins a sequence."""
        return self._named.get("bos_token")

    @property
    def eos_token(self) -> str | None:
        """Ends a sequence."""
        return self._named.get("eos_token")

    @property
    def unk_token(self) -> str | None:
        """Stands for a token that is in no vocabulary."""
        return self._named.get("unk_token")

    @property
    def pad_token(self) -> str | None:
        """Fills a batch."""
        return self._named.get("pad_token")

    @property
    def bos_token_id(self) -> int | None:
        """The id of `bos_token`."""
        return self._id_of(self.bos_token)

    @property
    def eos_token_id(self) -> int | None:
        """The id of `eos_token`."""
        return self._id_of(self.eos_token)

    @property
    def unk_token_id(self) -> int | None:
        """The id of `unk_token`."""
        return self._id_of(self.unk_token)

    @property
    def pad_token_id(self) -> int | None:
        """The id of `pad_token`."""
        return self._id_of(self.pad_token)

    @property
    def all_special_ids(self) -> list[int]:
        """The ids of the named and the extra special tokens, each once."""
        tokens = dict.fromkeys([*self._named.values(), *self._extra])
        return [index for token in tokens if (index := self._id_of(token)) is not None]

    @property
    def vocab_size(self) -> int:
        """Tokens of the vocabulary, without added ones; `len` counts those as well."""
        return int(self._backend.get_vocab_size(with_added_tokens=False))

    def __len__(self) -> int:
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    def get_vocab(self) -> dict[str, int]:
        """Return all tokens with their ids, added ones included."""
        return dict(self._backend.get_vocab(with_added_tokens=True))

    def __call__(
        self,
        text: Text | Sequence[Text],
        *,
        is_split_into_words: bool = False,
        add_special_tokens: bool = True,
        tensors: bool = False,
    ) -> dict[str, Any]:
        """Return input_ids and attention_mask of a text or of a batch, as transformers does: lists, or tensors [B, S] padded.

        Raises UserError as `encode` and `pad` do.
        """
        first = text[0] if not isinstance(text, str) and len(text) else ""
        single = isinstance(text, str) or (is_split_into_words and isinstance(first, str))
        rows: list[list[int]]
        rows = self.encode_batch([text] if single else text, add_special_tokens=add_special_tokens)  # type: ignore[list-item]
        if tensors:
            return dict(self.pad(rows))
        masks = [[1] * len(row) for row in rows]
        return {"input_ids": rows[0] if single else rows, "attention_mask": masks[0] if single else masks}

    def encode(self, text: Text, *, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of a text, or of a list of its words.

        Raises UserError where the text holds half of a surrogate pair, or is split into words without `add_prefix_space`: words
        would lose the spaces between them.
        """
        return list(self._encode(text, add_special_tokens).ids)

    def encode_batch(self, texts: Sequence[Text], *, add_special_tokens: bool = True) -> list[list[int]]:
        """Return the token ids of each text. Raises UserError as `encode` does."""
        if isinstance(texts, str):
            raise UserError("A batch must be a list of texts, and this is one text. Put it into a list, or call encode.")
        if not all(isinstance(text, str) for text in texts):
            return [self.encode(text, add_special_tokens=add_special_tokens) for text in texts]
        batch = [valid_text(text, f"Text {i}") for i, text in enumerate(texts)]
        return [list(encoding.ids) for encoding in self._backend.encode_batch(batch, add_special_tokens=add_special_tokens)]

    def encode_with_offsets(
        self, text: Text, *, add_special_tokens: bool = True, trim: bool = False
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Return token ids and, for each, begin and end of its characters in `text`, or in its word.

        They are those of transformers, whose class never trims, whatever `trim_offsets` says: its template replaces the step
        that would. With `trim`, white space around a token does not count: "Ġb" of "a b" is (2, 3), not (1, 3).
        Raises UserError as `encode` does.
        """
        encoding = self._encode(text, add_special_tokens)
        if trim:
            encoding = processors.ByteLevel(trim_offsets=True, add_prefix_space=self.add_prefix_space).process(encoding)
        return list(encoding.ids), [(int(begin), int(end)) for begin, end in encoding.offsets]

    def tokenize(self, text: Text, *, add_special_tokens: bool = False) -> list[str]:
        """Return the tokens of a text, in the byte alphabet. Raises UserError as `encode` does."""
        return list(self._encode(text, add_special_tokens).tokens)

    def decode(
        self,
        ids: SupportsIndex | Iterable[SupportsIndex],
        *,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
    ) -> str:
        """Return the text of token ids; ids that the tokenizer does not know give nothing.

        `clean_up_tokenization_spaces` changes nothing, as in transformers: it would take spaces from the text.
        Raises UserError for what is no id and, with errors "strict", where the bytes are no UTF-8.
        """
        tokens = (self._backend.id_to_token(index) for index in _ids(ids))
        kept = (token for token in tokens if token is not None and not (skip_special_tokens and token in self._special))
        data = b"".join(map(_bytes_of, kept))
        try:
            return data.decode("utf-8", self.errors)
        except UnicodeDecodeError as error:
            raise UserError(
                f"The tokens' bytes are no UTF-8: {data[error.start : error.end].hex(' ')} at byte {error.start}. Give ids of "
                'whole characters, or errors="replace".'
            ) from None

    @overload
    def convert_tokens_to_ids(self, tokens: str) -> int | None: ...
    @overload
    def convert_tokens_to_ids(self, tokens: list[str] | tuple[str, ...]) -> list[int | None]: ...
    def convert_tokens_to_ids(self, tokens: str | list[str] | tuple[str, ...]) -> int | list[int | None] | None:
        """Return the id of each token; that of `unk_token` for an unknown one."""
        if isinstance(tokens, str):
            found = self._id_of(valid_text(tokens, "The token"))
            return self.unk_token_id if found is None else found
        return [self.convert_tokens_to_ids(token) for token in tokens]

    @overload
    def convert_ids_to_tokens(self, ids: SupportsIndex, *, skip_special_tokens: bool = False) -> str | None: ...
    @overload
    def convert_ids_to_tokens(self, ids: Iterable[SupportsIndex], *, skip_special_tokens: bool = False) -> list[str | None]: ...
    def convert_ids_to_tokens(
        self, ids: SupportsIndex | Iterable[SupportsIndex], *, skip_special_tokens: bool = False
    ) -> str | list[str | None] | None:
        """Return the token of each id, None for an unknown one; from a list, special ones can be left out."""
        if isinstance(ids, SupportsIndex) and not isinstance(ids, Iterable):
            token = self._backend.id_to_token(_ids(ids)[0])
            return None if token is None else str(token)
        skipped = set(self.all_special_ids) if skip_special_tokens else set()
        return [self._backend.id_to_token(index) for index in _ids(ids) if index not in skipped]

    def pad(
        self, rows: Sequence[Sequence[int]], *, side: str | None = None, length: int | None = None, multiple_of: int = 1
    ) -> dict[str, Tensor]:
        """Return input_ids and attention_mask, int64 [B, S], S being `length` or the longest row's, rounded up.

        Raises UserError for no rows, rows longer than `length`, or where padding is needed and there is no `pad_token`.
        """
        side = self.padding_side if side is None else side
        _check_side(side)
        if not rows:
            raise UserError("There is nothing to pad: the batch has no rows. Give one at least.")
        if multiple_of < 1:
            raise UserError(f"multiple_of is {multiple_of}; it must be 1 or more.")
        longest = max(map(len, rows))
        if length is not None and longest > length:
            raise UserError(f"A row has {longest} tokens, more than the length {length}. Shorten it, or raise the length.")
        size = -(-(length if length is not None else longest) // multiple_of) * multiple_of
        if (pad := self.pad_token_id) is None:
            if any(len(row) < size for row in rows):
                raise UserError("The rows differ in length, and the tokenizer has no pad_token. Give it one.")
            pad = 0
        ids, mask = torch.full((len(rows), size), pad), torch.zeros(len(rows), size, dtype=torch.int64)
        for i, row in enumerate(rows):
            place = slice(0, len(row)) if side == "right" else slice(size - len(row), size)
            ids[i, place], mask[i, place] = torch.tensor(_ids(row), dtype=torch.int64), 1
        return {"input_ids": ids, "attention_mask": mask}

    def to_json(self) -> str:
        """Return the tokenizer.json of this tokenizer."""
        return str(self._backend.to_str(pretty=True))

    def save_pretrained(self, folder: str | Path) -> list[Path]:
        """Write tokenizer.json and tokenizer_config.json, which transformers reads as well; return their paths.

        Raises UserError where they cannot be written.
        """
        # Beside a tokenizer.json, transformers' GPTNeoXTokenizer takes no special tokens around a text from either file; the
        # generic class takes the tokenizer.json as it stands, so it is the one that keeps them.
        around = self.add_bos_token or self.add_eos_token
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast" if around else CLASSES[0],
            **{name: self._named.get(name) for name in NAMED},
            **({"extra_special_tokens": self._extra} if self._extra else {}),
            "add_prefix_space": self.add_prefix_space,
            "add_bos_token": self.add_bos_token,
            "add_eos_token": self.add_eos_token,
            "trim_offsets": self.trim_offsets,
            "errors": self.errors,
            "padding_side": self.padding_side,
            "clean_up_tokenization_spaces": False,
        }
        texts = {"tokenizer.json": self.to_json(), "tokenizer_config.json": json.dumps(config, indent=2) + "\n"}
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            for name, text in texts.items():
                (Path(folder) / name).write_text(text, "utf-8")
        except (OSError, ValueError) as error:
            raise UserError(f"The tokenizer cannot be written to {folder}: {error}. Name another folder.") from error
        return [Path(folder) / name for name in texts]

    def _id_of(self, token: str | None) -> int | None:
        found = None if token is None else self._backend.token_to_id(token)
        return None if found is None else int(found)

    def _encode(self, text: Text, add_special_tokens: bool) -> Encoding:
        if isinstance(text, str):
            return self._backend.encode(valid_text(text, "The text"), add_special_tokens=add_special_tokens)
        if not isinstance(text, Sequence) or isinstance(text, bytes):
            raise UserError(f"A text must be a string or a list of words, not {type(text).__name__}. Decode or split it.")
        if not self.add_prefix_space:
            raise UserError(
                "The text comes split into words, and the tokenizer puts no space before a word: they would run together. Make "
                "it with add_prefix_space=True, or give the text in one piece."
            )
        words = [valid_text(word, f"Word {i}") for i, word in enumerate(text)]
        return self._backend.encode(words, is_pretokenized=True, add_special_tokens=add_special_tokens)


def build_tokenizer(files: Sequence[Path]) -> str | None:
    """Return the tokenizer.json that a checkpoint's tokenizer files amount to in transformers.

    None where there is neither a tokenizer.json nor vocab.json, or where tokenizer_config.json names another class than
    GPT-NeoX's: then a tokenizer.json counts as it stands. Raises UserError where a file is damaged.
    """
    by_name = {path.name: path for path in files if path.name in FILES}
    if not by_name.keys() & {"tokenizer.json", "vocab.json"}:
        return None
    if (
        "tokenizer.json" in by_name
        and "tokenizer_config.json" in by_name
        and not is_ours(read_json(by_name["tokenizer_config.json"]))
    ):
        return None
    return GPTNeoXTokenizer(**read_settings(by_name, next(iter(by_name.values())).parent)).to_json()


def _check_side(side: str) -> None:
    if side not in ("left", "right"):
        raise UserError(f"The padding side is {shown(side)}; it must be left or right. Choose one.")


def _ids(ids: SupportsIndex | Iterable[SupportsIndex]) -> list[int]:
    try:
        found = list(map(operator.index, ids)) if isinstance(ids, Iterable) else [operator.index(ids)]
    except TypeError:
        raise UserError(f"Token ids must be whole numbers, not {shown(ids)}. Give a list of ids.") from None
    if wrong := [index for index in found if not 0 <= index <= MOST_ID]:
        raise UserError(f"{wrong[0]} is no token id; ids begin at 0. Give the ids that encode returned.")
    return found


@functools.cache
def _byte_of() -> dict[str, int]:
    """Return the byte of each character of the byte alphabet: printable Latin-1 for itself, then from U+0100 for the others."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in own]
    return {**{chr(byte): byte for byte in own}, **{chr(0x100 + i): byte for i, byte in enumerate(others)}}


def _bytes_of(token: str) -> bytes:
    """Return the bytes of a token; one that is not written in the byte alphabet, such as spaces, stands for itself."""
    table = _byte_of()
    return bytes(table[char] for char in token) if all(char in table for char in token) else token.encode("utf-8")
