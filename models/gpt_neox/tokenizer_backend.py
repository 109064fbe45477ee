"""The tokenizers library's objects that make up GPT-NeoX's tokenizer: byte-level BPE after NFC, special tokens around texts.

In: vocabulary, merges and tokens that `tokenizer_files.py` has checked. Out: a `tokenizers.Tokenizer` for `tokenizer.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from oxfuse.errors import UserError, shown


def build_backend(vocab: dict[str, int], merges: list[tuple[str, str]], add_prefix_space: bool, trim_offsets: bool) -> Tokenizer:
    """Return the tokenizer without special tokens."""
    backend = Tokenizer(BPE(vocab=vocab, merges=merges, continuing_subword_prefix="", end_of_word_suffix="", fuse_unk=False))
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, trim_offsets=trim_offsets)
    backend.decoder = decoders.ByteLevel()
    return backend


def around_texts(bos: tuple[str, int] | None, eos: tuple[str, int] | None) -> processors.TemplateProcessing:
    """Return what puts `bos` and `eos`, (token, id), around a text; around each text of a pair."""
    around = {name: token for name, token in (("bos", bos), ("eos", eos)) if token is not None}

    def text(name: str, kind: int) -> str:
        pieces = [f"bos:{kind}" if bos else "", f"${name}:{kind}", f"eos:{kind}" if eos else ""]
        return " ".join(piece for piece in pieces if piece)

    return processors.TemplateProcessing(
        single=text("A", 0),
        pair=f"{text('A', 0)} {text('B', 1)}",
        special_tokens=[{"id": name, "ids": [index], "tokens": [token]} for name, (token, index) in around.items()],
    )


def add_tokens(
    backend: Tokenizer, added: Mapping[int, AddedToken], named: Sequence[AddedToken], extra: Sequence[AddedToken]
) -> None:
    """Add tokens in transformers' order, which decides the ids of new ones. Raises UserError where an id would be another."""
    names = {token.content for token in named}
    listed = [added[index] for index in sorted(added)]
    backend.add_tokens([_special(token) if token.content in names else token for token in listed])
    for index, token in sorted(added.items()):
        if (found := backend.token_to_id(token.content)) != index:
            raise UserError(
                f"The added token {shown(token.content)} is listed with id {index}, but beside this vocabulary it is {found}. "
                "Get vocabulary and added tokens of one release."
            )
    present = {token.content for token in listed}
    new = [_special(token) for token in [*named, *extra] if token.content not in present]
    backend.add_tokens(list({repr(token): token for token in new}.values()))


def _special(token: AddedToken) -> AddedToken:
    return AddedToken(
        token.content,
        single_word=token.single_word,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        normalized=token.normalized,
        special=True,
    )
