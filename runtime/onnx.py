"""Runs ONNX artifacts: onnxruntime behind the same engine as compiled programs.

An ONNX model knows no blocks: a sequence's keys and values lie in one piece. So the engine's block is as long as the longest
sequence, and block b of a layer's caches [blocks, KV, max_context, D] is what the model calls past and present of one row. A
model whose attention extends that in place (target onnx) gets the same memory for both, and sequences in neighbouring blocks
share a step; one that returns longer tensors (onnx-portable) runs row by row, and what is new is copied into the block.

A model for a GPU keeps its caches there; tokens go in and logits come out through the CPU's memory. Where there is no GPU, the
CPU computes what it has kernels for.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oxfuse.runtime.blocks import cache_dtype, discard, reserve
from oxfuse.runtime.cache_size import CacheSize
from oxfuse.runtime.device import Device, Outcome, Step
from oxfuse.runtime.errors import InternalError, UserError, shown
from oxfuse.runtime.gpus import find_gpus
from oxfuse.runtime.manifest import ONNX_CUDA, CacheSpec, Limits, ModelSpec, ProgramSpec
from oxfuse.runtime.sequence import Feed

SHARED = ("onnx", ONNX_CUDA)
"""The targets whose attention extends its past in place."""
IDS, MASK, FIRST, LOGITS, PAST, PRESENT = "input_ids", "attention_mask", "first_logit", "logits", "past_key_values", "present"
CUDA = "CUDAExecutionProvider"
ELEMENTS = {torch.float32: 1, torch.int64: 7, torch.float16: 10, torch.bfloat16: 16}
"""TensorProto.DataType of ONNX."""
INSTALL = 'install it with pip install "oxfuse[onnx]"'
logger = logging.getLogger("oxfuse")


@dataclass(frozen=True, kw_only=True)
class _Row:
    """What a run takes of a feed: the tokens `begin` to `end` of its sequence, whose caches are block `block`."""

    feed: Feed
    block: int
    begin: int
    end: int


class OnnxDevice(Device):
    """A session of onnxruntime and the memory that its caches are in."""

    def __init__(
        self,
        folder: Path,
        spec: ProgramSpec,
        model: ModelSpec,
        width: int,
        threads: int | None,
        prepack: bool,
        device: str | None = None,
    ) -> None:
        """Open the model of `spec`, which gives `width` values for a token. Raises UserError where it cannot be loaded.

        `prepack`: whether onnxruntime may copy dense weights into a layout of its own. `device` None takes a GPU for a model that
        was made for one, if there is one that works; "cuda" or "cuda:N" takes nothing else.
        """
        try:
            import onnxruntime
        except ImportError as error:
            raise UserError(f"The artifact is an ONNX model, and onnxruntime cannot be imported ({error}): {INSTALL}.") from None
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads or torch.get_num_threads()
        if not prepack:
            options.add_session_config_entry("session.disable_prepacking", "1")
        path = folder / spec.path / spec.library
        gpu, problem = (None, "") if spec.target != ONNX_CUDA or device == "cpu" else _gpu(device, onnxruntime)
        if problem and device is not None:
            raise UserError(f"The artifact cannot run on {device}: {problem}.")
        providers: list[Any] = ["CPUExecutionProvider"]
        if gpu is not None:
            onnxruntime.preload_dlls()  # CUDA's libraries, of which torch has a copy
            providers.insert(0, (CUDA, {"device_id": gpu}))
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=providers)
        except Exception as error:  # onnxruntime's own classes, which have no common base but this
            reason = str(error).partition("\n")[0]
            remedy = f" It was compiled for a GPU, and {problem}: compile it without --provider cuda." if problem else ""
            raise UserError(f"{path} cannot be loaded by onnxruntime {onnxruntime.__version__}: {reason}.{remedy}") from error
        if gpu is not None and CUDA not in self._session.get_providers():
            problem, gpu = "onnxruntime cannot load CUDA's libraries (its log says which)", None
            if device is not None:
                raise UserError(f"The artifact cannot run on {device}: {problem}.")
        if problem:
            logger.warning("%s was compiled for a GPU, but %s: the CPU computes.", path, problem)
        self._at = torch.device("cpu") if gpu is None else torch.device("cuda", gpu)
        self._values_dtype = getattr(torch, spec.outputs[0].dtype)
        self._width, self._pooled = width, model.pooling != "none"
        self._cached = any(value.name == FIRST for value in spec.inputs)
        self._shared = self._cached and spec.target in SHARED
        if {value.name for value in self._session.get_inputs()} | {FIRST} != {value.name for value in spec.inputs} | {FIRST}:
            raise UserError(f"{path} has other inputs than the manifest says: it is damaged. Compile the checkpoint again.")

    def allocate(self, spec: CacheSpec, size: CacheSize) -> list[Tensor]:
        """Reserve K and V of each layer, [blocks, KV, block_size, D]; nothing for a model without a cache."""
        layers = zip(spec.kv_heads, spec.head_dim, strict=True) if self._cached else ()
        shapes, dtype = [(size.blocks[0], heads, spec.block_size, dim) for heads, dim in layers for _ in "kv"], cache_dtype(spec)
        if self._at.type == "cpu":
            return [reserve(shape, dtype) for shape in shapes]
        try:
            return [torch.zeros(shape, dtype=dtype, device=self._at) for shape in shapes]
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"{self._at} has no room for the {size.bytes:,} bytes of the caches: give a smaller cache_bytes, or compile with "
                "a smaller max_context or max_batch."
            ) from error

    def check(self, caches: Sequence[Tensor], spec: CacheSpec, size: CacheSize) -> None:
        """Check nothing: only this class knows the caches."""

    def run(self, step: Step, feeds: Sequence[Feed], rows: Sequence[int], caches: Sequence[Tensor], *, greedy: bool) -> Outcome:
        """Run the feeds, decodes in neighbouring blocks together. Raises UserError for positions that do not count up by one.

        Where they begin does not matter: a rotation tells distances alone.
        """
        for feed in feeds:
            known, positions = feed.sequence.cached + feed.count, feed.sequence.positions
            if positions[:known] != list(range(positions[0], positions[0] + known)):
                raise UserError("An ONNX model counts positions itself, by one: leave position_ids away, or use another target.")
        wanted = {id(feed): feed.wanted() for feed in feeds}
        parts: dict[int, Tensor] = {}
        for batch in self._batches(feeds):
            try:
                self._run(batch, wanted, caches, parts)
            except Exception as error:  # onnxruntime's own classes again
                raise InternalError(f"onnxruntime failed: {str(error).partition(chr(10))[0]}") from error
        found = [parts[id(feed)] for feed in feeds if id(feed) in parts]
        return Outcome(logits=torch.cat(found) if found else torch.zeros(len(rows), self._width), best=None)

    def copy_block(self, caches: Sequence[Tensor], source: int, target: int, tokens: int) -> None:
        """Copy what is in use."""
        for cache in caches:
            cache[target, :, :tokens].copy_(cache[source, :, :tokens])
        self._settle()

    def discard(self, caches: Sequence[Tensor], blocks: range | None = None) -> None:
        """Give pages back to the system; a GPU's memory stays claimed."""
        for cache in caches if self._at.type == "cpu" else ():
            discard(cache, blocks)

    def _settle(self) -> None:
        """Wait for what torch does to the caches: onnxruntime has a stream of its own."""
        if self._at.type != "cpu":
            torch.accelerator.synchronize(self._at)

    def _batches(self, feeds: Sequence[Feed]) -> list[list[_Row]]:
        """Return the runs: decodes whose blocks follow each other in one, everything else alone."""
        rows = [
            _Row(
                feed=feed,
                block=feed.sequence.tables[0][0],
                begin=feed.sequence.cached,
                end=feed.sequence.cached + feed.count,
            )
            for feed in feeds
        ]
        rows.sort(key=lambda row: row.block)
        batches: list[list[_Row]] = []
        for row in rows:
            last = batches[-1][-1] if batches else None
            joins = last is not None and row.block == last.block + 1 and row.feed.count == last.feed.count == 1
            if joins and self._shared:
                batches[-1].append(row)
            else:
                batches.append([row])
        return batches

    def _run(
        self, batch: list[_Row], wanted: dict[int, Sequence[int]], caches: Sequence[Tensor], parts: dict[int, Tensor]
    ) -> None:
        """Run one batch, all of whose rows add equally many tokens; put the wanted logits into `parts`."""
        if self._pooled:  # answers for the last token alone
            row = batch[0]
            ends = [index + 1 for index in wanted[id(row.feed)]]
            found = [self._values([_Row(feed=row.feed, block=row.block, begin=0, end=end)], 0, caches) for end in ends]
            if found:
                parts[id(row.feed)] = torch.cat(found)
            return
        indices = [wanted[id(row.feed)] for row in batch]
        # The tokens from the first wanted one on; where none is wanted, the last, since some must be.
        first = min((index[0] - row.begin for row, index in zip(batch, indices, strict=True) if len(index)), default=-1)
        values = self._values(batch, first, caches)
        for row, index, value in zip(batch, indices, values, strict=True):
            if len(index):
                parts[id(row.feed)] = value[[i - row.begin - max(first, 0) for i in index]]

    def _values(self, batch: list[_Row], first: int, caches: Sequence[Tensor]) -> Tensor:
        """Run the model; return its values, float32 [B, R, width] of the tokens from `first` on, or [B, width] if pooled."""
        binding, longest, count = self._session.io_binding(), max(row.end for row in batch), batch[0].end - batch[0].begin
        ids = torch.tensor([row.feed.sequence.tokens[row.begin : row.end] for row in batch])
        # New tokens are the mask's last columns, whatever padding lies before them.
        mask = torch.arange(longest) < torch.tensor([[row.begin] for row in batch])
        mask[:, longest - count :] = True
        kept = [self._bind(binding, IDS, ids), self._bind(binding, MASK, mask.long())]
        shape = [len(batch), self._width] if self._pooled else [len(batch), count, self._width]
        if self._cached:
            kept.append(self._bind(binding, FIRST, torch.tensor([first])))
            shape[1] = count - first if first >= 0 else -first
        logits = torch.empty(shape, dtype=self._values_dtype)
        self._bind(binding, LOGITS, logits, output=True)
        blocks = slice(batch[0].block, batch[-1].block + 1)
        for i, cache in enumerate(caches):
            name = f"{i // 2}.{'key' if i % 2 == 0 else 'value'}"
            if self._shared:
                self._bind(binding, f"{PAST}.{name}", cache[blocks])
                self._bind(binding, f"{PRESENT}.{name}", cache[blocks], output=True)
            else:
                kept.append(self._bind(binding, f"{PAST}.{name}", cache[blocks, :, : batch[0].begin].contiguous()))
                binding.bind_output(f"{PRESENT}.{name}", "cpu")
        self._session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        if caches and not self._shared:
            (row,) = batch
            for cache, present in zip(caches, binding.get_outputs()[1:], strict=True):
                cache[row.block, :, row.begin : row.end] = torch.from_numpy(present.numpy())[0, :, row.begin :]
        return logits.float()

    def _bind(self, binding: Any, name: str, tensor: Tensor, *, output: bool = False) -> Tensor:
        """Let a tensor, which must outlive the run, be an input or an output."""
        bind = binding.bind_output if output else binding.bind_input
        bind(name, tensor.device.type, tensor.device.index or 0, ELEMENTS[tensor.dtype], list(tensor.shape), tensor.data_ptr())
        return tensor


def _gpu(device: str | None, onnxruntime: Any) -> tuple[int | None, str]:
    """Return the number of the GPU to use, or why there is none. Raises UserError for a `device` that is no GPU's name."""
    named = re.fullmatch(r"cuda(?::(\d{1,4}))?", device or "cuda")
    if named is None:
        raise UserError(f"device is {shown(device)}: give 'cuda', or 'cuda:N' for the N-th GPU, counted from 0.")
    index, gpus = int(named[1] or 0), find_gpus()
    if gpus.problem:
        return None, gpus.problem
    if index >= len(gpus.found):
        return None, f"this machine has {'; '.join(map(str, gpus.found))}"
    if not torch.version.cuda:
        return None, "torch, which keeps the caches, is its CPU build"
    if CUDA not in onnxruntime.get_available_providers():
        return None, f"onnxruntime {onnxruntime.__version__} is its CPU build: install onnxruntime-gpu"
    return index, ""


def chunk_of(spec: ProgramSpec, limits: Limits) -> int | None:
    """Return the most tokens of a step where that is not left to the engine: all, of a model without a cache."""
    return None if any(value.name == FIRST for value in spec.inputs) else limits.max_context
