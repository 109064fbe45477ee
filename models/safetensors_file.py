"""One safetensors file, mapped: its header checked against its bytes, its tensors views of the mapping.

In: a path. Out: name -> dtype, shape and place of each tensor; nothing is read but the header. The format is described at
https://github.com/huggingface/safetensors#format; the header is checked here because a damaged one must end in a message that
says which file and what to do.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oxfuse.errors import UserError, shown

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_HEADER_LIMIT = 100_000_000
"""Bytes; the format's own limit."""
_MOST_DIMS = 64
"""Of a tensor, in torch."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One tensor of a file; `start` counts bytes from the beginning of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        """Return the tensor's size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class SafetensorsFile:
    """A mapped file. Pages are read when a tensor's values are; writing to a tensor changes private memory, never the file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries = read_entries(path)
        self._bytes = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)

    def tensor(self, name: str, rows: slice | None = None) -> Tensor:
        """Return a tensor, or a slice of its dim 0, as a view of the mapping; a copy where the file misaligns it."""
        entry = self.entries[name]
        start, end, shape = entry.start, entry.start + entry.nbytes, entry.shape
        if rows is not None:
            first, last, step = rows.indices(shape[0])
            assert step == 1, "rows are a run"
            row, shape = entry.nbytes // max(1, shape[0]), (max(0, last - first), *shape[1:])
            start, end = entry.start + first * row, entry.start + max(first, last) * row
        raw = self._bytes[start:end]
        return (raw.clone() if start % entry.dtype.itemsize else raw).view(entry.dtype).view(shape)


def read_entries(path: Path) -> dict[str, Entry]:
    """Return the tensors of a safetensors file. Raises UserError if the file is not one, or is damaged or cut short."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > _HEADER_LIMIT or 8 + length > size:
                raise _damaged(path, f"its header claims {length} bytes, the file has {size}")
            text = file.read(length)
        header = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"its header is not JSON ({error})") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}. Give a readable checkpoint.") from error
    if not isinstance(header, dict):
        raise _damaged(path, "its header is not a JSON object")
    header.pop("__metadata__", None)
    return {name: _entry(path, name, fields, 8 + length, size) for name, fields in header.items()}


def _entry(path: Path, name: str, fields: Any, begin: int, size: int) -> Entry:
    try:
        dtype, shape, (start, end) = fields["dtype"], fields["shape"], fields["data_offsets"]
        whole = isinstance(shape, list) and all(type(n) is int and 0 <= n < 1 << 48 for n in (*shape, start, end))
    except (TypeError, KeyError, ValueError) as error:
        raise _damaged(path, f"the header's entry for {shown(name)} is malformed") from error
    if not whole or len(shape) > _MOST_DIMS or end < start:
        raise _damaged(path, f"the header's entry for {shown(name)} holds impossible numbers")
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise UserError(
            f"{path}: {shown(name)} is stored as {shown(dtype)}; "
            f"oxfuse reads {', '.join(_DTYPES)}. Use a checkpoint in one of these."
        )
    entry = Entry(dtype=_DTYPES[dtype], shape=tuple(shape), start=begin + start)
    if entry.nbytes != end - start:
        raise _damaged(path, f"{shown(name)} of shape {shape} needs {entry.nbytes} bytes, its entry has {end - start}")
    if begin + end > size:
        raise _damaged(path, f"{shown(name)} ends at byte {begin + end}, the file has {size}")
    return entry


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError("a key occurs twice")
    return out


def _damaged(path: Path, what: str) -> UserError:
    return UserError(f"{path} is not a whole safetensors file: {what}. Download or copy it again.")
