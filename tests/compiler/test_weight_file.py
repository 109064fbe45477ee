"""The weight file: read back bit for bit by safetensors, aligned, hashed, in bounded memory, and exact about disagreements."""

from __future__ import annotations

import errno
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterable
from itertools import accumulate, pairwise
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from oxfuse.compiler import weight_file
from oxfuse.compiler.weight_file import ALIGNMENT, LARGE_PAGE, WeightEntry, entry_of, write_weights
from oxfuse.errors import InternalError, UserError
from oxfuse.passes.quantise import Mxfp4Bytes, Mxfp4Columns
from oxfuse.passes.weights import Cast, SwapRowsAndColumns, Transform, Weight


def entry(tensor: torch.Tensor, chunks: Callable[[], Iterable[torch.Tensor]] | None = None) -> WeightEntry:
    whole = (lambda: (tensor,)) if chunks is None else chunks
    return WeightEntry(shape=tuple(tensor.shape), dtype=tensor.dtype, source="s", layout=(), chunks=whole)


class Stored:
    """A tensor of a checkpoint that remembers how many rows were asked for at a time."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor, self.shape, self.dtype = tensor, tuple(tensor.shape), tensor.dtype
        self.heights: list[int] = []

    def read(self, rows: slice | None = None) -> torch.Tensor:
        part = self.tensor if rows is None else self.tensor[rows]
        self.heights.append(part.shape[0] if part.dim() else 1)
        return part


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    odd = {f"odd.{n}": torch.randn(n, generator=g).to(torch.bfloat16) for n in (1, 3, 5, 8)}
    return odd | {
        "float": torch.randn(7, 16, generator=g),
        "double": torch.randn(3, generator=g).double(),
        "bytes": torch.randint(0, 256, (4, 33, 16), generator=g, dtype=torch.uint8),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 4),
        "flags": torch.tensor([True, False, True]),
        "view": torch.randn(6, 32, generator=g).t(),
        "half": torch.randn(64, generator=g).half(),
        "index": torch.arange(9),
        "embedding": torch.randn(96, 64, generator=g).to(torch.bfloat16),
    }


def test_read_back_bit_for_bit(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    path, seen = tmp_path / "weights.safetensors", list[int]()
    file = write_weights(path, {name: entry(tensor) for name, tensor in tensors.items()}, seen.append)
    read = load_file(path)
    assert read.keys() == tensors.keys() == file.tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype and read[name].shape == tensor.shape
        assert read[name].view(torch.uint8).equal(tensor.contiguous().view(torch.uint8)) if tensor.dim() else read[name] == tensor
        raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        told = file.tensors[name]
        assert told.sha256 == hashlib.sha256(raw).hexdigest()
        assert (told.shape, told.dtype) == (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
    assert file.path == "weights.safetensors"
    assert file.bytes == path.stat().st_size
    assert sum(seen) == sum(t.nbytes for t in tensors.values())
    with safe_open(path, "pt") as reader:
        assert reader.metadata() == {"format": "pt"}


def test_no_write_crosses_a_large_page(tmp_path: Path) -> None:
    """The page cache then holds the file in large pages; a write across their border would split two of them."""
    sizes = {"a": LARGE_PAGE - 3 * ALIGNMENT, "b": 2 * LARGE_PAGE + 5, "c": 7, "d": LARGE_PAGE}
    seen = list[int]()
    entries = {name: entry(torch.zeros(size, dtype=torch.uint8)) for name, size in sizes.items()}
    file = write_weights(tmp_path / "weights.safetensors", entries, seen.append)
    ends = [*accumulate(seen, initial=file.bytes - sum(sizes.values()))]
    assert ends[-1] == file.bytes and all(begin // LARGE_PAGE == (end - 1) // LARGE_PAGE for begin, end in pairwise(ends))


def test_alignment_and_header(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    path = tmp_path / "weights.safetensors"
    file = write_weights(path, {name: entry(tensor) for name, tensor in tensors.items()})
    data = path.read_bytes()
    size = 8 + int.from_bytes(data[:8], "little")
    assert size % ALIGNMENT == 0
    assert hashlib.sha256(data[:size]).hexdigest() == file.header_sha256
    table = json.loads(data[8:size])
    for name, tensor in tensors.items():
        begin, end = table[name]["data_offsets"]
        assert end - begin == tensor.nbytes
        assert begin % tensor.itemsize == 0
        if tensor.nbytes % ALIGNMENT == 0:
            assert begin % ALIGNMENT == 0


def test_deterministic(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    entries = {name: entry(tensor) for name, tensor in tensors.items()}
    assert write_weights(tmp_path / "a", entries).header_sha256 == write_weights(tmp_path / "b", entries).header_sha256
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_chunks_of_any_height(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_file, "PIECE", 64)
    tensor = torch.randn(23, 5, 4).transpose(1, 2)
    write_weights(tmp_path / "w", {"t": entry(tensor, lambda: tensor.split([1, 10, 0, 12])), "u": entry(tensor)})
    assert load_file(tmp_path / "w")["t"].equal(tensor)
    assert load_file(tmp_path / "w")["u"].equal(tensor)


def test_casts_while_copying(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_file, "PIECE", 64)
    tensor = torch.randn(23, 5, 40)
    narrow = entry(tensor.to(torch.bfloat16), lambda: tensor.split(7))
    wide = entry(tensor, lambda: tensor.double().transpose(0, 1).contiguous().transpose(0, 1).split(7))
    write_weights(tmp_path / "w", {"narrow": narrow, "wide": wide})
    read = load_file(tmp_path / "w")
    assert read["narrow"].equal(tensor.to(torch.bfloat16))
    assert read["wide"].equal(tensor)


@pytest.mark.parametrize(
    "chunks",
    [
        lambda t: [t[:2]],
        lambda t: [t, t],
        lambda t: [t[:, :2]],
        lambda t: [t.reshape(-1)],
        lambda t: [],
    ],
)
def test_disagreement_with_the_entry_is_internal(
    tmp_path: Path, chunks: Callable[[torch.Tensor], Iterable[torch.Tensor]]
) -> None:
    tensor = torch.randn(4, 4)
    with pytest.raises(InternalError, match="weight bad yields"):
        write_weights(tmp_path / "w", {"bad": entry(tensor, lambda: chunks(tensor))})


def test_reserved_name(tmp_path: Path) -> None:
    with pytest.raises(InternalError, match="__metadata__"):
        write_weights(tmp_path / "w", {"__metadata__": entry(torch.ones(1))})


def test_too_small_a_disk_is_seen_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 95, 5))
    with pytest.raises(UserError, match=r"at least [\d,]+ bytes are needed and 5 are free"):
        write_weights(tmp_path / "w", {"t": entry(torch.ones(16))})
    assert not (tmp_path / "w").exists()


def test_disk_that_fills_up_tells_what_the_whole_file_needs(tmp_path: Path) -> None:
    def full() -> Iterable[torch.Tensor]:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UserError, match=re.escape(f"{1 << 20:,}"[:2])):
        write_weights(tmp_path / "w", {"t": entry(torch.zeros(1 << 18), full)})


def test_memory_is_bounded_by_a_piece(tmp_path: Path) -> None:
    """A tensor of 256 MB that is a view of 4 KB is written without ever being whole in memory."""

    def anonymous() -> int:
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"RssAnon:\s+(\d+) kB", status)[1]) << 10

    wide = torch.arange(1024, dtype=torch.float32).expand(1 << 16, 1024)
    peak, before = [0], anonymous()

    def look(_: int) -> None:
        peak[0] = max(peak[0], anonymous())

    narrow = WeightEntry(shape=(1 << 16, 1024), dtype=torch.bfloat16, source="s", layout=(), chunks=lambda: (wide,))
    write_weights(tmp_path / "w", {"wide": entry(wide), "turned": entry(wide.t()[:8]), "narrow": narrow}, look)
    assert peak[0] - before < 48 << 20


def test_entry_of_goes_row_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_file, "PIECE", 2 * 5 * 7 * 4)
    stored = Stored(torch.randn(5, 5, 7))
    weight = Weight(shape=(5, 5, 7), dtype=torch.float32, source="w").then(SwapRowsAndColumns())
    made = entry_of(weight.then(Cast(torch.bfloat16), torch.bfloat16), stored)
    assert torch.cat(list(made.chunks())).equal(stored.tensor.transpose(1, 2).to(torch.bfloat16))
    assert stored.heights == [2, 2, 1]
    assert (made.shape, made.dtype, made.layout) == ((5, 7, 5), torch.bfloat16, ("swap rows and columns", "cast bfloat16"))


@pytest.mark.parametrize("step", [Mxfp4Bytes(), Mxfp4Columns()], ids=lambda step: step.label)
def test_experts_whose_rank_changes_go_one_by_one(step: Transform, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_file, "PIECE", 1)
    stored = Stored(torch.randint(0, 256, (5, 6, 2, 16), dtype=torch.uint8))
    whole = step.apply(stored.tensor)
    made = entry_of(Weight(shape=tuple(whole.shape), dtype=torch.uint8, source="s", part="blocks", transforms=(step,)), stored)
    assert torch.equal(torch.cat([*made.chunks()]), whole) and stored.heights == [1] * 5


def test_entry_of_reads_at_once_what_rows_cannot_make(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_file, "PIECE", 16)
    stored = Stored(torch.randn(6, 6))
    made = entry_of(Weight(shape=(6, 6), dtype=torch.float32, source="w").then(SwapRowsAndColumns()), stored)
    assert torch.cat(list(made.chunks())).equal(stored.tensor.t())
    assert stored.heights == [6]


def test_entry_of_casts_and_says_so() -> None:
    stored = Stored(torch.randn(4).to(torch.bfloat16))
    made = entry_of(Weight(shape=(4,), dtype=torch.float32, source="w"), stored)
    assert (made.dtype, made.shape) == (torch.float32, (4,))
    assert made.layout == ("cast float32",)
    scalar = entry_of(Weight(shape=(), dtype=torch.float32, source="w"), Stored(torch.tensor(3.0)))
    assert [t.item() for t in scalar.chunks()] == [3.0]
    assert scalar.layout == ()


def test_entry_of_names_the_part_of_an_mxfp4_tensor() -> None:
    part = Weight(shape=(2, 64, 8), dtype=torch.bfloat16, source="w", encoding="mxfp4").parts()["scales"]
    made = entry_of(part, Stored(torch.zeros(2, 8, 2, dtype=torch.uint8)))
    assert (made.source, made.dtype, made.layout) == ("w_scales", torch.uint8, ())


def test_entry_of_refuses_a_recipe_of_another_shape() -> None:
    with pytest.raises(InternalError, match="recipe of w"):
        entry_of(Weight(shape=(4,), dtype=torch.float32, source="w"), Stored(torch.zeros(5)))


def test_entry_of_refuses_a_dense_placeholder_of_mxfp4() -> None:
    with pytest.raises(InternalError, match="no fusion has taken"):
        entry_of(Weight(shape=(2, 64, 8), dtype=torch.bfloat16, source="w", encoding="mxfp4"), Stored(torch.zeros(2, 64, 8)))
