"""bfloat16 under Triton's interpreter, as a GPU does it: casts round to nearest even, and `dot` multiplies values.

The interpreter of triton 3.7 keeps bfloat16 as uint16, cuts the low bits off in casts, its `dot` multiplies those integers, and
it knows no inline assembly: the one instruction that kernels use is here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def _widened(handle: Any) -> Any:
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    data = (handle.data.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return interpreter.TensorHandle(data, tl.float32)


def _narrowed(handle: Any) -> Any:
    wide = np.asarray(handle.data, dtype=np.float32)
    bits = wide.view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    bits = np.where(np.isnan(wide), bits | np.uint32(1 << 22), rounded) >> np.uint32(16)
    return interpreter.TensorHandle(bits.astype(np.uint16), tl.bfloat16)


def _product(left: Any, right: Any) -> Any:
    """Multiply bfloat16 values that are kept in the low halves of uint32."""
    wide = [(bits << np.uint32(16)).view(np.float32) for bits in (left, right)]
    return interpreter.TensorHandle(wide[0] * wide[1], tl.float32)


@contextlib.contextmanager
def real_bfloat16() -> Iterator[None]:
    """Let interpreted kernels compute with bfloat16 values while the context is open."""
    builder: Any = interpreter.InterpreterBuilder
    names = "cast_impl", "create_dot", "create_inline_asm"
    cast, dot, asm = before = [getattr(builder, name) for name in names]

    def real_cast(self: Any, src: Any, dst_type: Any) -> Any:
        wide = _widened(src)
        if dst_type.scalar == tl.bfloat16:
            return _narrowed(wide)
        return wide if wide.dtype.scalar == dst_type.scalar else cast(self, wide, dst_type)

    def real_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, _widened(a), _widened(b), *rest)

    def real_asm(self: Any, code: str, constraints: str, values: list[Any], *rest: Any) -> Any:
        if "fma.rn.bf16x2 $0, $1, $2, zero;" not in code or "mov.b32 zero, 0x80008000;" not in code:
            return asm(self, code, constraints, values, *rest)
        halves = [[value.data >> np.uint32(shift) & np.uint32(0xFFFF) for shift in (0, 16)] for value in values]
        low, high = (_narrowed(_product(*operands)).data.astype(np.uint32) for operands in zip(*halves, strict=True))
        handle = interpreter.TensorHandle(low | high << np.uint32(16), tl.uint32)
        return SimpleNamespace(get_result=lambda index: handle)

    for name, real in zip(names, (real_cast, real_dot, real_asm), strict=True):
        setattr(builder, name, real)
    try:
        yield
    finally:
        for name, function in zip(names, before, strict=True):
            setattr(builder, name, function)
