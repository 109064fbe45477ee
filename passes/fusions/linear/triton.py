"""The GPU kernel of `linear_rows`: few rows times a large matrix, which is read from memory once, 16 bytes a thread.

A program owns ROWS rows of the weight. Its SPLIT warps cut them along K, one piece of DEPTH columns each in every round, and each
multiplies its piece on the tensor cores with the weight as the left operand, so that 8 tokens fill an instruction. The pieces are
added at the end, in a fixed order. Loads run some rounds ahead (num_stages): what keeps the memory busy is bytes in flight, some
30 kB for each multiprocessor of an H200 (4.8 TB/s, about 800 ns). One row goes the same way: to multiply and add in registers
would take as many instructions.

Tables keep ROWS * DEPTH above 256 * num_warps: where one 16-byte load of each thread covers a piece of all rows, Triton 3.7 lays
pieces, not rows, side by side in shared memory, and the eight rows that an `ldmatrix` fetches lie in the same banks.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from oxfuse.passes.fusions import tuning

WIDE = 8192
"""From so many outputs on there are enough rows for larger tiles, which read x less often."""


def launch_linear_rows(
    wrap: Callable[[Any], Any], x: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "none", *, arch: int
) -> Tensor:
    """Launch the kernel; arguments and result as in reference.py. `wrap` makes a kernel launchable, `arch` 90 is sm_90."""
    (outputs, depth), x, weight = weight.shape, x.contiguous(), weight.contiguous()
    config = tuning.choose(Path(__file__).parent, "linear_rows", arch, dtype=dtype_name(x), wide=outputs >= WIDE)
    out = x.new_empty(x.shape[0], outputs)
    grid = (-(-x.shape[0] // config.blocks["TOKENS"]), -(-outputs // config.blocks["ROWS"]))
    wrap(linear_rows_kernel)[grid](
        x,
        weight,
        x if bias is None else bias,
        out,
        x.shape[0],
        BIAS=bias is not None,
        ACTIVATION=activation,
        N=outputs,
        K=depth,
        **config.keywords,
    )
    return out


def dtype_name(x: Tensor) -> str:
    """Return "bfloat16" for torch.bfloat16: tables ask for dtypes by name."""
    return str(x.dtype).removeprefix("torch.")


@triton.jit
def linear_rows_kernel(
    x,
    weight,
    bias,
    out,
    T,
    BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    SPLIT: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """x [T, K], weight [N, K], bias [N], out [T, N]. Program (i, j): tokens from i * TOKENS, outputs from j * ROWS."""
    first = tl.program_id(1) * ROWS
    row = tl.arange(0, ROWS)
    sums = rows_times_tokens(
        x,
        tl.program_id(0) * TOKENS,
        T,
        weight + first.to(tl.int64) * K,
        tl.minimum(row, N - 1 - first),
        K,
        ROWS,
        TOKENS,
        SPLIT,
        DEPTH,
    )
    if BIAS:
        sums += tl.load(bias + first + row, first + row < N, 0.0).to(tl.float32)[:, None]
    sums = activated(sums, ACTIVATION)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    to = out + token[None, :] * N + (first + row)[:, None]
    tl.store(to, sums.to(out.dtype.element_ty), (token < T)[None, :] & (first + row < N)[:, None])


@triton.jit
def activated(x, ACTIVATION: tl.constexpr):
    """Return the activation of that name, in reference.py's sense, of float32 x."""
    tl.static_assert(
        ACTIVATION == "none" or ACTIVATION == "gelu" or ACTIVATION == "gelu_tanh" or ACTIVATION == "relu" or ACTIVATION == "silu"
    )
    if ACTIVATION == "gelu":
        x = 0.5 * x * (1 + tl.math.erf(x * 0.7071067811865476))  # sqrt(1 / 2)
    elif ACTIVATION == "gelu_tanh":
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)  # sqrt(2 / pi)
        x = x * tl.sigmoid(2 * inner)  # 1 + tanh(u) is 2 sigmoid(2 u)
    elif ACTIVATION == "relu":
        x = tl.where(x < 0, 0.0, x)  # a NaN stays one
    elif ACTIVATION == "silu":
        x = x * tl.sigmoid(x)
    return x


@triton.jit
def rows_times_tokens(
    x,
    first,
    T,
    weight,
    rows,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    SPLIT: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Return the products of rows of a matrix with tokens, float32 [ROWS, TOKENS].

    x [T, K] and weight [.., K] are contiguous; `rows` [ROWS] are valid rows of `weight`, in any order; tokens are the TOKENS from
    `first` on, and those beyond T yield 0.
    """
    ROUND: tl.constexpr = SPLIT * DEPTH
    piece = tl.arange(0, SPLIT)[:, None, None] * DEPTH + tl.arange(0, DEPTH)[None, None, :]  # [SPLIT, 1, DEPTH]
    token = first + tl.arange(0, TOKENS)
    ours = (token < T)[None, :, None]
    left = weight + rows[None, :, None] * K + piece  # [SPLIT, ROWS, DEPTH]
    right = x + token[None, :, None] * K + piece  # [SPLIT, TOKENS, DEPTH]
    sums = tl.full([SPLIT, ROWS, TOKENS], 0.0, tl.float32)
    for at in range(0, K, ROUND):
        if K % ROUND == 0:
            a, b = tl.load(left + at), tl.load(right + at, ours, 0.0)
        else:
            inside = piece < K - at
            a, b = tl.load(left + at, inside, 0.0), tl.load(right + at, ours & inside, 0.0)
        sums = tl.dot(a, tl.permute(b, (0, 2, 1)), sums, input_precision="ieee")
    return tl.sum(sums, 0)
