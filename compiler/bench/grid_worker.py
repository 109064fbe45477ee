"""A process that runs one contender of the grid: `python -m oxfuse.compiler.bench.grid_worker ENGINE FOLDER THREADS PART DTYPE`.

It talks as `worker.py` does. PART is inference or training. One request is a whole turn, and leaves nothing behind:

    {"do": "turn", "batch": b, "sequence": s, "tokens": n, "allowance": bytes, "check": bool}
        -> {"seconds": {"prefill", "decode"} or {"step"}, "memory": bytes, "loss" (training), "logits" (inference, with "check")}
        -> {"no_memory": reason} where it would need more than `allowance` bytes besides what it has

Seconds of "decode" are the median of n steps of the whole batch, those of "prefill" end with the first new tokens. "memory" is
the most that the process had in memory during the turn, mapped weights included, over what it had after its imports.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import re
import resource
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from oxfuse.compiler.bench.worker import serve, tokens_for, transformers_model
from oxfuse.compiler.process_memory import peak_resident, reset_peak, resident, status_bytes
from oxfuse.runtime.scheduler import Job
from oxfuse.runtime.sequence import TokenSequence

NO_MEMORY = re.compile(r"can't allocate memory|not enough memory|bad_alloc|Cannot allocate|out of memory", re.IGNORECASE)


class Contender(Protocol):
    """One turn with token ids [B, S]: `run` returns what goes into the answer, `forget` lets go of all that it made."""

    name: str
    implementations: tuple[str, ...]
    vocab_size: int
    before: int | None

    def run(self, ids: Tensor, tokens: int, check: bool) -> dict[str, Any]:
        """Take the turn."""

    def forget(self) -> None:
        """End it, also after a failure."""


class _Inference:
    """Prefill and decode with greedy choice; who inherits says how."""

    def run(self, ids: Tensor, tokens: int, check: bool) -> dict[str, Any]:
        began = time.perf_counter()
        logits = self.prefill(ids)
        chosen = logits.argmax(-1)
        prefill, steps = time.perf_counter() - began, []
        for _ in range(tokens):
            began = time.perf_counter()
            chosen = self.decode(chosen).argmax(-1)
            steps.append(time.perf_counter() - began)
        answer: dict[str, Any] = {"seconds": {"prefill": prefill, "decode": statistics.median(steps)}}
        return answer | ({"logits": logits[0].tolist()} if check else {})

    def prefill(self, ids: Tensor) -> Tensor:
        """Begin with ids [B, S]; return the last tokens' logits, float32 [B, V]."""
        raise NotImplementedError

    def decode(self, chosen: Tensor) -> Tensor:
        """Append one token to each sequence, [B]; return the logits after them, [B, V]."""
        raise NotImplementedError


class TransformersInference(_Inference):
    """transformers' model and its growing cache."""

    def __init__(self, folder: Path, threads: int, dtype: torch.dtype, attention: str) -> None:
        self.name, self.before = _import_transformers(folder, threads)
        self.implementations: tuple[str, ...] = ()
        self._model = transformers_model(folder, dtype, attention)
        self.vocab_size = self._model.config.vocab_size
        self._cache: Any = None

    def prefill(self, ids: Tensor) -> Tensor:
        out = self._model(ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._cache = out.past_key_values
        logits: Tensor = out.logits[:, -1].float()
        return logits

    def decode(self, chosen: Tensor) -> Tensor:
        return self.prefill(chosen[:, None])

    def forget(self) -> None:
        self._cache = None


class _LastLogits(Job):
    """Runs what is pending of a sequence, which stays, and keeps the logits after it."""

    logits: Tensor

    def receive(self, indices: Sequence[int], logits: Tensor) -> None:
        self.logits, self.done = logits[-1].clone(), True


class OxfuseInference(_Inference):
    """An artifact's engine behind its scheduler, as generations use it."""

    def __init__(self, folder: Path, threads: int) -> None:
        import oxfuse
        from oxfuse.runtime.artifact import load

        self.name, self.before = f"oxfuse {oxfuse.__version__}", _resident()
        self.implementations: tuple[str, ...] = ()
        self._model = load(folder, threads=threads, prefix_cache_bytes=0)  # a prompt that comes again runs again
        self.vocab_size = self._model.vocab_size
        self._sequences: list[TokenSequence] = []

    def prefill(self, ids: Tensor) -> Tensor:
        self._sequences = [self._model.scheduler.engine.sequence() for _ in ids]
        return self._append(ids.tolist())

    def decode(self, chosen: Tensor) -> Tensor:
        engine = self._model.scheduler.engine
        before = engine.steps
        logits = self._append(chosen[:, None].tolist())
        if engine.steps != before + 1:
            raise RuntimeError(f"the batch of {len(chosen)} took {engine.steps - before} steps to decode a token, not one")
        return logits

    def _append(self, ids: list[list[int]]) -> Tensor:
        jobs = []
        for sequence, tokens in zip(self._sequences, ids, strict=True):
            sequence.append(tokens)
            jobs.append(_LastLogits(sequence, keep=True))
        self._model.scheduler.run(jobs)
        return torch.stack([job.logits for job in jobs])

    def forget(self) -> None:
        for sequence in self._sequences:
            self._model.scheduler.engine.release(sequence)
        self._sequences = []


class Training:
    """Forward and backward of a model in training mode, with the ids as labels."""

    def __init__(self, name: str, before: int | None, model: Any) -> None:
        self.name, self.before, self._model = name, before, model.train().requires_grad_(True)
        self.implementations: tuple[str, ...] = ()
        self.vocab_size = model.config.vocab_size

    def run(self, ids: Tensor, tokens: int, check: bool) -> dict[str, Any]:
        with torch.enable_grad():
            began = time.perf_counter()
            self._model.zero_grad(set_to_none=True)
            loss = self._model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            seconds = time.perf_counter() - began
        return {"seconds": {"step": seconds}, "loss": float(loss)}

    def forget(self) -> None:
        self._model.zero_grad(set_to_none=True)


def transformers_training(folder: Path, threads: int, dtype: torch.dtype, attention: str) -> Training:
    """Return transformers' model for training."""
    name, before = _import_transformers(folder, threads)
    return Training(name, before, transformers_model(folder, dtype, attention))


def oxfuse_training(folder: Path, threads: int, dtype: torch.dtype) -> Training:
    """Return oxfuse's reference for training, with torch's attention."""
    import oxfuse
    from oxfuse.models.load import load_reference

    torch.set_num_threads(threads)
    name, before = f"oxfuse {oxfuse.__version__} reference", _resident()
    model = load_reference(folder, dtype, attn_implementation="sdpa")
    for parameter in model.parameters():  # mapped so far; an optimizer's first step brings them into the process's own memory
        parameter.data = parameter.data.clone()
    return Training(name, before, model)


def build(engine: str, folder: Path, threads: int, part: str, dtype: torch.dtype) -> Contender:
    """Return the contender `engine`: oxfuse, or how transformers computes attention."""
    if part == "inference":
        return OxfuseInference(folder, threads) if engine == "oxfuse" else TransformersInference(folder, threads, dtype, engine)
    return (
        oxfuse_training(folder, threads, dtype) if engine == "oxfuse" else transformers_training(folder, threads, dtype, engine)
    )


def answer(contender: Contender, request: dict[str, Any]) -> dict[str, Any]:
    """Take one turn."""
    batch, sequence = request["batch"], request["sequence"]
    ids = torch.tensor(tokens_for(batch * sequence, contender.vocab_size)).view(batch, sequence)
    try:
        with _allowance(request["allowance"]):
            measured = reset_peak(os.getpid())
            told = contender.run(ids, request["tokens"], request["check"])
            most = peak_resident(os.getpid()) if measured else None
        return told | {"memory": None if most is None or contender.before is None else most - contender.before}
    except Exception as error:
        if not isinstance(error, MemoryError) and not NO_MEMORY.search(str(error)):
            raise
        return {"no_memory": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
    finally:
        contender.forget()
        _give_back()


def _import_transformers(folder: Path, threads: int) -> tuple[str, int | None]:
    """Import what the model needs; return transformers' name and the memory of this process then."""
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.set_num_threads(threads)
    AutoModelForCausalLM._model_mapping[type(AutoConfig.from_pretrained(folder))]  # imports the model's module
    return f"transformers {transformers.__version__}", _resident()


def _resident() -> int | None:
    _give_back()
    return resident(os.getpid())


def _give_back() -> None:
    """Let go of memory that is free, or the next turn would be charged for it."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)


@contextlib.contextmanager
def _allowance(count: int | None) -> Iterator[None]:
    """Refuse to this process more than `count` bytes besides what it has: an error in one turn, not a machine out of memory."""
    now = status_bytes(os.getpid(), "VmData")
    if count is None or now is None:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = now + count
    resource.setrlimit(resource.RLIMIT_DATA, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def main() -> None:
    """Serve the contender that the command line names."""
    engine, folder, threads, part, dtype = sys.argv[1:]
    serve(lambda: build(engine, Path(folder), int(threads), part, getattr(torch, dtype)), answer)


if __name__ == "__main__":
    main()
