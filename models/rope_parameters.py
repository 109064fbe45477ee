"""The numbers that a rotation depends on, resolved from a `config.json` in transformers 5.23's order (modeling_rope_utils.py).

In: `rope_parameters` or `rope_scaling` of any release, a default theta, what else the model's configuration says. Out: one dict
with `rope_type`, `rope_theta` and, by type, every other number that `rotary.inverse_frequencies` reads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from oxfuse.errors import UserError, shown
from oxfuse.models.configuration import check, is_number

PER_LAYER = ("sliding_attention", "full_attention")


def resolve(
    given: Any, *, kinds: Sequence[str], theta: Any, max_position_embeddings: int, original: Any = None, model: str
) -> dict[str, Any]:
    """Return the rotation's numbers.

    given: the dict of the configuration. kinds: the types that the model can turn by. theta: where `given` has none. original: a
    top-level `original_max_position_embeddings`, which comes before the dict's. Raises UserError for a type that is not among
    `kinds`, and for values that no rotation can have.
    """
    check("rope_parameters", given, isinstance(given, Mapping), "an object or null")
    nested = given.keys() & set(PER_LAYER)
    check("rope_parameters", given, not nested, f"one object for all layers: other rotations per layer type are not {model}")
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in kinds:
        raise UserError(
            f"config.json: rope_type is {shown(kind)}; {model} models turn by {', '.join(map(repr, kinds[:-1]))} or "
            f"{kinds[-1]!r} here. Use a checkpoint with one of these."
        )
    theta = first(given.get("rope_theta"), theta)
    check("rope_theta", theta, is_number(theta) and theta > 1, "a number above 1")
    out: dict[str, Any] = {"rope_type": kind, "rope_theta": theta}
    if kind == "default":
        return out
    original = first(original, given.get("original_max_position_embeddings"), max_position_embeddings)
    check("original_max_position_embeddings", original, is_number(original) and original > 0, "a number above 0")
    factor = given.get("factor")
    if factor is None and kind == "yarn":
        factor = max_position_embeddings / original
    check("factor of rope_parameters", factor, is_number(factor) and factor > 0, "a number above 0")
    if kind == "linear":
        return {**out, "factor": factor}
    if kind == "dynamic":
        check("factor of rope_parameters", factor, factor >= 1, "at least 1 for the dynamic rotation")
        own = max_position_embeddings  # transformers reads the top-level key here, whatever `original` says
        context = first(given.get("context"), own)
        check("context of rope_parameters", context, is_number(context) and context >= own, f"at least {own}")
        return {**out, "factor": factor, "original_max_position_embeddings": own, "context": context}
    # A missing truncate means true, though the released GPT-OSS says false.
    numbers = {"beta_fast": given.get("beta_fast") or 32.0, "beta_slow": given.get("beta_slow") or 1.0}
    for name, value in numbers.items():
        check(name, value, is_number(value) and value > 0, "a number above 0")
    truncate = given.get("truncate", True)
    check("truncate", truncate, isinstance(truncate, bool), "true or false")
    attention = given.get("attention_factor")
    if attention is None:
        attention = _attention_factor(factor, given.get("mscale"), given.get("mscale_all_dim"))
    check("attention_factor", attention, is_number(attention) and attention > 0, "a number above 0")
    yarn = {"truncate": truncate, "original_max_position_embeddings": original, "attention_factor": attention}
    return {**out, "factor": factor, **numbers, **yarn}


def _attention_factor(factor: float, mscale: float | None, mscale_all_dim: float | None) -> float:
    """Return what cos and sin are multiplied by: 0.1 ln(factor) + 1 (YaRN, arXiv:2309.00071, eq. 22)."""

    def scaled(by: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * by * math.log(factor) + 1.0

    if mscale and mscale_all_dim:
        positive = is_number(mscale) and is_number(mscale_all_dim) and min(mscale, mscale_all_dim) > 0
        check("mscale", mscale, positive, "a number above 0, and mscale_all_dim too")
        return scaled(mscale) / scaled(mscale_all_dim)
    return scaled(1.0)


def first(*values: Any) -> Any:
    """Return the first value that is not None."""
    return next((value for value in values if value is not None), None)
