"""Mixture of experts with a clamped SwiGLU: router, experts and combination, as one op or without the router; their registration.

`route`, `experts` and `combine` are separate so that expert parallelism, and checks on machines with little memory, can hold a
slice of the experts: `combine` with the slice's first expert gives a part, and the parts add up. Experts are dense, or MXFP4 as
in the checkpoint (OCP Microscaling Formats 1.0: e2m1 values, low nibble first, one e8m0 scale for 32 values along the input).
"""

from __future__ import annotations

import torch
from torch import Tensor

from oxfuse.passes.fusions.linear.reference import arch_of
from oxfuse.passes.quantise import rounded

PANEL = 16
"""Rows of a panel in the packed layout."""


def moe_dispatch(
    x: Tensor,
    router_weight: Tensor,
    router_bias: Tensor,
    gate_up: Tensor,
    gate_up_scales: Tensor | None,
    gate_up_bias: Tensor,
    down: Tensor,
    down_scales: Tensor | None,
    down_bias: Tensor,
    top_k: int,
    alpha: float,
    limit: float,
    int8_activations: bool = False,
) -> Tensor:
    """Return the weighted sum of the top_k experts' outputs for every token, [..., H], contiguous.

    x [..., H]; router_weight [E, H], router_bias [E]; gate_up_bias [E, 2I], down_bias [E, H]. Without scales gate_up is
    [E, 2I, H] and down [E, H, I] in x's dtype, both contiguous or both views of contiguous [E, H, 2I] and [E, I, H]; with scales
    they are MXFP4: gate_up uint8 [E, 2I, H / 32, 16] with gate_up_scales uint8 [E, 2I, H / 32], down likewise over I; on CPUs
    also packed (packed.py), as [E, P, H / 32, 256] with scales [E, P, H / 32, 16]. Rows are output features; even rows of gate_up
    are the gate, odd ones the up projection. Everything is computed in promote(x.dtype, float32), the hidden values between the
    two products included, and rounded once at the end. With `int8_activations`, on CPUs, what is multiplied with MXFP4 experts is
    `rounded` first. Raises NotImplementedError on devices other than cpu and cuda.
    """
    banks = gate_up, gate_up_scales, gate_up_bias, down, down_scales, down_bias
    if x.device.type == "cuda":
        if int8_activations:
            raise NotImplementedError("oxfuse::moe_dispatch has no kernel for activations of 8 bits on cuda.")
        from oxfuse.passes.fusions.moe_dispatch.triton import launch_dispatch  # only here: triton is slow to import

        args = x, router_weight, router_bias, *banks, top_k, alpha, limit
        return launch_dispatch(torch.library.wrap_triton, *args, arch=arch_of(x.device))
    if x.device.type != "cpu":
        raise NotImplementedError(f"oxfuse::moe_dispatch has no kernel for device {x.device}; it runs on cpu and cuda.")
    tokens = x.flatten(0, -2)
    indices, weights = route(tokens, router_weight, router_bias, top_k)
    total = _mixture(tokens, indices, weights, *banks, alpha, limit, int8_activations)
    return total.to(x.dtype).reshape(x.shape).contiguous()


def moe_experts(
    x: Tensor,
    logits: Tensor,
    gate_up: Tensor,
    gate_up_scales: Tensor | None,
    gate_up_bias: Tensor,
    down: Tensor,
    down_scales: Tensor | None,
    down_bias: Tensor,
    top_k: int,
    alpha: float,
    limit: float,
) -> Tensor:
    """Return what `moe_dispatch` makes of few tokens x [T, H] when the router's logits [T, E] are known, [T, H], contiguous.

    logits are in promote(x.dtype, float32), the rest is as for `moe_dispatch`. Meant for the tokens of a decode step.
    Raises NotImplementedError on devices other than cpu and cuda.
    """
    banks = gate_up, gate_up_scales, gate_up_bias, down, down_scales, down_bias
    if x.device.type == "cuda":
        from oxfuse.passes.fusions.moe_dispatch.triton import launch_experts  # only here: triton is slow to import

        args = x, logits, *banks, top_k, alpha, limit
        return launch_experts(torch.library.wrap_triton, *args, arch=arch_of(x.device))
    if x.device.type != "cpu":
        raise NotImplementedError(f"oxfuse::moe_experts has no kernel for device {x.device}; it runs on cpu and cuda.")
    indices, weights = choose(logits, top_k)
    return _mixture(x, indices, weights, *banks, alpha, limit).to(x.dtype).contiguous()


def _mixture(
    tokens: Tensor,
    indices: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    gate_up_scales: Tensor | None,
    gate_up_bias: Tensor,
    down: Tensor,
    down_scales: Tensor | None,
    down_bias: Tensor,
    alpha: float,
    limit: float,
    int8_activations: bool = False,
) -> Tensor:
    """Return the weighted sum of the chosen experts' outputs for tokens [T, H], in the dtype of `weights`."""
    total = torch.zeros_like(tokens, dtype=weights.dtype)
    for first in range(gate_up.shape[0]):  # one at a time: all experts of a layer in float32 may be more than the memory
        one = slice(first, first + 1)
        scales = [None if part is None else part[one] for part in (gate_up_scales, down_scales)]
        first_bank, second_bank = (gate_up[one], scales[0], gate_up_bias[one]), (down[one], scales[1], down_bias[one])
        output = experts(tokens, *first_bank, *second_bank, alpha, limit, int8_activations)
        total = total + combine(output, indices, weights, first)
    return total


def route(x: Tensor, router_weight: Tensor, router_bias: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Return the chosen experts [T, top_k] (int64) of x [T, H] and their weights, a softmax over the chosen logits alone.

    Logits and weights are in promote(x.dtype, float32).
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    return choose(torch.nn.functional.linear(x.to(wide), router_weight.to(wide), router_bias.to(wide)), top_k)


def choose(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Return the experts of the top_k largest of logits [T, E], [T, top_k] (int64), and a softmax over these logits alone."""
    top, indices = logits.topk(top_k, dim=-1)
    return indices, top.softmax(-1)


def experts(
    x: Tensor,
    gate_up: Tensor,
    gate_up_scales: Tensor | None,
    gate_up_bias: Tensor,
    down: Tensor,
    down_scales: Tensor | None,
    down_bias: Tensor,
    alpha: float,
    limit: float,
    int8_activations: bool = False,
) -> Tensor:
    """Return what every expert held by the tensors makes of every row of x [T, H], as [E, T, H] in promote(x.dtype, float32).

    Weights as for `moe_dispatch`, or slices of them along their first dim. gate = min(gate, limit), up clamped to +-limit,
    hidden = (up + 1) * gate * sigmoid(alpha * gate).
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    enter = rounded if int8_activations else Tensor.to
    if gate_up_scales is not None and down_scales is not None and gate_up_scales.dim() == 4:
        rows = gate_up_bias.shape[1], down_bias.shape[1]
        gate_up, gate_up_scales = unpack(gate_up, rows[0], True), unpack_scales(gate_up_scales, rows[0], True)
        down, down_scales = unpack(down, rows[1], False), unpack_scales(down_scales, rows[1], False)
    first = _dense(gate_up, gate_up_scales, wide).transpose(1, 2)  # [E, H, 2I]
    gate, up = (torch.matmul(enter(x, wide), first) + gate_up_bias.to(wide)[:, None]).unflatten(-1, (-1, 2)).unbind(-1)
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    hidden = (up + 1) * gate * torch.sigmoid(alpha * gate)
    return torch.matmul(enter(hidden, wide), _dense(down, down_scales, wide).transpose(1, 2)) + down_bias.to(wide)[:, None]


def combine(outputs: Tensor, indices: Tensor, weights: Tensor, first: int = 0) -> Tensor:
    """Return for every token the weighted sum of those chosen experts that `outputs` holds, [T, H].

    outputs [E', T, H] of the experts first..first + E'; indices and weights [T, top_k] as `route` returns them. An expert that
    a token did not choose has no influence on it, NaN included.
    """
    local = indices - first
    held = (local >= 0) & (local < outputs.shape[0])
    token = torch.arange(outputs.shape[1], device=outputs.device)[:, None]
    chosen = outputs[local.clamp(0, outputs.shape[0] - 1), token] * weights[..., None]  # [T, top_k, H]
    return torch.where(held[..., None], chosen, 0).sum(1)


def dequantise(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the values of MXFP4 `blocks` [..., K / 32, 16] with `scales` [..., K / 32] (both uint8) as [..., K] in `dtype`."""
    # By arithmetic, not from a table: a table would become one more constant of every program that this is traced into.
    code = torch.stack([blocks & 15, blocks >> 4], -1).flatten(-2)  # [..., K / 32, 32]
    exponent, mantissa = code >> 1 & 3, code & 1
    twice = torch.where(exponent == 0, mantissa, (2 + mantissa) << (exponent - 1).clamp(min=0, max=2)).to(dtype)
    values = torch.where(code < 8, twice, -twice) / 2
    return torch.ldexp(values, scales.to(torch.int32)[..., None] - 127).flatten(-2)


def unpack(panels: Tensor, rows: int, pairs: bool) -> Tensor:
    """Return the blocks [E, rows, K / 32, 16] of packed ones [E, P, K / 32, 256]; `pairs`: even and odd rows by turns."""
    lanes = panels.unflatten(-1, (4, PANEL, 4)).permute(0, 1, 4, 2, 3, 5)  # [E, P, 16, K / 32, 4, 4]
    codes = torch.stack([lanes & 15, lanes >> 4], -1).flatten(-2)  # nibbles: the values 0, 2, 4, 6, 1, 3, 5, 7
    codes = torch.stack([codes[..., :4], codes[..., 4:]], -1).flatten(-3)  # [E, P, 16, K / 32, 32]
    return _in_rows(codes[..., ::2] | codes[..., 1::2] << 4, rows, pairs)


def unpack_scales(panels: Tensor, rows: int, pairs: bool) -> Tensor:
    """Return the scales [E, rows, K / 32] of packed ones [E, P, K / 32, 16]."""
    return _in_rows(panels.transpose(2, 3), rows, pairs)


def _in_rows(panels: Tensor, rows: int, pairs: bool) -> Tensor:
    """Return [E, P, 16, ...] as [E, rows, ...]."""
    turns = 1 + pairs
    parts = [panels[:, first::turns].flatten(1, 2)[:, : rows // turns] for first in range(turns)]
    return torch.stack(parts, 2).flatten(1, 2)


def _dense(weight: Tensor, scales: Tensor | None, dtype: torch.dtype) -> Tensor:
    return weight.to(dtype) if scales is None else dequantise(weight, scales, dtype)


def _fake(x: Tensor, *rest: object) -> Tensor:
    return x.new_empty(x.shape)


torch.library.triton_op("oxfuse::moe_dispatch", moe_dispatch, mutates_args=())
torch.library.triton_op("oxfuse::moe_experts", moe_experts, mutates_args=())
for _op in ("oxfuse::moe_dispatch", "oxfuse::moe_experts"):
    torch.library.register_fake(_op, _fake, allow_override=True)  # the body's own would be slow
