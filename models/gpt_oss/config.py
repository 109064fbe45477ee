"""The configuration of a GPT-OSS model, whichever release's key names a checkpoint uses.

In: the keys of a `config.json`: of transformers 5 (`rope_parameters`), of transformers 4 (`rope_theta`, `rope_scaling`), or of
OpenAI's `original/` files (`num_experts`, `rope_ntk_alpha`, ...). Out: one validated object with transformers' attribute names.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from oxfuse.errors import UserError, shown

SLIDING, FULL = "sliding_attention", "full_attention"

_THETA = 150000.0
_RELEASED_YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
_ALIASES = {"num_experts": "num_local_experts", "experts_per_token": "num_experts_per_tok"}
_OPTIONAL = ("sliding_window", "pad_token_id", "bos_token_id", "eos_token_id")
_SIZES = (
    "num_hidden_layers", "num_local_experts", "vocab_size", "hidden_size", "intermediate_size", "head_dim", "num_attention_heads",
    "num_key_value_heads", "max_position_embeddings", "num_experts_per_tok",
)  # fmt: skip
_FLAGS = (
    "tie_word_embeddings", "output_router_logits", "use_cache", "attention_bias", "output_attentions", "output_hidden_states",
    "return_dict",
)  # fmt: skip
_SIZE = "a positive whole number, less than 2^31"
_MOST_LAYERS, _MOST_HEAD_DIM = 10_000, 1 << 16
_MOST_VALUES = 1 << 48
"""Of one tensor: more than any disk holds, and with 8 bytes each still a size that 64 bits count."""
_POSITIVE = ("rms_norm_eps", "swiglu_alpha", "swiglu_limit")
_NOT_NEGATIVE = ("initializer_range", "router_aux_loss_coef", "attention_dropout")


@dataclass(frozen=True, kw_only=True, init=False)
class GptOssConfig:
    """Sizes and constants of a GPT-OSS model; the defaults are those of transformers 5.23.

    Takes the keys of any of the three kinds of `config.json` as keyword arguments and raises UserError on a value that no model
    can have. Keys that mean nothing to the model are kept in `extra`. `rope_parameters` holds `rope_type`, `rope_theta` and,
    for YaRN, every number that the rotation depends on. `rope_scaling: null` without `rope_parameters` means YaRN with
    the released model's numbers, as in transformers 5.23; 4.56 read it as no scaling.
    """

    num_hidden_layers: int = 36
    num_local_experts: int = 128
    vocab_size: int = 201088
    hidden_size: int = 2880
    intermediate_size: int = 2880
    head_dim: int = 64
    num_attention_heads: int = 64
    num_key_value_heads: int = 8
    sliding_window: int | None = 128
    tie_word_embeddings: bool = False
    hidden_act: str = "silu"
    initializer_range: float = 0.02
    max_position_embeddings: int = 131072
    rms_norm_eps: float = 1e-5
    rope_parameters: Mapping[str, Any]
    attention_dropout: float = 0.0
    num_experts_per_tok: int = 4
    swiglu_alpha: float = 1.702
    swiglu_limit: float = 7.0
    router_aux_loss_coef: float = 0.001
    output_router_logits: bool = False
    use_cache: bool = True
    layer_types: tuple[str, ...]
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    attention_bias: bool = True
    output_attentions: bool = False
    output_hidden_states: bool = False
    return_dict: bool = True
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __init__(self, /, **values: Any) -> None:
        model_type = values.pop("model_type", "gpt_oss")
        if model_type != "gpt_oss":
            raise UserError(f"The configuration's model_type is {model_type!r}, not 'gpt_oss'. Use that model's own class.")
        if is_original(values):
            values = _from_original(values)
        _resolve_aliases(values)
        rope = {key: values.pop(key, None) for key in ("rope_parameters", "rope_scaling", "rope_theta")}
        for known in fields(self):
            value = values.pop(known.name, known.default)
            if value is None and known.name not in _OPTIONAL:
                value = known.default if known.name not in ("head_dim", "num_key_value_heads") else None
            object.__setattr__(self, known.name, tuple(value) if isinstance(value, list) else value)
        object.__setattr__(self, "extra", values)
        self._derive()
        self._validate()
        object.__setattr__(self, "rope_parameters", _rope_parameters(**rope, config=self))

    def _derive(self) -> None:
        for name in ("hidden_size", "num_attention_heads", "num_hidden_layers"):
            _check(name, value := getattr(self, name), _is_size(value), _SIZE)
        _check("num_hidden_layers", layers := self.num_hidden_layers, layers <= _MOST_LAYERS, f"at most {_MOST_LAYERS}")
        if self.head_dim is None:
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        kinds: object = self.layer_types
        if kinds is MISSING:
            alternate = tuple((SLIDING, FULL)[i % 2] for i in range(self.num_hidden_layers))
            object.__setattr__(self, "layer_types", alternate)

    def _validate(self) -> None:
        for name in _SIZES:
            _check(name, value := getattr(self, name), _is_size(value), _SIZE)
        for name in _FLAGS:
            _check(name, value := getattr(self, name), isinstance(value, bool), "true or false")
        for name in _POSITIVE:
            _check(name, value := getattr(self, name), _is_number(value) and value > 0, "a number above 0")
        for name in _NOT_NEGATIVE:
            _check(name, value := getattr(self, name), _is_number(value) and value >= 0, "a number of at least 0")
        _check("attention_dropout", self.attention_dropout, self.attention_dropout < 1, "below 1")
        _check("head_dim", self.head_dim, self.head_dim % 2 == 0, "even, since RoPE turns its two halves")
        _check("head_dim", self.head_dim, self.head_dim <= _MOST_HEAD_DIM, f"at most {_MOST_HEAD_DIM}")
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        _check("num_attention_heads", heads, heads % groups == 0, f"a multiple of num_key_value_heads, {groups}")
        experts, chosen = self.num_local_experts, self.num_experts_per_tok
        _check("num_experts_per_tok", chosen, chosen <= experts, f"at most num_local_experts, {experts}")
        kinds, layers = self.layer_types, self.num_hidden_layers
        listed = isinstance(kinds, tuple) and all(kind in (SLIDING, FULL) for kind in kinds)
        _check("layer_types", kinds, listed, f"a list of {SLIDING!r} and {FULL!r}")
        _check("layer_types", kinds, len(kinds) == layers, f"one entry for each of the {layers} layers")
        window, slides = self.sliding_window, SLIDING in kinds
        _check("sliding_window", window, _is_size(window) or (window is None and not slides), "a positive whole number of tokens")
        pad = self.pad_token_id
        inside = pad is None or (_is_whole(pad) and 0 <= pad < self.vocab_size)
        _check("pad_token_id", pad, inside, f"null or a token id below vocab_size, {self.vocab_size}")
        bos, eos = self.bos_token_id, self.eos_token_id
        _check("bos_token_id", bos, bos is None or _is_id(bos), "null or a token id")
        good = all(map(_is_id, eos)) if isinstance(eos, tuple) else eos is None or _is_id(eos)
        _check("eos_token_id", eos, good, "null, a token id or a list of token ids")
        quantised = self.extra.get("quantization_config")
        _check("quantization_config", quantised, quantised is None or isinstance(quantised, Mapping), "an object or null")
        for sizes in (
            ("vocab_size", "hidden_size"),
            ("num_attention_heads", "head_dim", "hidden_size"),
            ("num_local_experts", "hidden_size", "intermediate_size"),
        ):
            values = math.prod(getattr(self, name) for name in sizes)
            _check(" x ".join(sizes), values, values <= _MOST_VALUES, f"at most {_MOST_VALUES}, a tensor's limit")

    @property
    def num_experts(self) -> int:
        """Return `num_local_experts` under transformers' other name for it."""
        return self.num_local_experts

    def window(self, layer: int) -> int | None:
        """Return how many keys a query of `layer` sees, itself included; None where it sees all before it."""
        return self.sliding_window if self.layer_types[layer] == SLIDING else None

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON with transformers 5's keys, from which `GptOssConfig(**...)` makes an equal object."""
        known = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "extra"}
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in known.items()}
        return {"model_type": "gpt_oss", **plain, "rope_parameters": dict(self.rope_parameters), **self.extra}


def is_original(values: Mapping[str, Any]) -> bool:
    """Tell whether these are the keys of OpenAI's own `original/config.json`."""
    return "num_experts" in values and bool(values.keys() & {"rope_ntk_alpha", "rope_ntk_beta"})


def _from_original(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return transformers' keys for those of gpt_oss/torch/model.py's ModelConfig, whose defaults are the released model's."""
    values = dict(values)
    context, factor = values.pop("initial_context_length", 4096), values.pop("rope_scaling_factor", 32.0)
    _check("initial_context_length", context, _is_size(context), _SIZE)
    _check("rope_scaling_factor", factor, _is_number(factor) and factor > 0, "a number above 0")
    rope = {
        "rope_type": "yarn",
        "rope_theta": values.pop("rope_theta", _THETA),
        "factor": factor,
        "beta_fast": values.pop("rope_ntk_beta", 32.0),
        "beta_slow": values.pop("rope_ntk_alpha", 1.0),
        "truncate": False,
        "original_max_position_embeddings": context,
    }
    return {"max_position_embeddings": int(context * factor), "rope_parameters": rope, **values}


def _resolve_aliases(values: dict[str, Any]) -> None:
    for alias, name in _ALIASES.items():
        value = values.pop(alias, None)
        if value is not None and values.setdefault(name, value) != value:
            raise UserError(
                f"config.json: {alias} is {shown(value)} but {name} is {shown(values[name])}; they mean the same. Remove one."
            )


def _rope_parameters(rope_parameters: Any, rope_scaling: Any, rope_theta: Any, config: GptOssConfig) -> dict[str, Any]:
    """Return the rotation's numbers, resolved in the order of transformers 5.23 (modeling_rope_utils.py)."""
    given = rope_scaling or rope_parameters
    rope: Any = dict(_RELEASED_YARN) if given is None else given
    _check("rope_parameters", rope, isinstance(rope, Mapping), "an object or null")
    nested = rope.keys() & {SLIDING, FULL}
    _check("rope_parameters", rope, not nested, "one object for all layers: other rotations per layer type are not GPT-OSS")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "linear", "yarn"):
        raise UserError(
            f"config.json: rope_type is {shown(kind)}; GPT-OSS models turn by 'yarn', 'default' or 'linear' here. "
            "Use a checkpoint with one of these."
        )
    part = rope.get("partial_rotary_factor", config.extra.get("partial_rotary_factor"))
    _check("partial_rotary_factor", part, part in (None, 1), "1 or absent: GPT-OSS turns whole heads")
    theta = rope.get("rope_theta")
    theta = _first(theta, rope_theta, _THETA)
    _check("rope_theta", theta, _is_number(theta) and theta > 1, "a number above 1")
    out: dict[str, Any] = {"rope_type": kind, "rope_theta": theta}
    if kind == "default":
        return out
    original = config.extra.get("original_max_position_embeddings")
    original = _first(original, rope.get("original_max_position_embeddings"), config.max_position_embeddings)
    _check("original_max_position_embeddings", original, _is_number(original) and original > 0, "a number above 0")
    factor = rope.get("factor")
    if factor is None and kind == "yarn":
        factor = config.max_position_embeddings / original
    _check("factor of rope_parameters", factor, _is_number(factor) and factor > 0, "a number above 0")
    if kind == "linear":
        return {**out, "factor": factor}
    # A missing truncate means true, though the released model says false.
    numbers = {"beta_fast": rope.get("beta_fast") or 32.0, "beta_slow": rope.get("beta_slow") or 1.0}
    for name, value in numbers.items():
        _check(name, value, _is_number(value) and value > 0, "a number above 0")
    truncate = rope.get("truncate", True)
    _check("truncate", truncate, isinstance(truncate, bool), "true or false")
    attention = rope.get("attention_factor")
    if attention is None:
        attention = _attention_factor(factor, rope.get("mscale"), rope.get("mscale_all_dim"))
    _check("attention_factor", attention, _is_number(attention) and attention > 0, "a number above 0")
    yarn = {"truncate": truncate, "original_max_position_embeddings": original, "attention_factor": attention}
    return {**out, "factor": factor, **numbers, **yarn}


def _attention_factor(factor: float, mscale: float | None, mscale_all_dim: float | None) -> float:
    """Return what cos and sin are multiplied by: 0.1 ln(factor) + 1 (YaRN, arXiv:2309.00071, eq. 22)."""

    def scaled(by: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * by * math.log(factor) + 1.0

    if mscale and mscale_all_dim:
        positive = _is_number(mscale) and _is_number(mscale_all_dim) and min(mscale, mscale_all_dim) > 0
        _check("mscale", mscale, positive, "a number above 0, and mscale_all_dim too")
        return scaled(mscale) / scaled(mscale_all_dim)
    return scaled(1.0)


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _check(name: str, value: Any, good: bool, expected: str) -> None:
    if not good:
        raise UserError(f"config.json: {name} is {shown(value)}; it must be {expected}. Correct the checkpoint's config.json.")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_size(value: Any) -> bool:
    return _is_whole(value) and 0 < value < 1 << 31


def _is_id(value: Any) -> bool:
    return _is_whole(value) and 0 <= value < 1 << 31


def _is_number(value: Any) -> bool:
    # Numbers beyond 1e30 mean nothing here, and their products and quotients leave what a float holds.
    return (_is_whole(value) or isinstance(value, float)) and -1e30 < value < 1e30
