"""What the units of a manifest mean in bytes, and figures as a person reads them."""

from __future__ import annotations

from oxfuse.runtime.errors import UserError, shown

ITEM_BYTES = {
    **dict.fromkeys(("float64", "int64"), 8),
    **dict.fromkeys(("float32", "int32"), 4),
    **dict.fromkeys(("bfloat16", "float16", "int16"), 2),
    **dict.fromkeys(("int8", "uint8", "bool"), 1),
}
"""Bytes of one element, by torch's name of the dtype."""


def item_bytes(dtype: str) -> int:
    """Return the bytes of one element. Raises UserError for a dtype that artifacts do not have."""
    try:
        return ITEM_BYTES[dtype]
    except KeyError:
        raise UserError(f"The manifest has the dtype {shown(dtype)}, which no artifact has: it is damaged.") from None


def size_text(count: float) -> str:
    """Return a number of bytes in decimal units, three digits."""
    count = min(count, 1e30)  # a damaged manifest may multiply to anything
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            break
        count /= 1000
    return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"


def count_text(count: int, thing: str) -> str:
    """Return a number of things, the plural formed with an s."""
    return f"{count:,} {thing}{'' if count == 1 else 's'}"
