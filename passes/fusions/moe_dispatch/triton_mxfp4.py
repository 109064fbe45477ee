"""MXFP4 weights as the left operand of a product on tensor cores: read as words of 8 values, decoded in registers.

Two values of a word lie 16 bits apart, so that masks and shifts decode two at a time: their bits become those of two bfloat16,
2 ** -126 times what they mean, and one multiplication by a power of two brings in the scale, exactly. What the tensor cores get
is 2 ** -LIFT times the weight, for the powers of two that bfloat16 has are not enough for both; sums are multiplied by 2 ** LIFT
in float32. So scale bytes from 27 to 160 are exact, larger ones give infinities or NaN, and smaller ones lose what is below 2 **
-101.

Decoded values come in an order of their own: a thread holds 16 bytes of a row, and the tensor cores ask every thread for pairs of
neighbours along K. The other operand is laid out to match. Tiles are shaped so that Triton, which gives 16 bytes to a thread, the
last dims to the threads of a warp, and what is left to warps, then to registers, spreads words just as an mma instruction wants
its left operand: thread 4 g + t holds piece t of rows g and g + 8. So a decoded tile never moves between threads.
"""

from __future__ import annotations

import triton
import triton.language as tl

LIFT = tl.constexpr(32)
UNLIFT = tl.constexpr(2.0**32)


@triton.jit
def decode(words, scales):
    """Return words uint32 [A, B, C, 4, 4] with scales uint8 [A, B, C, 4] as bfloat16 [A, B, C, 4, 4, 2, 2, 2] times 2 ** -LIFT.

    Value (t, w, i, j, h) of a row is number 32 t + 8 w + 4 h + 2 i + j of its 128.
    """
    MAGNITUDE: tl.constexpr = 0x01C001C0
    SIGN: tl.constexpr = 0x80008000
    pair0 = ((words << 6) & MAGNITUDE) | ((words << 12) & SIGN)
    pair1 = ((words << 2) & MAGNITUDE) | ((words << 8) & SIGN)
    pair2 = ((words >> 2) & MAGNITUDE) | ((words << 4) & SIGN)
    pair3 = ((words >> 6) & MAGNITUDE) | (words & SIGN)
    pairs = tl.join(tl.join(pair0, pair2), tl.join(pair1, pair3))
    # The bits lack 2 ** 126, the scale is 2 ** (scale - 127), and 127 is the bias of an exponent, which stands twice in a factor.
    factor = tl.minimum(scales.to(tl.uint32) + (126 - LIFT), 255) * 0x00800080
    pairs, factor = tl.broadcast(pairs, factor[:, :, :, :, None, None, None])
    # Both halves of a register at once, which no operator of Triton means; sm_80 has no product, but a product plus -0.
    products = tl.inline_asm_elementwise(
        "{ .reg .b32 zero; mov.b32 zero, 0x80008000; fma.rn.bf16x2 $0, $1, $2, zero; }",
        "=r,r,r",
        [pairs, factor],
        dtype=tl.uint32,
        is_pure=True,
        pack=1,
    )
    low = (products & 0xFFFF).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    high = (products >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return tl.join(low, high)


@triton.jit
def word_rows(ROWS: tl.constexpr, WARPS: tl.constexpr):
    """Return which row of a tile of ROWS rows, spread over WARPS warps, is where, [ROWS // (8 * WARPS), WARPS, 8]."""
    a, b, c = tl.arange(0, ROWS // (8 * WARPS)), tl.arange(0, WARPS), tl.arange(0, 8)
    return ((a // 2 * (16 * WARPS) + a % 2 * 8)[:, None, None] + (b * 16)[None, :, None]) + c[None, None, :]


@triton.jit
def left_operand(words, scales, ROWS: tl.constexpr, WARPS: tl.constexpr, WIDE: tl.constexpr):
    """Return decoded rows as `word_rows` places them, [ROWS, 128], along K in the order of `natural`; float32 where WIDE."""
    values = decode(words, scales)  # [ROWS // (8 * WARPS), WARPS, 8, 4, 4, 2, 2, 2]
    grouped = tl.reshape(values, [ROWS // (16 * WARPS), 2, WARPS, 8, 4, 4, 4, 2])
    tile = tl.reshape(tl.permute(grouped, (0, 2, 1, 3, 5, 6, 4, 7)), [ROWS, 128])
    if WIDE:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def natural(place):
    """Return which number of its row is at `place` where rows are in the order that decoded values come in."""
    chunk, t, w, h = place // 128 * 128, place // 2 % 4, place // 32 % 4, place % 2
    return chunk + 32 * t + 8 * w + 4 * h + place // 8 % 4
