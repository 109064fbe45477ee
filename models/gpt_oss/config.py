"""The configuration of a GPT-OSS model, whichever release's key names a checkpoint uses.

In: the keys of a `config.json`: of transformers 5 (`rope_parameters`), of transformers 4 (`rope_theta`, `rope_scaling`), or of
OpenAI's `original/` files (`num_experts`, `rope_ntk_alpha`, ...). Out: one validated object with transformers' attribute names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from typing import Any, ClassVar

from oxfuse.errors import UserError, shown
from oxfuse.models.configuration import Configuration, check, check_head_dim, is_number, is_size
from oxfuse.models.rope_parameters import first, resolve

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


@dataclass(frozen=True, kw_only=True, init=False)
class GptOssConfig(Configuration):
    """Sizes and constants of a GPT-OSS model; the defaults are those of transformers 5.23.

    Takes the keys of any of the three kinds of `config.json` as keyword arguments and raises UserError on a value that no model
    can have. `rope_scaling: null` without `rope_parameters` means YaRN with the released model's numbers, as in transformers
    5.23; 4.56 read it as no scaling.
    """

    model_type: ClassVar[str] = "gpt_oss"
    sizes: ClassVar[tuple[str, ...]] = (
        *Configuration.sizes, "num_local_experts", "head_dim", "num_key_value_heads", "num_experts_per_tok",
    )  # fmt: skip
    flags: ClassVar[tuple[str, ...]] = (*Configuration.flags, "output_router_logits")
    positive: ClassVar[tuple[str, ...]] = ("rms_norm_eps", "swiglu_alpha", "swiglu_limit")
    not_negative: ClassVar[tuple[str, ...]] = (*Configuration.not_negative, "router_aux_loss_coef")
    optional: ClassVar[tuple[str, ...]] = (*Configuration.optional, "sliding_window")
    derived: ClassVar[tuple[str, ...]] = ("head_dim", "num_key_value_heads")

    num_hidden_layers: int = 36
    num_local_experts: int = 128
    vocab_size: int = 201088
    hidden_size: int = 2880
    intermediate_size: int = 2880
    head_dim: int = 64
    num_attention_heads: int = 64
    num_key_value_heads: int = 8
    sliding_window: int | None = 128
    hidden_act: str = "silu"
    max_position_embeddings: int = 131072
    rms_norm_eps: float = 1e-5
    num_experts_per_tok: int = 4
    swiglu_alpha: float = 1.702
    swiglu_limit: float = 7.0
    router_aux_loss_coef: float = 0.001
    output_router_logits: bool = False
    layer_types: tuple[str, ...]

    def __init__(self, /, **values: Any) -> None:
        super().__init__(**values)

    def _renamed(self, values: dict[str, Any]) -> dict[str, Any]:
        if is_original(values):
            values = _from_original(values)
        for alias, name in _ALIASES.items():
            value = values.pop(alias, None)
            if value is not None and values.setdefault(name, value) != value:
                raise UserError(
                    f"config.json: {alias} is {shown(value)} but {name} is {shown(values[name])}; they mean the same. Remove one."
                )
        if values.get("classifier_dropout") is None and values.get("hidden_dropout") is not None:
            values["classifier_dropout"] = values["hidden_dropout"]  # where transformers' token classifier looks next
        return values

    def _derive(self) -> None:
        if self.head_dim is None:
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        kinds: object = self.layer_types
        if kinds is MISSING:
            alternate = tuple((SLIDING, FULL)[i % 2] for i in range(self.num_hidden_layers))
            object.__setattr__(self, "layer_types", alternate)

    def _validate(self) -> None:
        super()._validate()
        check("head_dim", self.head_dim, self.head_dim % 2 == 0, "even, since RoPE turns its two halves")
        check_head_dim(self.head_dim)
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        check("num_attention_heads", heads, heads % groups == 0, f"a multiple of num_key_value_heads, {groups}")
        experts, chosen = self.num_local_experts, self.num_experts_per_tok
        check("num_experts_per_tok", chosen, chosen <= experts, f"at most num_local_experts, {experts}")
        kinds, layers = self.layer_types, self.num_hidden_layers
        listed = isinstance(kinds, tuple) and all(kind in (SLIDING, FULL) for kind in kinds)
        check("layer_types", kinds, listed, f"a list of {SLIDING!r} and {FULL!r}")
        check("layer_types", kinds, len(kinds) == layers, f"one entry for each of the {layers} layers")
        window, slides = self.sliding_window, SLIDING in kinds
        check("sliding_window", window, is_size(window) or (window is None and not slides), "a positive whole number of tokens")
        quantised = self.extra.get("quantization_config")
        check("quantization_config", quantised, quantised is None or isinstance(quantised, Mapping), "an object or null")
        self._check_tensor("num_attention_heads", "head_dim", "hidden_size")
        self._check_tensor("num_local_experts", "hidden_size", "intermediate_size")

    def _rotation(self, **rope: Any) -> dict[str, Any]:
        given = rope["rope_scaling"] or rope["rope_parameters"]
        resolved = resolve(
            dict(_RELEASED_YARN) if given is None else given,
            kinds=("yarn", "default", "linear"),
            theta=first(rope["rope_theta"], _THETA),
            max_position_embeddings=self.max_position_embeddings,
            original=self.extra.get("original_max_position_embeddings"),
            model="GPT-OSS",
        )
        part = (given or {}).get("partial_rotary_factor", self.extra.get("partial_rotary_factor"))
        check("partial_rotary_factor", part, part in (None, 1), "1 or absent: GPT-OSS turns whole heads")
        return resolved

    @property
    def num_experts(self) -> int:
        """Return `num_local_experts` under transformers' other name for it."""
        return self.num_local_experts

    def window(self, layer: int) -> int | None:
        """Return how many keys a query of `layer` sees, itself included; None where it sees all before it."""
        return self.sliding_window if self.layer_types[layer] == SLIDING else None


def is_original(values: Mapping[str, Any]) -> bool:
    """Tell whether these are the keys of OpenAI's own `original/config.json`."""
    return "num_experts" in values and bool(values.keys() & {"rope_ntk_alpha", "rope_ntk_beta"})


def _from_original(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return transformers' keys for those of gpt_oss/torch/model.py's ModelConfig, whose defaults are the released model's."""
    values = dict(values)
    context, factor = values.pop("initial_context_length", 4096), values.pop("rope_scaling_factor", 32.0)
    check("initial_context_length", context, is_size(context), "a positive whole number, less than 2^31")
    check("rope_scaling_factor", factor, is_number(factor) and factor > 0, "a number above 0")
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
