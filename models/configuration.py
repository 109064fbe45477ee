"""What the configurations of all models have in common: reading `config.json`'s keys, checking them, writing them back.

In: the keys of a `config.json`, old or new. Out: one validated, frozen object with transformers' attribute names. A value that no
model can have is a UserError that names the key.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Self

from oxfuse.errors import UserError, shown

PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")

_SIZE = "a positive whole number, less than 2^31"
_MOST_LAYERS, _MOST_HEAD_DIM, _MOST_LABELS = 10_000, 1 << 16, 1 << 20
_MOST_VALUES = 1 << 48
"""Of one tensor: more than any disk holds, and with 8 bytes each still a size that 64 bits count."""


@dataclass(frozen=True, kw_only=True, init=False)
class Configuration:
    """Sizes and constants that every model has. A model's own class adds its keys, their defaults and their checks.

    Keys that mean nothing to the model are kept in `extra`. `rope_parameters` holds `rope_type`, `rope_theta` and every other
    number that the rotation depends on.
    """

    model_type: ClassVar[str]
    sizes: ClassVar[tuple[str, ...]] = (
        "num_hidden_layers", "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "max_position_embeddings",
    )  # fmt: skip
    flags: ClassVar[tuple[str, ...]] = (
        "tie_word_embeddings", "use_cache", "attention_bias", "output_attentions", "output_hidden_states", "return_dict",
    )  # fmt: skip
    positive: ClassVar[tuple[str, ...]] = ()
    not_negative: ClassVar[tuple[str, ...]] = ("initializer_range",)
    dropouts: ClassVar[tuple[str, ...]] = ("attention_dropout", "classifier_dropout")
    optional: ClassVar[tuple[str, ...]] = ("pad_token_id", "bos_token_id", "eos_token_id", "problem_type")
    """Null stays null in these; in any other key it stands for the default."""
    derived: ClassVar[tuple[str, ...]] = ()
    """Null in these is left to `_derive`."""
    rope_keys: ClassVar[tuple[str, ...]] = ("rope_parameters", "rope_scaling", "rope_theta")

    num_hidden_layers: int
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    max_position_embeddings: int
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    rope_parameters: Mapping[str, Any]
    attention_bias: bool = True
    attention_dropout: float = 0.0
    classifier_dropout: float = 0.1
    use_cache: bool = True
    output_attentions: bool = False
    output_hidden_states: bool = False
    return_dict: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    id2label: Mapping[int, str]
    problem_type: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __init__(self, /, **values: Any) -> None:
        model_type = values.pop("model_type", self.model_type)
        if model_type != self.model_type:
            raise UserError(
                f"The configuration's model_type is {model_type!r}, not {self.model_type!r}. Use that model's own class."
            )
        values = self._renamed(values)
        rope = {key: values.pop(key, None) for key in self.rope_keys}
        labels = _labels(values.pop("id2label", None), values.pop("label2id", None), values.pop("num_labels", None))
        for known in fields(self):
            value = values.pop(known.name, known.default)
            if value is None and known.name not in self.optional:
                value = None if known.name in self.derived else known.default
            object.__setattr__(self, known.name, tuple(value) if isinstance(value, list) else value)
        object.__setattr__(self, "extra", values)
        object.__setattr__(self, "id2label", labels)
        for name in ("hidden_size", "num_attention_heads", "num_hidden_layers"):
            check(name, value := getattr(self, name), is_size(value), _SIZE)
        check("num_hidden_layers", layers := self.num_hidden_layers, layers <= _MOST_LAYERS, f"at most {_MOST_LAYERS}")
        self._derive()
        self._validate()
        object.__setattr__(self, "rope_parameters", self._rotation(**rope))

    def _renamed(self, values: dict[str, Any]) -> dict[str, Any]:
        """Return the keys under their names here."""
        return values

    def _derive(self) -> None:
        """Set what follows from other keys where the configuration leaves it open. Layers, heads and hidden size are checked."""

    def _rotation(self, **rope: Any) -> dict[str, Any]:
        """Return `rope_parameters`, resolved from the values of `rope_keys`."""
        raise NotImplementedError

    def _validate(self) -> None:
        for name in self.sizes:
            check(name, value := getattr(self, name), is_size(value), _SIZE)
        for name in self.flags:
            check(name, value := getattr(self, name), isinstance(value, bool), "true or false")
        for name in self.positive:
            check(name, value := getattr(self, name), is_number(value) and value > 0, "a number above 0")
        for name in (*self.not_negative, *self.dropouts):
            check(name, value := getattr(self, name), is_number(value) and value >= 0, "a number of at least 0")
        for name in self.dropouts:
            check(name, value := getattr(self, name), value < 1, "below 1")
        pad, bos, eos = self.pad_token_id, self.bos_token_id, self.eos_token_id
        inside = pad is None or (is_whole(pad) and 0 <= pad < self.vocab_size)
        check("pad_token_id", pad, inside, f"null or a token id below vocab_size, {self.vocab_size}")
        check("bos_token_id", bos, bos is None or is_id(bos), "null or a token id")
        good = all(map(is_id, eos)) if isinstance(eos, tuple) else eos is None or is_id(eos)
        check("eos_token_id", eos, good, "null, a token id or a list of token ids")
        kind = self.problem_type
        check("problem_type", kind, kind is None or kind in PROBLEM_TYPES, f"null or one of {', '.join(PROBLEM_TYPES)}")
        if kind == "single_label_classification":
            check("problem_type", kind, self.num_labels > 1, "regression, or another, since there is only one label")
        self._check_tensor("vocab_size", "hidden_size")

    def _check_tensor(self, *dims: str) -> None:
        values = math.prod(getattr(self, name) for name in dims)
        check(" x ".join(dims), values, values <= _MOST_VALUES, f"at most {_MOST_VALUES}, a tensor's limit")

    @property
    def num_labels(self) -> int:
        """Return how many labels a classification head has."""
        return len(self.id2label)

    @property
    def longest_context(self) -> int:
        """Return how many tokens a sequence may have at most."""
        return self.max_position_embeddings

    def for_context(self, tokens: int) -> Self:
        """Return the configuration for sequences of up to `tokens`: where the rotation depends on that, it is fixed."""
        return self

    def with_values(self, **values: Any) -> Self:
        """Return the configuration with other values of some keys."""
        return type(self)(**{**self.to_dict(), **values})

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON with transformers 5's keys, from which the class makes an equal object."""
        known = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("extra", "id2label")}
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in known.items()}
        labels = {str(number): label for number, label in self.id2label.items()}
        if self.id2label != _labels(None, None, None):
            plain |= {"id2label": labels, "label2id": {label: number for number, label in self.id2label.items()}}
        return {"model_type": self.model_type, **plain, "rope_parameters": dict(self.rope_parameters), **self.extra}

    def _replaced(self, **values: Any) -> Self:
        """Return a copy with other values of checked fields, unchecked."""
        copy = object.__new__(type(self))
        for known in fields(self):
            object.__setattr__(copy, known.name, values.get(known.name, getattr(self, known.name)))
        return copy


def _labels(names: Any, numbers: Any, count: Any) -> dict[int, str]:
    """Return id -> label for 0..num_labels - 1, as transformers reads the three keys: `num_labels` counts without names."""
    if names is None and isinstance(numbers, Mapping) and numbers:
        names = {number: label for label, number in numbers.items()}
    if names is None:
        count = 2 if count is None else count
        check("num_labels", count, is_size(count) and count <= _MOST_LABELS, f"a positive whole number, at most {_MOST_LABELS}")
        return {number: f"LABEL_{number}" for number in range(count)}
    good = isinstance(names, Mapping) and 0 < len(names) <= _MOST_LABELS
    check("id2label", names, good, "an object that gives each label's number its name")
    try:
        found = {int(number): str(label) for number, label in names.items()}
    except (TypeError, ValueError):
        found = {}
    check("id2label", names, sorted(found) == list(range(len(names))), "numbered from 0, without a gap")
    return dict(sorted(found.items()))


def check(name: str, value: Any, good: bool, expected: str) -> None:
    """Raise UserError about the key `name` unless `good`."""
    if not good:
        raise UserError(f"config.json: {name} is {shown(value)}; it must be {expected}. Correct the checkpoint's config.json.")


def check_head_dim(head_dim: int) -> None:
    """Raise UserError if heads are larger than any."""
    check("head_dim", head_dim, head_dim <= _MOST_HEAD_DIM, f"at most {_MOST_HEAD_DIM}")


def is_whole(value: Any) -> bool:
    """Tell whether a value of a JSON file is an integer."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_size(value: Any) -> bool:
    """Tell whether it is a positive integer that fits into 31 bits."""
    return is_whole(value) and 0 < value < 1 << 31


def is_id(value: Any) -> bool:
    """Tell whether it can be a token's number."""
    return is_whole(value) and 0 <= value < 1 << 31


def is_number(value: Any) -> bool:
    """Tell whether it is a number with which one can compute."""
    # Numbers beyond 1e30 mean nothing here, and their products and quotients leave what a float holds.
    return (is_whole(value) or isinstance(value, float)) and -1e30 < value < 1e30
