"""Find attention whose mask is handed in, or hides what a cache has room for: what `sink_attention` leaves, and no more.

Anchors and forms are those of `sink_attention`. A mask that is made of the sequence's own positions alone is that fusion's to
judge: where it was not causal or a window, this is not the attention that the model is known for. Positions that a caller
chooses may tell several sequences in a row apart, so that their mask is one that is handed in.
"""

from __future__ import annotations

import torch
from torch import fx

from oxfuse.passes.fusion import Emitter, Fusion, Match
from oxfuse.passes.fusions.masked_attention import reference as reference  # registers the op
from oxfuse.passes.fusions.sink_attention.pattern import anchors, parts_of, require_kernel
from oxfuse.passes.graph import (
    OXFUSE,
    A,
    ancestors,
    as_node,
    dtype_of,
    is_chosen,
    is_op,
    is_tensor,
    require,
    same_size,
    shape_of,
    values_behind,
)
from oxfuse.passes.weights import WeightTable


def match(anchor: fx.Node, weights: WeightTable) -> Match:
    """Return the match around a softmax or SDPA node, or refuse."""
    parts = parts_of(anchor)
    q, k, v, mask = parts.q, parts.k, parts.v, as_node(parts.mask)
    require(not parts.causal, "is_causal with keys of another length", anchor)
    shape = shape_of(mask)
    fits = len(shape) == 4 and shape[1] == 1 and same_size(shape[3], shape_of(k)[2])
    fits = fits and all(same_size(shape[i], wanted) or shape[i] == 1 for i, wanted in ((0, shape_of(q)[0]), (2, shape_of(q)[2])))
    require(fits, f"the mask has shape {[*shape]}, not one plane for all heads of a sequence", mask)
    angles = ancestors([node for node in anchor.graph.nodes if is_op(node, A.cos.default, A.sin.default)])
    given = any(is_chosen(node) or (is_tensor(node) and node not in angles) for node in values_behind(mask))
    given = given or not same_size(shape_of(q)[2], shape_of(k)[2])
    require(given, "the mask follows from positions, and is neither causal nor a causal window", mask)
    require_kernel(q)
    require(dtype_of(mask).is_floating_point or dtype_of(mask) == torch.bool, f"the mask is {dtype_of(mask)}", mask)

    def emit(to: Emitter) -> tuple[fx.Node, ...]:
        tokens_first = [to.call(A.transpose.int, x, 1, 2) for x in (q, k, v)]
        new = to.call(OXFUSE.masked_attention.default, *tokens_first, parts.sink, mask, parts.scale)
        return (to.call(A.transpose.int, new, 1, 2),)

    return Match(inputs=(q, k, v, mask), outputs=(parts.out,), emit=emit)


FUSION = Fusion(name="masked_attention", anchors=anchors, match=match, after=("sink_attention",), live=True)
