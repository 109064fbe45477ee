"""Reads the files of a GPT-NeoX tokenizer: vocabulary, merges, added tokens and options.

In: tokenizer.json, or vocab.json and merges.txt, with tokenizer_config.json, special_tokens_map.json and added_tokens.json beside
them. Out: arguments of `GPTNeoXTokenizer`, checked, with transformers' precedence among the files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from tokenizers import AddedToken

from oxfuse.errors import UserError, shown

Merges: TypeAlias = Sequence[str | Sequence[str]]

CLASSES = ("GPTNeoXTokenizer", "GPTNeoXTokenizerFast")
FILES = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")
OPTIONS = ("errors", "padding_side", "add_prefix_space", "trim_offsets", "add_bos_token", "add_eos_token")
MOST_ID = 2**32 - 1
_MORE_NAMED = ("sep_token", "cls_token", "mask_token")


def read_settings(files: Mapping[str, Path], folder: Path) -> dict[str, Any]:
    """Return the arguments of the tokenizer that these files of `folder`, by their names, describe.

    Raises UserError where one is missing or damaged.
    """
    config = read_json(files["tokenizer_config.json"]) if "tokenizer_config.json" in files else {}
    listed: dict[int, AddedToken] | None = None
    if "added_tokens_decoder" in config:  # this list of newer releases replaces all older ones, tokenizer.json's included
        listed = _listed_tokens(files["tokenizer_config.json"], config["added_tokens_decoder"])
    elif "special_tokens_map.json" in files:
        older = read_json(files["special_tokens_map.json"])
        config |= {
            name: {**token, "special": True} if name in NAMED and isinstance(token, dict) else token
            for name, token in older.items()
        }
    settings: dict[str, Any] = {name: config[name] for name in NAMED if name in config}
    settings |= {name: config[name] for name in OPTIONS if config.get(name) is not None}
    extra = _extra_tokens(config)
    special = {token.content for token in extra}
    special |= {added_token(config[name], name).content for name in (*NAMED, *_MORE_NAMED) if config.get(name)}
    added = _older_added_tokens(files["added_tokens.json"], special) if "added_tokens.json" in files else {}
    if "tokenizer.json" in files:
        path = files["tokenizer.json"]
        data = read_json(path)
        vocab, merges, own = model_of(path, data)
        settings |= {"add_bos_token": False, "add_eos_token": False}
        if not is_ours(config):
            settings = {**dict.fromkeys(NAMED), **settings, **_pipeline_of(path, data)}
        added |= own
    elif "vocab.json" in files and "merges.txt" in files:
        vocab, merges = vocabulary(files["vocab.json"]), merge_pairs(files["merges.txt"])
    else:
        found = " and ".join(sorted(files.keys() & {"vocab.json", "merges.txt"})) or "no tokenizer"
        raise UserError(f"{folder} holds {found}; GPT-NeoX needs tokenizer.json, or vocab.json and merges.txt. Get these files.")
    tokens = added if listed is None else listed
    return {**settings, "vocab": vocab, "merges": merges, "added_tokens": tokens, "extra_special_tokens": extra}


def is_ours(config: Mapping[str, Any]) -> bool:
    """Tell whether a tokenizer_config.json leaves the pipeline to GPT-NeoX's class; else the tokenizer.json has it."""
    return (config.get("tokenizer_class") or CLASSES[0]) in CLASSES


def vocabulary(vocab: str | Path | Mapping[str, int]) -> dict[str, int]:
    """Return a vocabulary: tokens and ids, each once. Raises UserError where it is none."""
    where = "The vocabulary" if isinstance(vocab, Mapping) else str(vocab)
    entries = dict(vocab) if isinstance(vocab, Mapping) else read_json(Path(vocab))
    owners: dict[int, str] = {}
    for token, index in entries.items():
        if not isinstance(token, str) or not isinstance(index, int) or isinstance(index, bool) or not 0 <= index <= MOST_ID:
            raise UserError(f"{where} maps {shown(token)} to {shown(index)}; it must map tokens to ids. Get the file again.")
        valid_text(token, f"{where}: a token")
        if owners.setdefault(index, token) != token:
            raise UserError(
                f"{where} gives {shown(owners[index])} and {shown(token)} the id {index}; ids must differ. Get the file again."
            )
    return entries


def merge_pairs(merges: str | Path | Merges | None) -> list[tuple[str, str]]:
    """Return merges as pairs. Raises UserError where one is no pair."""
    where, lines = "The merges", [] if merges is None or isinstance(merges, (str, Path)) else merges
    if isinstance(merges, (str, Path)):
        where = str(merges)
        # Only "\n" ends a line: str.splitlines would break a token that holds another separator.
        read = (line.removesuffix("\r") for line in _read_text(Path(merges)).split("\n"))
        lines = [line for line in read if line and not line.startswith("#version")]
    pairs = []
    for i, merge in enumerate(lines):
        parts = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(parts, (list, tuple)) or len(parts) != 2 or not all(isinstance(part, str) for part in parts):
            raise UserError(f"{where}: merge {i} is {shown(merge)}; it must be two tokens with a space. Get the file again.")
        pairs.append((parts[0], parts[1]))
    return pairs


def check_merges(vocab: Mapping[str, int], merges: Sequence[tuple[str, str]]) -> None:
    """Raise UserError where a merge takes or makes a token that the vocabulary lacks."""
    for i, (left, right) in enumerate(merges):
        for token in (left, right, left + right):
            if token not in vocab:
                raise UserError(
                    f"Merge {i} makes {shown(left + right)} of {shown(left)} and {shown(right)}, but the vocabulary has no "
                    f"{shown(token)}. Get vocabulary and merges of one release."
                )


def model_of(path: Path, data: Mapping[str, Any]) -> tuple[dict[str, int], list[tuple[str, str]], dict[int, AddedToken]]:
    """Return vocabulary, merges and added tokens of a tokenizer.json. Raises UserError if it holds no BPE."""
    model = data.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE" or not isinstance(model.get("vocab"), dict):
        kind = model.get("type") if isinstance(model, dict) else None
        raise UserError(f"{path} holds a model of type {shown(kind)}; a GPT-NeoX tokenizer is a BPE. Get the file again.")
    merges, listed = model.get("merges", []), data.get("added_tokens") or []
    if not isinstance(merges, list) or not isinstance(listed, list):
        raise UserError(f"{path}: merges and added_tokens must be lists. Get the file again.")
    tokens = {i: token.get("id") if isinstance(token, dict) else None for i, token in enumerate(listed)}
    added = _listed_tokens(path, {index: listed[i] for i, index in tokens.items()})
    try:
        return vocabulary(model["vocab"]), merge_pairs(merges), added
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _pipeline_of(path: Path, data: Mapping[str, Any]) -> dict[str, bool]:
    """Return the options that a tokenizer.json itself carries. Raises UserError where it splits text in another way."""
    parts = {name: data.get(name) or {} for name in ("normalizer", "pre_tokenizer", "post_processor")}
    kinds = [part.get("type") if isinstance(part, dict) else None for part in parts.values()]
    if kinds[:2] != ["NFC", "ByteLevel"] or kinds[2] not in ("TemplateProcessing", "ByteLevel", None):
        raise UserError(
            f"{path} has {shown(kinds)} around its BPE, not GPT-NeoX's NFC, ByteLevel and a template; its tokenizer_config.json "
            "names another class too. Load it with that class."
        )
    pieces = parts["post_processor"].get("single")
    marks = [isinstance(piece, dict) and "SpecialToken" in piece for piece in pieces] if isinstance(pieces, list) else []
    prefix = parts["pre_tokenizer"].get("add_prefix_space", True)
    return {"add_prefix_space": prefix, "add_bos_token": marks[:1] == [True], "add_eos_token": marks[1:][-1:] == [True]}


def _listed_tokens(path: Path, listed: Any) -> dict[int, AddedToken]:
    if not isinstance(listed, dict):
        raise UserError(f"{path}: the added tokens are {shown(listed)}, not an object. Get the file again.")
    tokens = {}
    for index, token in listed.items():
        try:
            number = int(index)
        except (TypeError, ValueError):
            raise UserError(f"{path}: the added token {shown(token)} has the id {shown(index)}. Get the file again.") from None
        tokens[number] = added_token(token, f"{path}: added token {number}")
    return tokens


def _older_added_tokens(path: Path, special: set[str]) -> dict[int, AddedToken]:
    """Return the tokens of an added_tokens.json, which says of each no more than its id."""
    return {
        index: AddedToken(token, special=token in special, normalized=token not in special)
        for token, index in vocabulary(path).items()
    }


def _extra_tokens(config: Mapping[str, Any]) -> list[AddedToken]:
    """Return the special tokens of a configuration beside the four, under whatever name; flags such as add_bos_token are none."""
    more = [name for name in config if name.endswith("_token") and name not in (*NAMED, *_MORE_NAMED)]
    found = [config[name] for name in (*_MORE_NAMED, *more) if isinstance(config.get(name), (str, dict))]
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    if not isinstance(extra, (list, dict)):
        raise UserError(f"extra_special_tokens is {shown(extra)}; it must be a list of tokens. Correct tokenizer_config.json.")
    return [added_token(token, "A special token") for token in [*found, *(extra.values() if isinstance(extra, dict) else extra)]]


def added_token(token: Any, what: str) -> AddedToken:
    """Return a token of a file or an argument. Raises UserError where it is none."""
    if isinstance(token, dict) and isinstance(token.get("content"), str):
        flags = {name: token[name] for name in ("single_word", "lstrip", "rstrip", "normalized", "special") if name in token}
        if all(isinstance(flag, bool) for flag in flags.values()):
            return AddedToken(valid_text(token["content"], what), **flags)
    elif isinstance(token, str) and token:
        return AddedToken(valid_text(token, what), special=True)
    elif isinstance(token, AddedToken):
        return token
    raise UserError(f"{what} is {shown(token)}; a token must be a text, or an object with its content. Correct it.")


def valid_text(text: Any, what: str) -> str:
    """Return a text. Raises UserError where it is none, or has no UTF-8."""
    if not isinstance(text, str):
        raise UserError(f"{what} is {shown(text)}, not a text. Give a string.")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"{what} holds {text[error.start]!a} at index {error.start}, which is no character: it was not UTF-8 where it came "
            "from. Give valid UTF-8."
        ) from None
    return text


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except (OSError, ValueError) as error:  # ValueError: no UTF-8, or a NUL in the name
        raise UserError(f"{path} cannot be read: {error}. Get the file again.") from error


def read_json(path: Path) -> dict[str, Any]:
    """Return the object of a JSON file. Raises UserError where there is none."""
    try:
        data = json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}. Get the file again.") from error
    if not isinstance(data, dict):
        raise UserError(f"{path} holds {type(data).__name__}, not an object. Get the file again.")
    return data
