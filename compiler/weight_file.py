"""Streams weights into the artifact's safetensors file, in memory bounded by one piece of one tensor.

In: for every tensor its shape, dtype, origin and a function that yields it in rows. Out: the file, on disk, and its entry for
the manifest. All shapes are known beforehand, so the header is written first. Data begins on a 64-byte boundary, and so does
every tensor whose size and whose predecessors' sizes permit it: kernels may read mapped weights with aligned vector loads.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

import torch
from torch import Tensor

from oxfuse.compiler.artifact import DISK_FULL, disk_full, require_space
from oxfuse.errors import InternalError
from oxfuse.passes.weights import Transform, Weight
from oxfuse.runtime.manifest import WeightFile, WeightTensor

ALIGNMENT = 64  # one cache line, one AVX-512 register
PIECE = 16 << 20  # bytes held at a time
LARGE_PAGE = 2 << 20  # bytes, of x86-64
CODES = {  # dtype names of the safetensors format
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True, kw_only=True)
class WeightEntry:
    """One tensor to write. `chunks` yields its rows (dim 0) in order, in chunks of any height; a scalar is one chunk. Chunks may
    be views, of mapped files too, and of another dtype: the writer casts to `dtype` as it copies.

    `source` and `layout` go to the manifest: the checkpoint's tensor, and what was done to it, step by step.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    source: str
    layout: tuple[str, ...]
    chunks: Callable[[], Iterable[Tensor]]

    @property
    def nbytes(self) -> int:
        """Return the bytes of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


class RowReader(Protocol):
    """What a weight is read from; `oxfuse.models` has them for checkpoints."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the stored shape."""

    @property
    def dtype(self) -> torch.dtype:
        """Return the stored dtype."""

    def read(self, rows: slice | None = None) -> Tensor:
        """Return the tensor, or some of its rows."""


def entry_of(weight: Weight, source: RowReader) -> WeightEntry:
    """Return the entry that streams `source` through the recipe of `weight`, a few rows at a time where the recipe allows it.

    Rows may go one by one where every step keeps dim 0 as it is, which its effect on shapes shows, and in runs where a step makes
    one row of as many as its attribute `rows` says. A cast that the recipe does not name, because the program's dtype is not the
    checkpoint's, is named in the layout.
    """
    if weight.encoding == "mxfp4" and weight.part is None:
        raise InternalError(
            f"{weight.source} is MXFP4, but the program reads it dense: no fusion has taken its blocks and scales."
        )
    shape, unit, height = source.shape, int(bool(source.shape)), 0
    for step in weight.transforms:
        unit *= _rows_of(step, shape)
        shape = step.shape(shape)
    if shape != weight.shape:
        raise InternalError(f"The recipe of {weight.source} makes {shape} of {source.shape}; the graph expects {weight.shape}.")
    if unit:
        row_bytes = max(math.prod(source.shape[1:]) * source.dtype.itemsize, math.prod(shape[1:]) * weight.dtype.itemsize // unit)
        height = max(1, PIECE // max(row_bytes * unit, 1)) * unit
    steps = tuple(step.label for step in weight.transforms)
    cast = source.dtype != weight.dtype and not any(hasattr(step, "dtype") for step in weight.transforms)

    def chunks() -> Iterator[Tensor]:
        for first in range(0, source.shape[0], height) if unit else (None,):
            tensor = source.read(None if first is None else slice(first, min(first + height, source.shape[0])))
            for step in weight.transforms:
                tensor = step.apply(tensor)
            yield tensor

    return WeightEntry(
        shape=weight.shape,
        dtype=weight.dtype,
        source=weight.source if weight.part is None else f"{weight.source}_{weight.part}",
        layout=(*steps, f"cast {_name(weight.dtype)}") if cast else steps,
        chunks=chunks,
    )


def _rows_of(step: Transform, shape: tuple[int, ...]) -> int:
    """Return of how many rows (dim 0) a step makes one, whatever their number; 0 where rows are not its unit."""
    unit: int = getattr(step, "rows", 1)
    after = step.shape(shape)
    wholes = range(shape[0] // unit, shape[0] // unit + 2)
    return unit if all(step.shape((n * unit, *shape[1:])) == (n, *after[1:]) for n in wholes) else 0


def write_weights(path: Path, entries: Mapping[str, WeightEntry], progress: Callable[[int], None] | None = None) -> WeightFile:
    """Write all entries to the safetensors file `path`; return its manifest entry, with a SHA-256 for each tensor.

    `progress` is called with the number of bytes written since the last call. On return the file is on the disk. Raises
    UserError where the disk is too small (before anything is written, if that can be seen) and InternalError where an entry
    yields another shape than it said.
    """
    header, order = _header(entries)
    total = len(header) + sum(entry.nbytes for entry in entries.values())
    require_space(path.parent, total)
    tensors, buffer = dict[str, WeightTensor](), torch.empty(PIECE, dtype=torch.uint8)
    try:
        with path.open("wb", buffering=LARGE_PAGE) as file:
            file.write(header)
            for name in order:
                entry = entries[name]
                tensors[name] = WeightTensor(
                    dtype=_name(entry.dtype),
                    shape=entry.shape,
                    source=entry.source,
                    layout=entry.layout,
                    sha256=_write_tensor(file, buffer, name, entry, progress or (lambda _: None)),
                )
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        if error.errno in DISK_FULL:
            raise disk_full(path, total) from error
        raise
    return WeightFile(path=path.name, bytes=total, header_sha256=hashlib.sha256(header).hexdigest(), tensors=tensors)


def _header(entries: Mapping[str, WeightEntry]) -> tuple[bytes, list[str]]:
    """Return the length prefix with the header, padded to the alignment, and the names in the order of their data."""
    if "__metadata__" in entries:
        raise InternalError("A weight is named __metadata__, which the safetensors format keeps for itself.")

    # By the largest power of two in its size, at most the alignment: what comes first leaves its successor aligned, and the
    # small rest is at least aligned to its own elements. The sort is stable: the graph's order is the file's.
    def evenness(name: str) -> int:
        size = entries[name].nbytes
        return min(size & -size, ALIGNMENT) if size else ALIGNMENT

    order, offset = sorted(entries, key=evenness, reverse=True), 0
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    for name in order:
        entry = entries[name]
        table[name] = {
            "dtype": CODES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [offset, offset + entry.nbytes],
        }
        offset += entry.nbytes
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text, order


def _write_tensor(file: BinaryIO, buffer: Tensor, name: str, entry: WeightEntry, progress: Callable[[int], None]) -> str:
    """Append one tensor to `file`; return its SHA-256 in hex."""
    digest, rows = hashlib.sha256(), 0
    for chunk in entry.chunks():
        if chunk.dim() != len(entry.shape) or chunk.shape[1:] != entry.shape[1:]:
            raise InternalError(f"The weight {name} yields a chunk of {tuple(chunk.shape)}; the file has room for {entry.shape}.")
        rows += chunk.shape[0] if entry.shape else 1
        for piece in _pieces(chunk.detach(), entry.dtype.itemsize):
            if piece.dtype != entry.dtype or not piece.is_contiguous():
                # One buffer for all: the allocator would keep the holes that many large tensors leave.
                room = buffer[: piece.numel() * entry.dtype.itemsize].view(entry.dtype).view(piece.shape)
                piece = room.copy_(piece)
            data: memoryview = piece.reshape(-1).view(torch.uint8).numpy().data  # bytes: NumPy knows no bfloat16
            digest.update(data)
            # What is written at once up to its end becomes one large page of the page cache, as it is mapped later.
            while data:
                end = LARGE_PAGE - file.tell() % LARGE_PAGE
                progress(file.write(data[:end]))
                data = data[end:]
    if rows != (entry.shape[0] if entry.shape else 1):
        raise InternalError(f"The weight {name} yields {rows} rows; the file has room for {entry.shape}.")
    return digest.hexdigest()


def _pieces(tensor: Tensor, itemsize: int) -> Iterator[Tensor]:
    """Cut a tensor into views of at most PIECE bytes, in the order of their values, `itemsize` bytes each."""
    if tensor.numel() * itemsize <= PIECE:
        yield tensor
    elif tensor.shape[0] == 1:
        yield from _pieces(tensor[0], itemsize)
    else:
        rows = max(1, PIECE // (math.prod(tensor.shape[1:]) * itemsize))
        for part in torch.split(tensor, rows):
            yield from _pieces(part, itemsize)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
