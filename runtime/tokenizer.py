"""Text to tokens and back, with the checkpoint's own tokenizer and chat template.

The template is the checkpoint's code, so it runs in jinja2's sandbox; filters and functions are the ones that Hugging Face's
templates are written against.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Filter, For, Node, Template
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Encoding, Tokenizer

from oxfuse.runtime.errors import UserError

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
MOST_ROUNDS = 1_000_000
"""Of all loops of a chat template together: a chat of thousands of messages takes some ten thousand."""


class TextTokenizer:
    """A checkpoint's tokenizer.json, tokenizer_config.json and chat template."""

    def __init__(self, tokenizer: Tokenizer, *, template: str | None = None, special: Mapping[str, str] | None = None) -> None:
        """Wrap a loaded tokenizer. `special` names tokens for the template, such as `bos_token`."""
        self._tokenizer, self._template, self._special = tokenizer, template, dict(special or {})

    @classmethod
    def open(cls, files: Sequence[Path]) -> TextTokenizer | None:
        """Load from the tokenizer files of an artifact, known by their names; None where there is no tokenizer.json.

        Raises UserError where a file cannot be read.
        """
        by_name = {path.name: path for path in files}
        if "tokenizer.json" not in by_name:
            return None
        try:
            tokenizer = Tokenizer.from_file(str(by_name["tokenizer.json"]))
        except Exception as error:  # tokenizers raises bare Exception
            raise UserError(f"{by_name['tokenizer.json']} cannot be read: {error}. Compile the checkpoint again.") from error
        tokenizer.no_padding()
        tokenizer.no_truncation()
        config = _json(by_name.get("tokenizer_config.json"))
        template: str | None = _named_template(config.get("chat_template"))
        if "chat_template.jinja" in by_name:
            template = _text(by_name["chat_template.jinja"])
        elif "chat_template.json" in by_name:
            template = _named_template(_json(by_name["chat_template.json"]).get("chat_template"))
        listed = {**_json(by_name.get("special_tokens_map.json")), **config}
        special = {name: _content(listed[name]) for name in SPECIAL_TOKENS if listed.get(name)}
        return cls(tokenizer, template=template, special=special)

    @property
    def vocab_size(self) -> int:
        """Tokens that the tokenizer knows, added ones included; a model's vocabulary may be larger."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    @property
    def template(self) -> str | None:
        """The chat template's source."""
        return self._template

    @property
    def has_chat_template(self) -> bool:
        """Whether `chat` works."""
        return self._template is not None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of `text`, with what the tokenizer puts around a text unless `add_special_tokens` is False.

        Raises UserError where `text` holds half of a surrogate pair, which bytes become that were read with the wrong encoding.
        """
        return list(self._encode(text, add_special_tokens=add_special_tokens).ids)

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the token ids of `text` and where each token's characters begin and end in it; (0, 0) if it has none."""
        found = self._encode(text)
        return list(found.ids), list(found.offsets)

    def encode_pair(self, first: str, second: str) -> tuple[list[int], list[tuple[int, int]], list[bool]]:
        """Return the token ids of two texts as the tokenizer joins them, places in their own text, and which are the second's."""
        found = self._encode(first, second)
        return list(found.ids), list(found.offsets), [number == 1 for number in found.sequence_ids]

    def _encode(self, text: str, second: str | None = None, *, add_special_tokens: bool = True) -> Encoding:
        for part in (text, second or ""):
            try:
                part.encode("utf-8")
            except UnicodeEncodeError as error:
                raise UserError(
                    f"The text holds {part[error.start]!a} at index {error.start}, which is no character: it was not UTF-8 where "
                    "it came from. Give valid UTF-8."
                ) from None
        return self._tokenizer.encode(text, second, add_special_tokens=add_special_tokens)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of token ids; ids that the tokenizer does not know give nothing, bytes that are no text U+FFFD."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def token_id(self, token: str) -> int | None:
        """Return the id of a token, such as a special one, or None."""
        found = self._tokenizer.token_to_id(token)
        return None if found is None else int(found)

    def render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **variables: Any) -> str:
        """Return the chat as the template writes it; `variables` are the template's own, such as `tools`.

        Raises UserError where there is no template or it refuses the messages.
        """
        if self._template is None:
            raise UserError(
                "The checkpoint has no chat template: give a text or token ids instead of messages, or compile with --tokenizer "
                "and a folder that has a chat_template.jinja."
            )
        values = {**self._special, "tools": None, "documents": None, **variables}
        try:
            template = _environment().from_string(self._template)
            return template.render(messages=list(messages), add_generation_prompt=add_generation_prompt, **values)
        except Exception as error:  # the template is a program of the checkpoint's, so it may fail in any way
            what = str(error) or type(error).__name__
            raise UserError(f"The chat template refuses the messages: {what}") from error

    def chat(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> list[int]:
        """Return the token ids of a chat up to where the model answers. Raises as `render` does."""
        return self.encode(self.render(messages, **variables), add_special_tokens=False)


class _GenerationTag(Extension):
    """Reads `{% generation %}` ... `{% endgeneration %}`, which marks what the assistant said, as its contents."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's type

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Sandbox(ImmutableSandboxedEnvironment):
    """jinja2's sandbox, stricter in two ways, and good for one rendering.

    An attribute that leads to Python is an error, where jinja2 lets it look as if it were not there. Loops end after MOST_ROUNDS
    rounds in all: jinja2 bounds a single range, but neither loops in loops nor the list that they walk.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._rounds = 0
        self.filters["_counted"] = self._counted

    def _parse(self, source: str, name: str | None, filename: str | None) -> Template:
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all(For):
            loop.iter = Filter(loop.iter, "_counted", [], [], None, None, lineno=loop.lineno, environment=self)
        return tree

    def _counted(self, values: Iterable[Any]) -> Iterator[Any]:
        for value in values:
            self._rounds += 1
            if self._rounds > MOST_ROUNDS:
                raise jinja2.exceptions.SecurityError(f"its loops take more than {MOST_ROUNDS:,} rounds.")
            yield value

    def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
        raise jinja2.exceptions.SecurityError(
            f"it reaches for {attribute!r} of {type(obj).__name__!r}, which is unsafe: take the template from a source you trust."
        )


def _environment() -> ImmutableSandboxedEnvironment:
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols])
    environment.filters["tojson"] = _to_json  # jinja2's own escapes HTML
    environment.globals |= {"raise_exception": _refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}. Compile the checkpoint again.") from error


def _json(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        data = json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {error}. Compile the checkpoint again.") from error
    return data if isinstance(data, dict) else {}


def _named_template(value: Any) -> str | None:
    if isinstance(value, list):  # several, by name
        value = next((item.get("template") for item in value if isinstance(item, dict) and item.get("name") == "default"), None)
    return value if isinstance(value, str) else None


def _content(token: Any) -> str:
    return str(token["content"] if isinstance(token, dict) else token)
