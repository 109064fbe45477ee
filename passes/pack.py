"""Give weights the layouts that the CPU's kernels read, and the number of bits that the compile asks for.

MXFP4 experts become panels, which loses nothing. With `dense="int8"` dense layers get weights of 8 bits, and with
`activations="int8"` what is multiplied with weights of 8 bits and fewer is rounded to 8 bits too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import fx

from oxfuse.errors import UserError
from oxfuse.passes.fusions.linear_int8.packed import pack_linears
from oxfuse.passes.fusions.moe_dispatch.packed import pack_experts
from oxfuse.passes.manager import PassResult
from oxfuse.passes.weights import WeightTable

Precision = Literal["exact", "int8"]


@dataclass(frozen=True, kw_only=True)
class Packing:
    """What the kernels of a CPU are to read: `dense` weights as they are or in 8 bits, `activations` as they are or rounded."""

    dense: Precision = "exact"
    activations: Precision = "exact"


@dataclass(frozen=True, kw_only=True)
class Packed:
    """What was packed. `rounded` names the checkpoint's weights that rounded activations are multiplied with."""

    results: tuple[PassResult, ...]
    rounded: frozenset[str]


def pack_weights(module: fx.GraphModule, weights: WeightTable, packing: Packing) -> Packed:
    """Rewrite the graph's calls and the table's recipes in place.

    Raises UserError where activations shall be rounded and nothing has weights of 8 bits or fewer.
    """
    rounded = packing.activations == "int8"
    calls = {"pack_experts": pack_experts(module, weights, int8_activations=rounded)}
    if packing.dense == "int8":
        calls["pack_linears"] = pack_linears(module, weights, int8_activations=rounded)
    sources = frozenset(name for found in calls.values() for names in found for name in names)
    if rounded and not sources:
        raise UserError(
            "activations is 'int8', but the model has no weights of 8 bits or fewer to multiply them with: no experts in MXFP4, "
            "and dense is 'exact'. Leave it at exact, or give dense='int8' too."
        )
    module.recompile()
    return Packed(
        results=tuple(PassResult(name=name, count=len(found)) for name, found in calls.items()),
        rounded=sources if rounded else frozenset(),
    )
