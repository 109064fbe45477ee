"""Mixtures of experts on GPUs: what the bodies of the two ops launch.

`launch_dispatch` serves any number of tokens in five launches: router, choice, sort, and a grouped product for each of the two
layers. `launch_experts` serves the few tokens of a decode step in two. Both leave the sum over a token's experts to torch, for
Inductor makes it part of the residual sum and norm that follow.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from oxfuse.passes.fusions import tuning
from oxfuse.passes.fusions.moe_dispatch.triton_decode import few_down_kernel, few_gate_up_kernel
from oxfuse.passes.fusions.moe_dispatch.triton_grouped import down_kernel, gate_up_kernel
from oxfuse.passes.fusions.moe_dispatch.triton_route import choose_kernel, router_kernel, sort_kernel

MANY_EXPERTS = 64
"""From so many experts on, few tokens choose the same one, and tiles are narrower."""


def launch_dispatch(
    wrap: Callable[[Any], Any],
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
    *,
    arch: int,
) -> Tensor:
    """Do what `moe_dispatch` of reference.py says; `wrap` makes a kernel launchable, `arch` 90 is sm_90."""
    tokens, (experts, hidden), inner = x.reshape(-1, x.shape[-1]), router_weight.shape, gate_up_bias.shape[1] // 2
    if tokens.stride(1) != 1:
        tokens = tokens.contiguous()
    mxfp4, wide, dtype, terms = forms(x, gate_up_scales)
    columns = [not mxfp4 and lies_in_columns(weight) for weight in (gate_up, down)]
    shape: dict[str, Any] = {"dtype": str(x.dtype).removeprefix("torch."), "mxfp4": mxfp4, "many": experts >= MANY_EXPERTS}
    config = {name: tuning.choose(Path(__file__).parent, name, arch, **shape) for name in ("router", "choose", "gate_up", "down")}
    sizes = {"E": experts, "EXPERTS": max(16, triton.next_power_of_2(experts))}
    count = tokens.shape[0]
    order, starts, shares, tokens = _routed(wrap, tokens, router_weight, router_bias, top_k, mxfp4, config, sizes)

    stride = -(-inner // 128) * 128 if mxfp4 else inner
    between = tokens.new_empty(count * top_k, terms, stride, dtype=dtype)
    common = {"H": hidden, "INNER": inner, "STRIDE": stride, "TERMS": terms, "MXFP4": mxfp4, "WIDE": wide, **sizes}
    blocks = config["gate_up"].blocks
    wrap(gate_up_kernel)[(-(-stride // (blocks["ROWS"] // 2)), count * top_k // blocks["PAIRS"] + experts)](
        tokens,
        tokens.stride(0),
        order,
        starts,
        gate_up,
        gate_up if gate_up_scales is None else gate_up_scales,
        gate_up_bias,
        between,
        K=top_k,
        ALPHA=alpha,
        LIMIT=limit,
        COLUMNS=columns[0],
        WARPS=warps(config["gate_up"]),
        **common,
        **config["gate_up"].keywords,
    )
    out, blocks = tokens.new_empty(count * top_k, hidden, dtype=torch.float32), config["down"].blocks
    wrap(down_kernel)[(-(-hidden // blocks["ROWS"]), count * top_k // blocks["PAIRS"] + experts)](
        between,
        order,
        starts,
        down,
        down if down_scales is None else down_scales,
        down_bias,
        shares,
        out,
        COLUMNS=columns[1],
        WARPS=warps(config["down"]),
        **common,
        **config["down"].keywords,
    )
    return out.view(count, top_k, hidden).sum(1).to(x.dtype).view(x.shape)


def _routed(
    wrap: Callable[[Any], Any],
    tokens: Tensor,
    router_weight: Tensor,
    router_bias: Tensor,
    top_k: int,
    shuffle: bool,
    config: dict[str, tuning.Config],
    sizes: dict[str, int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return order and starts as `sort_kernel` makes them, the weights by pair, and the tokens as the products want them."""
    (count, hidden), experts, splits = tokens.shape, sizes["E"], config["router"].blocks["SPLITS"]
    parts = tokens.new_empty(splits, count, experts, dtype=torch.float32)
    shuffled = tokens.new_empty(count, -(-hidden // 128) * 128) if shuffle else tokens
    wrap(router_kernel)[(-(-count // config["router"].blocks["TOKENS"]), splits)](
        tokens,
        router_weight,
        parts,
        shuffled,
        count,
        tokens.stride(0),
        H=hidden,
        SHUFFLE=shuffle,
        **sizes,
        **config["router"].keywords,
    )
    slots = triton.next_power_of_2(top_k)
    block = max(1, config["choose"].blocks["PAIRS"] // slots)
    blocks = -(-count // block)
    launch = {"num_warps": config["choose"].num_warps, "num_stages": config["choose"].num_stages}
    same = {"K": top_k, "TOKENS": block, "SLOTS": slots, **sizes, **launch}
    chosen, order = (tokens.new_empty(count * top_k, dtype=torch.int32) for _ in range(2))
    shares = tokens.new_empty(count * top_k, dtype=torch.float32)
    counts, starts = (tokens.new_empty(size, dtype=torch.int32) for size in ((blocks, experts), (experts + 1,)))
    wrap(choose_kernel)[(blocks,)](parts, router_bias, chosen, shares, counts, count, SPLITS=splits, **same)
    wrap(sort_kernel)[(blocks,)](chosen, counts, order, starts, count, blocks, **same)
    return order, starts, shares, shuffled


def launch_experts(
    wrap: Callable[[Any], Any],
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
    *,
    arch: int,
) -> Tensor:
    """Do what `moe_experts` of reference.py says; `wrap` makes a kernel launchable, `arch` 90 is sm_90.

    Every group of a few tokens that share an expert reads its weights; up to 64 tokens this is the better way.
    """
    x, logits, (count, hidden), experts, inner = (
        x.contiguous(),
        logits.contiguous(),
        x.shape,
        logits.shape[1],
        gate_up_bias.shape[1] // 2,
    )
    mxfp4, wide, dtype, terms = forms(x, gate_up_scales)
    columns = [not mxfp4 and lies_in_columns(weight) for weight in (gate_up, down)]
    shape: dict[str, Any] = {"dtype": str(x.dtype).removeprefix("torch."), "mxfp4": mxfp4}
    first, second = (tuning.choose(Path(__file__).parent, name, arch, **shape) for name in ("few_gate_up", "few_down"))
    pairs, group = count * top_k, first.blocks["TOKENS"]
    between = x.new_empty(pairs, terms, inner, dtype=dtype)
    members, expert_of_pair = (x.new_empty(size, dtype=torch.int32) for size in ((pairs, group), (pairs,)))
    shares, out = (x.new_empty(size, dtype=torch.float32) for size in ((pairs,), (pairs, hidden)))
    common = {"H": hidden, "INNER": inner, "TERMS": terms, "MXFP4": mxfp4, "WIDE": wide}
    wrap(few_gate_up_kernel)[(-(-2 * inner // first.blocks["ROWS"]), pairs)](
        x,
        logits,
        gate_up,
        gate_up if gate_up_scales is None else gate_up_scales,
        gate_up_bias,
        between,
        members,
        expert_of_pair,
        shares,
        count,
        E=experts,
        K=top_k,
        ALPHA=alpha,
        LIMIT=limit,
        EXPERTS=max(16, triton.next_power_of_2(experts)),
        COLUMNS=columns[0],
        WARPS=first.num_warps,
        **common,
        **first.keywords,
    )
    wrap(few_down_kernel)[(-(-hidden // second.blocks["ROWS"]), pairs)](
        between,
        members,
        expert_of_pair,
        shares,
        down,
        down if down_scales is None else down_scales,
        down_bias,
        out,
        COLUMNS=columns[1],
        WARPS=second.num_warps,
        **common,
        **{**second.keywords, "TOKENS": group},
    )
    return out.view(count, top_k, hidden).sum(1).to(x.dtype)


def forms(x: Tensor, scales: Tensor | None) -> tuple[bool, bool, torch.dtype, int]:
    """Return (mxfp4, wide, dtype, terms): whether products are of float32, and what hidden values are stored as, in how many
    terms.

    Decoded weights are bfloat16, which float16 tokens cannot meet without a loss; no model needs that.
    """
    mxfp4 = scales is not None
    wide = x.dtype == torch.float32 or (mxfp4 and x.dtype != torch.bfloat16)
    return mxfp4, wide, torch.float32 if wide else x.dtype, 1 if wide else 2


def lies_in_columns(weight: Tensor) -> bool:
    """Tell whether dense experts [E, out, in] are a view of contiguous [E, in, out]; raise ValueError if they are neither."""
    if weight.is_contiguous():
        return False
    if weight.transpose(1, 2).is_contiguous():
        return True
    raise ValueError(
        f"The kernels take experts that are contiguous or views of their contiguous transposes; these, {[*weight.shape]}, have "
        f"strides {[*weight.stride()]}."
    )


def warps(config: tuning.Config) -> int:
    """Return over how many warps the rows of a tile are spread: an instruction takes 16 rows of a warp."""
    return min(config.num_warps, config.blocks["ROWS"] // 16)
