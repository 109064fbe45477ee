"""Dense layers with weights of 8 bits, in panels of 16 rows for CPUs; the order is that in which vectors read them.

A panel is made of blocks, one for 32 values along the input: 512 bytes, and 16 scales. A block is eight vectors of 64 bytes, four
bytes of each row: of eight values 8 c .. 8 c + 7 one vector has the values 0, 4, 1, 5, the next 2, 6, 3, 7, which is the order
that packed MXFP4 gives its values in. A weight is (byte - 128) * scale; scales are bfloat16.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch.nn.functional import pad

from oxfuse.passes.fusion import Emitter
from oxfuse.passes.fusions.linear_int8 import reference as reference  # registers the op
from oxfuse.passes.fusions.linear_int8.reference import ORDER, PANEL
from oxfuse.passes.graph import OXFUSE, A, args_of, is_op, shape_of
from oxfuse.passes.quantise import BLOCK, Bits, dequantised, quantise
from oxfuse.passes.weights import WeightTable

BITS: Bits = 8
SCALES = torch.bfloat16


@dataclass(frozen=True)
class PackedInt8:
    """Weights [N, K] to bytes in panels, uint8 [N / 16, K / 32, 512], both rounded up."""

    label: str = f"int8, blocks of {BLOCK}, packed in panels of {PANEL}"
    dtype: torch.dtype = torch.uint8
    rows: int = PANEL

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return [N / 16, K / 32, 512]."""
        return (-(-shape[0] // PANEL), -(-shape[1] // BLOCK), PANEL * BLOCK)

    def apply(self, weights: Tensor) -> Tensor:
        """Return the panels."""
        values, _ = quantise(_whole(weights), BITS, SCALES)
        fours = values.unflatten(0, (-1, PANEL)).unflatten(-1, (-1, 4, 8))[..., list(ORDER)].unflatten(-1, (2, 4))
        panels: Tensor = fours.permute(0, 2, 3, 4, 1, 5).flatten(2)  # [P, K / 32, 4, 2, 16, 4]
        return panels

    def restored(self, weights: Tensor) -> Tensor:
        """Return what becomes of weights [N, K], in float32."""
        return dequantised(_whole(weights), BITS, SCALES)[: weights.shape[0], : weights.shape[1]]


@dataclass(frozen=True)
class PackedInt8Scales:
    """Weights [N, K] to the scales of `PackedInt8`, bfloat16 [N / 16, K / 32, 16]."""

    label: str = f"scales of int8, blocks of {BLOCK}, packed in panels of {PANEL}"
    dtype: torch.dtype = SCALES
    rows: int = PANEL

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return [N / 16, K / 32, 16]."""
        return (-(-shape[0] // PANEL), -(-shape[1] // BLOCK), PANEL)

    def apply(self, weights: Tensor) -> Tensor:
        """Return the scales."""
        _, scales = quantise(_whole(weights), BITS, SCALES)
        panels: Tensor = scales.unflatten(0, (-1, PANEL)).transpose(1, 2)
        return panels


def _whole(weights: Tensor) -> Tensor:
    """Return weights [N, K] with zeros up to whole panels and blocks."""
    return pad(weights, (0, -weights.shape[1] % BLOCK, 0, -weights.shape[0] % PANEL))


def pack_linears(module: fx.GraphModule, weights: WeightTable, *, int8_activations: bool) -> list[list[str]]:
    """Let the graph's dense layers read weights of 8 bits, in place; return the checkpoint's name of each one's weight.

    A weight that something else reads too, as the embedding reads that of a tied head, stays as it is: it has but one value.
    """
    packed = []
    readers = [
        (weights[str(read.target)].source, user) for read in module.graph.nodes if read.op == "get_attr" for user in read.users
    ]
    shared = {source for source, user in readers if not is_op(user, A.linear.default)}
    for node in [node for node in module.graph.nodes if is_op(node, A.linear.default)]:
        x, weight, bias = (*args_of(node), None)[:3]
        name = str(weight.target)
        if (
            weight.op != "get_attr"
            or weights[name].encoding != "dense"
            or weights[name].computed
            or weights[name].source in shared
        ):
            continue
        emitter = Emitter(module=module, weights=weights, like=node)
        with module.graph.inserting_before(node):
            stored = [
                emitter.weight(f"{name}_{part}", weights[name].then(step, step.dtype))
                for part, step in (("int8", PackedInt8()), ("int8_scales", PackedInt8Scales()))
            ]
            new = emitter.call(OXFUSE.linear_int8.default, x, *stored, bias, shape_of(weight)[0], int8_activations)
        node.replace_all_uses_with(new)
        module.graph.erase_node(node)
        packed.append([weights[name].source])
    return packed
