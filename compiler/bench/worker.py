"""A process that runs one engine and measures it on request: `python -m oxfuse.compiler.bench.worker ENGINE FOLDER`.

Requests are lines of JSON on standard input, answers lines of JSON on standard output. Each engine has a process of its own,
since two in one share a thread pool and an allocator, and disturb each other even when idle.

    {"do": "prefill", "tokens": n}            -> {"seconds", "logits"}   n seeded tokens, logits of the last
    {"do": "context", "tokens": n}            -> {}                      begin a sequence of n tokens and keep it
    {"do": "decode", "tokens": n}             -> {"seconds": [n]}        continue it, or with "context": m that of m tokens,
                                                                         with "first": k by the seeded tokens from k on
    {"do": "choose", "implementation": name}  -> {}                      of those in {"implementations"} of the first answer
    {"do": "loaded"}                          -> {"seconds"}             that loading took, imports left out

The first line says what the engine is. An answer {"error"} says that the engine could not do it.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

SEED = 1234


class Engine(Protocol):
    """What is measured: `prefill` and `decode` return logits [V] of the last token."""

    name: str
    implementations: tuple[str, ...]
    vocab_size: int
    load_seconds: float

    def choose(self, implementation: str) -> None:
        """Use another of its implementations from now on."""

    def prefill(self, ids: list[int]) -> torch.Tensor:
        """Begin a new sequence with `ids`, which `decode` continues."""

    def keep(self, length: int) -> None:
        """Keep the sequence that has just begun with `length` tokens, in place of an earlier one of as many."""

    def resume(self, length: int) -> None:
        """Let `decode` continue the kept sequence that began with `length` tokens."""

    def decode(self, token: int) -> torch.Tensor:
        """Continue the sequence."""


class Oxfuse:
    """An artifact, through the session that an application would use."""

    def __init__(self, folder: Path, threads: int) -> None:
        import oxfuse
        from oxfuse.runtime.artifact import load  # the public names are lazy: what importing costs is not what loading costs
        from oxfuse.runtime.session import Session

        self.implementations: tuple[str, ...] = ()
        self.name = f"oxfuse {oxfuse.__version__}"
        began = time.perf_counter()
        self._model = load(folder, threads=threads, prefix_cache_bytes=0)  # a prompt that comes again runs again
        self.load_seconds = time.perf_counter() - began
        self._session, self._kept = self._model.session(), dict[int, Session]()
        self.vocab_size = self._model.vocab_size

    def choose(self, implementation: str) -> None:
        raise ValueError(f"oxfuse has no implementation {implementation}")

    def prefill(self, ids: list[int]) -> torch.Tensor:
        if self._session not in self._kept.values():
            self._session.close()
        self._session = self._model.session()
        return self._session.prefill(ids)

    def keep(self, length: int) -> None:
        if length in self._kept:
            self._kept[length].close()
        self._kept[length] = self._session

    def resume(self, length: int) -> None:
        self._session = self._kept[length]

    def decode(self, token: int) -> torch.Tensor:
        return self._session.decode(token)


class Transformers:
    """transformers' own model with the checkpoint's values in bfloat16 and its growing cache."""

    def __init__(self, folder: Path, threads: int) -> None:
        import transformers

        torch.set_num_threads(threads)
        self.name = f"transformers {transformers.__version__}"
        began = time.perf_counter()
        self._model = transformers_model(folder, torch.bfloat16)
        self.load_seconds = time.perf_counter() - began
        config = self._model.config
        self.implementations: tuple[str, ...] = (
            ("grouped_mm", "batched_mm", "eager") if hasattr(config, "num_experts_per_tok") else ()
        )
        self.vocab_size = config.vocab_size
        self._config = config
        self._cache: Any = None
        self._kept = dict[int, Any]()

    def choose(self, implementation: str) -> None:
        self._model.set_experts_implementation(implementation)
        self._implementation = implementation

    def prefill(self, ids: list[int]) -> torch.Tensor:
        config = self._config
        if self.implementations and self._implementation == "batched_mm":  # copies the weights of every routed row
            copied = len(ids) * config.num_experts_per_tok * config.hidden_size * config.intermediate_size * 6
            if copied > 4 << 30:
                raise ValueError(f"batched_mm would copy {copied >> 30} GiB of weights")
        return self._run(ids, None)

    def keep(self, length: int) -> None:
        self._kept[length] = self._cache

    def resume(self, length: int) -> None:
        self._cache = self._kept[length]

    def decode(self, token: int) -> torch.Tensor:
        return self._run([token], self._cache)

    def _run(self, ids: list[int], cache: Any) -> torch.Tensor:
        out = self._model(torch.tensor([ids]), past_key_values=cache, use_cache=True, logits_to_keep=1)
        self._cache = out.past_key_values
        logits: torch.Tensor = out.logits[0, -1].float()
        return logits


def transformers_model(folder: Path, dtype: torch.dtype, attention: str | None = None) -> Any:
    """Return transformers' language model of a checkpoint, in eval mode; `attention`: "eager", "sdpa" or its own choice."""
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM

    transformers.logging.set_verbosity_error()
    config = AutoConfig.from_pretrained(folder)
    if not hasattr(config, "quantization_config"):
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=attention).eval()
    from transformers.initialization import no_init_weights

    from oxfuse.models.checkpoint import Checkpoint
    from oxfuse.models.contract import lookup

    del config.quantization_config  # loading MXFP4 needs a further package; the values come from our own reader
    with no_init_weights():  # random numbers for 20b layers take a minute, and are overwritten
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention).eval()
    checkpoint = Checkpoint.open(folder)
    contract = lookup(config.model_type)
    sources = contract.sources(checkpoint, contract.parse_config(checkpoint.config), contract.default_task)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            step = 1 if sources[name].encoding == "mxfp4" else len(parameter)  # one expert at a time is held in float32
            for first in range(0, len(parameter), step):
                parameter[first : first + step].copy_(sources[name].read(slice(first, first + step)))
    return model


ENGINES: dict[str, Callable[[Path, int], Engine]] = {"oxfuse": Oxfuse, "transformers": Transformers}


def tokens_for(count: int, vocab_size: int) -> list[int]:
    """Return the same seeded tokens for every engine."""
    return random.Random(SEED).choices(range(vocab_size), k=count)  # not torch's: other interpreters need not have it


def _answer(engine: Engine, request: dict[str, Any]) -> dict[str, Any]:
    if request["do"] == "choose":
        engine.choose(request["implementation"])
        return {}
    if request["do"] == "loaded":
        return {"seconds": engine.load_seconds}
    first = request.get("first", 0)
    ids = tokens_for(first + request["tokens"], engine.vocab_size)[first:]
    if request["do"] == "decode":
        if "context" in request:
            engine.resume(request["context"])
        seconds = []
        for token in ids:
            began = time.perf_counter()
            engine.decode(token)
            seconds.append(time.perf_counter() - began)
        return {"seconds": seconds}
    began = time.perf_counter()
    logits = engine.prefill(ids)
    seconds_taken = time.perf_counter() - began
    if request["do"] == "context":
        engine.keep(request["tokens"])
        return {}
    return {"seconds": seconds_taken, "logits": logits.tolist()}


class Named(Protocol):
    """What the first answer says."""

    name: str
    implementations: tuple[str, ...]


E = TypeVar("E", bound=Named)


@torch.no_grad()
def serve(build: Callable[[], E], answer: Callable[[E, dict[str, Any]], dict[str, Any]]) -> None:
    """Build the engine and answer requests until standard input ends."""
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print must not come between the answers

    def say(told: dict[str, Any]) -> None:
        answers.write(json.dumps(told) + "\n")
        answers.flush()

    try:
        engine = build()
    except Exception as error:
        say({"error": f"{type(error).__name__}: {error}"})
        return
    say({"name": engine.name, "implementations": engine.implementations})
    for line in sys.stdin:
        try:
            say(answer(engine, json.loads(line)))
        except Exception as error:
            say({"error": f"{type(error).__name__}: {error}"})


def main() -> None:
    """Serve the engine that the command line names."""
    kind, folder, threads = sys.argv[1:]
    serve(lambda: ENGINES[kind](Path(folder), int(threads)), _answer)


if __name__ == "__main__":
    main()
