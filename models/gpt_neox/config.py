"""The configuration of a GPT-NeoX model, whichever release's key names a checkpoint uses.

In: the keys of a `config.json`: of transformers 5 (`rope_parameters`) or of 4 (`rotary_pct`, `rotary_emb_base`, `rope_scaling`).
Out: one validated object with transformers' attribute names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

from oxfuse.models.configuration import Configuration, check, check_head_dim, is_number
from oxfuse.models.rope_parameters import first, resolve

ACTIVATIONS = ("gelu", "gelu_fast", "gelu_new", "relu", "silu")
ATTENTIONS = ("eager", "sdpa")
_THETA, _ROTATED = 10000.0, 0.25


@dataclass(frozen=True, kw_only=True, init=False)
class GPTNeoXConfig(Configuration):
    """Sizes and constants of a GPT-NeoX model; the defaults are those of transformers 5.23, which are GPT-NeoX-20B's.

    Takes the keys of either kind of `config.json` as keyword arguments and raises UserError on a value that no model can have.
    A top-level `rope_theta` or `partial_rotary_factor` is not read, as in transformers. There, the dynamic rotation depends on
    the length of a call; here it is fixed by `for_context`, and equals theirs up to `max_position_embeddings` tokens.
    """

    model_type: ClassVar[str] = "gpt_neox"
    flags: ClassVar[tuple[str, ...]] = (*Configuration.flags, "use_parallel_residual")
    positive: ClassVar[tuple[str, ...]] = ("layer_norm_eps",)
    dropouts: ClassVar[tuple[str, ...]] = (*Configuration.dropouts, "hidden_dropout")
    rope_keys: ClassVar[tuple[str, ...]] = ("rope_parameters", "rope_scaling", "rotary_emb_base", "rotary_pct")

    vocab_size: int = 50432
    hidden_size: int = 6144
    num_hidden_layers: int = 44
    num_attention_heads: int = 64
    intermediate_size: int = 24576
    hidden_act: str = "gelu"
    hidden_dropout: float = 0.0
    max_position_embeddings: int = 2048
    layer_norm_eps: float = 1e-5
    bos_token_id: int | None = 0
    eos_token_id: int | tuple[int, ...] | None = 2
    use_parallel_residual: bool = True
    attn_implementation: str = "eager"

    def __init__(self, /, **values: Any) -> None:
        super().__init__(**values)

    def _validate(self) -> None:
        super()._validate()
        size, heads = self.hidden_size, self.num_attention_heads
        check("hidden_size", size, size % heads == 0, f"a multiple of num_attention_heads, {heads}")
        check_head_dim(self.head_dim)
        own = self.extra.get("head_dim")
        check("head_dim", own, own in (None, self.head_dim), f"absent or hidden_size / num_attention_heads, {self.head_dim}")
        check("hidden_act", self.hidden_act, self.hidden_act in ACTIVATIONS, f"one of {', '.join(ACTIVATIONS)}")
        kind = self.attn_implementation
        check("attn_implementation", kind, kind in ATTENTIONS, f"one of {', '.join(ATTENTIONS)}")
        quantised = self.extra.get("quantization_config")
        check("quantization_config", quantised, not quantised, "absent: oxfuse reads unquantised GPT-NeoX checkpoints")
        self._check_tensor("hidden_size", "intermediate_size")

    def _rotation(self, **rope: Any) -> dict[str, Any]:
        given = rope["rope_scaling"] or rope["rope_parameters"] or {}
        resolved = resolve(
            given,
            kinds=("default", "linear", "dynamic", "yarn"),
            theta=first(rope["rotary_emb_base"], _THETA),
            max_position_embeddings=self.max_position_embeddings,
            original=self.extra.get("original_max_position_embeddings"),
            model="GPT-NeoX",
        )
        part = first(given.get("partial_rotary_factor"), rope["rotary_pct"], _ROTATED)
        dim = int(self.head_dim * part) if is_number(part) and part > 0 else 0
        check("rotary_pct", part, dim > 0 and dim + dim % 2 <= self.head_dim, f"a part of the {self.head_dim} dims of a head")
        kind = resolved["rope_type"]
        check("rotary_pct", part, kind != "yarn" or dim % 2 == 0, "an even number of dims under YaRN")
        check("rotary_pct", part, kind != "dynamic" or dim > 2, "more than 2 dims under the dynamic rotation")
        return {**resolved, "partial_rotary_factor": part}

    @property
    def head_dim(self) -> int:
        """Return the size of a head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def rotary_dim(self) -> int:
        """Return the size that the rotation's frequencies are computed for; an odd one turns one dim more."""
        return int(self.head_dim * self.rope_parameters["partial_rotary_factor"])

    @property
    def longest_context(self) -> int:
        """Return the most tokens of a sequence: with the dynamic rotation, `factor` times what the model was trained for."""
        rope = self.rope_parameters
        return int(self.max_position_embeddings * (rope["factor"] if rope["rope_type"] == "dynamic" else 1))

    def for_context(self, tokens: int) -> Self:
        """Return the configuration with the dynamic rotation as it is for sequences of `tokens`."""
        if self.rope_parameters["rope_type"] != "dynamic":
            return self
        context = max(tokens, self.max_position_embeddings)
        return self._replaced(rope_parameters={**self.rope_parameters, "context": context})
