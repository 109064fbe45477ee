"""An engine of the benchmark for llama.cpp's own environment: `PYTHON llama_worker.py llama FILE THREADS LONGEST`.

FILE is a GGUF file, LONGEST the tokens of the longest sequence. It talks as `worker.py` does, but keeps only the sequence that it
began last, and imports nothing of oxfuse, which an environment with llama-cpp-python need not have.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from typing import Any

SEED = 1234
"""As in `worker.py`: every engine is given the same tokens."""
FLASH, PLAIN = "flash attention", "plain attention"


class Llama:
    """A GGUF file in llama.cpp, through its C interface: the package's own class copies all logits of each step."""

    def __init__(self, path: str, threads: int, longest: int) -> None:
        os.environ["GGML_NO_BACKTRACE"] = "1"  # a debugger's words would come between the answers
        import llama_cpp

        self._llama = llama_cpp
        self._silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._silent, None)
        llama_cpp.llama_backend_init()
        self.name = f"llama.cpp (llama-cpp-python {llama_cpp.__version__})"
        self.implementations = (FLASH, PLAIN)
        began = time.perf_counter()
        self._model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
        if not self._model:
            raise ValueError(f"llama.cpp does not load {path}")
        self.vocab_size: int = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._threads, self._longest, self._context = threads, longest, None
        self.choose(FLASH)
        self.load_seconds = time.perf_counter() - began

    def choose(self, implementation: str) -> None:
        """Use this attention from now on."""
        llama = self._llama
        if self._context is not None:
            llama.llama_free(self._context)
        params = llama.llama_context_default_params()
        params.n_ctx = params.n_batch = self._longest  # a prompt is one call, which llama.cpp cuts into its own batches
        params.n_threads = params.n_threads_batch = self._threads
        params.flash_attn_type = (PLAIN, FLASH).index(implementation)
        params.swa_full = False  # layers that slide keep their window alone: less to read, and as its own programs do
        self._context = llama.llama_init_from_model(self._model, params)
        if not self._context:
            raise ValueError(f"llama.cpp makes no context of {self._longest} tokens with {implementation}")

    def prefill(self, ids: list[int]) -> Any:
        """Begin a sequence; return a pointer to the logits of the last token."""
        self._llama.llama_memory_clear(self._llama.llama_get_memory(self._context), True)
        return self._run(ids)

    def decode(self, token: int) -> Any:
        """Continue it by a token."""
        return self._run([token])

    def _run(self, ids: list[int]) -> Any:
        if len(ids) > self._longest:  # llama.cpp would end the process
            raise ValueError(f"{len(ids)} tokens are more than the {self._longest} that llama.cpp was given room for")
        tokens = (self._llama.llama_token * len(ids))(*ids)
        if code := self._llama.llama_decode(self._context, self._llama.llama_batch_get_one(tokens, len(ids))):
            raise ValueError(f"llama_decode of {len(ids)} tokens ended with {code}")
        return self._llama.llama_get_logits_ith(self._context, -1)


def tokens_for(count: int, vocab_size: int) -> list[int]:
    """Return the same seeded tokens as `worker.py` gives to its engines."""
    return random.Random(SEED).choices(range(vocab_size), k=count)


def answer(engine: Llama, request: dict[str, Any]) -> dict[str, Any]:
    """Do what a request asks for and return what is told."""
    if request["do"] == "choose":
        engine.choose(request["implementation"])
        return {}
    if request["do"] == "loaded":
        return {"seconds": engine.load_seconds}
    first = request.get("first", 0)
    ids = tokens_for(first + request["tokens"], engine.vocab_size)[first:]
    if request["do"] == "decode":
        seconds = []
        for token in ids:
            began = time.perf_counter()
            engine.decode(token)
            seconds.append(time.perf_counter() - began)
        return {"seconds": seconds}
    began = time.perf_counter()
    logits = engine.prefill(ids)
    seconds_taken = time.perf_counter() - began
    return {"seconds": seconds_taken, "logits": logits[: engine.vocab_size]} if request["do"] == "prefill" else {}


def say(told: dict[str, Any]) -> None:
    """Write one line."""
    print(json.dumps(told), flush=True)


def main() -> None:
    """Answer requests until there are no more."""
    try:
        engine = Llama(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    except Exception as error:  # whatever it is, the benchmark is told
        say({"error": f"{type(error).__name__}: {error}"})
        return
    say({"name": engine.name, "implementations": engine.implementations})
    for line in sys.stdin:
        try:
            say(answer(engine, json.loads(line)))
        except Exception as error:
            say({"error": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    main()
