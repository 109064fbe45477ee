"""Maps weight files: safetensors on disk become tensors that cost no memory of their own.

Pages come from the page cache, read-only and shared by every program and process; a write through such a tensor is a
segmentation fault, never a silent change of the weights. The header is parsed here rather than by the safetensors package,
since its bytes are checked against the manifest before they are believed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from oxfuse.runtime.errors import UserError, shown
from oxfuse.runtime.manifest import WeightFile

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""safetensors' names of the dtypes that artifacts use."""

HEADER_LIMIT = 100_000_000
"""Longest header that safetensors itself accepts, in bytes."""

HASH_CHUNK = 1 << 20
"""Bytes hashed between two reports of progress."""


@dataclass(frozen=True, kw_only=True)
class Extent:
    """Where one tensor lies: `begin` and `end` are offsets in the file, in bytes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def damaged(path: Path, what: str) -> UserError:
    """Return the error for a file of an artifact that is not what the compiler wrote."""
    return UserError(
        f"{path!s:.300} {what}: the artifact is damaged or incomplete. Copy it again, or compile the checkpoint again."
    )


def read_header(path: Path) -> tuple[dict[str, Extent], str]:
    """Return the extents in the safetensors file at `path` and the sha256 of its length prefix and header.

    Raises UserError where the file is missing, its header is not one, or a tensor does not lie inside the file.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > min(size - 8, HEADER_LIMIT):
                raise damaged(path, f"has no safetensors header ({size} bytes)")
            header = file.read(length)
    except FileNotFoundError:
        raise damaged(path, "does not exist") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}.") from error
    extents = {}
    try:
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        for name, entry in entries.items():
            shape, (begin, end) = tuple(map(int, entry["shape"])), map(int, entry["data_offsets"])
            extents[name] = Extent(dtype=DTYPES[entry["dtype"]], shape=shape, begin=8 + length + begin, end=8 + length + end)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise damaged(path, f"has an unreadable safetensors header ({type(error).__name__}: {error})") from error
    for name, extent in extents.items():
        needed = prod(extent.shape) * extent.dtype.itemsize
        if (
            min(extent.shape, default=0) < 0
            or extent.begin < 8 + length
            or extent.end > size
            or extent.end - extent.begin != needed
        ):
            raise damaged(path, f"has tensor {name} of {needed} bytes at {extent.begin}..{extent.end}, outside its {size} bytes")
    return extents, hashlib.sha256(prefix + header).hexdigest()


def map_tensors(path: Path) -> dict[str, Tensor]:
    """Return every tensor of the safetensors file at `path`, mapped read-only: no copy, file-backed pages.

    Large ones are asked for: Linux then reads what its page cache lacks in pieces of 2 MB, and decoding, which walks through
    all weights for every token, looks up a page for each of them and not one for every 4 KB.

    Raises UserError as `read_header` does, or where a tensor does not start at a multiple of its element size.
    """
    extents, _ = read_header(path)
    with path.open("rb") as file:
        pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # advice: a kernel without large pages refuses it
            pages.madvise(mmap.MADV_HUGEPAGE)
    tensors = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable", category=UserWarning)
        for name, at in extents.items():
            if at.begin % at.dtype.itemsize:
                raise damaged(
                    path, f"has tensor {name} at offset {at.begin}, not a multiple of its {at.dtype.itemsize}-byte elements"
                )
            count = prod(at.shape)
            flat = (
                torch.frombuffer(pages, dtype=at.dtype, count=count, offset=at.begin) if count else torch.empty(0, dtype=at.dtype)
            )
            tensors[name] = flat.view(at.shape)
    return tensors


def check_weight_file(folder: Path, spec: WeightFile) -> None:
    """Compare the weight file with the manifest: size, header hash, and each tensor's dtype and shape. Reads the header only.

    Raises UserError naming the first thing that differs.
    """
    path = folder / spec.path
    extents, digest = read_header(path)
    if (size := path.stat().st_size) != spec.bytes:
        raise damaged(path, f"has {size} bytes, the manifest says {spec.bytes}")
    if digest != spec.header_sha256:
        raise damaged(path, f"has a header of sha256 {digest}, the manifest says {spec.header_sha256:.64}")
    if odd := sorted(extents.keys() ^ spec.tensors.keys()):
        raise damaged(path, f"and the manifest disagree about tensor {shown(odd[0])}, which only one of them has")
    for name, tensor in spec.tensors.items():
        found = extents[name]
        if (found_dtype := str(found.dtype).removeprefix("torch.")) != tensor.dtype or found.shape != tensor.shape:
            told = f"{tensor.dtype:.20} {shown(list(tensor.shape))}"
            raise damaged(path, f"has {name} as {found_dtype} {list(found.shape)}, the manifest says {told}")


def hash_weights(folder: Path, spec: WeightFile, progress: Callable[[int], object] | None = None) -> dict[str, str]:
    """Return the sha256 of each tensor's bytes in the weight file; `progress` is told the bytes hashed since its last call."""
    path = folder / spec.path
    extents, _ = read_header(path)
    with path.open("rb") as file:
        return {name: _hash_range(path, file.fileno(), extents[name], progress) for name in extents}


def _hash_range(path: Path, fd: int, extent: Extent, progress: Callable[[int], object] | None) -> str:
    digest, at = hashlib.sha256(), extent.begin
    while at < extent.end:  # read, not mapped: a hash should not leave the whole file in this process's resident set
        piece = os.pread(fd, min(HASH_CHUNK, extent.end - at), at)
        if not piece:
            raise damaged(path, f"ended at byte {at} while it was read")
        digest.update(piece)
        at += len(piece)
        if progress:
            progress(len(piece))
    return digest.hexdigest()


def damaged_weights(spec: WeightFile, found: Mapping[str, str]) -> Iterator[str]:
    """Yield the names of the tensors whose hash in `found` is not the manifest's."""
    return (name for name, tensor in spec.tensors.items() if found.get(name) != tensor.sha256)
