"""An engine of the benchmark for onnxruntime-genai's own environment: `PYTHON genai_worker.py genai FOLDER THREADS`.

It talks as `worker.py` does and imports nothing of oxfuse, which that environment does not have. Steps are fed seeded tokens, not
choices: every package gets the same.
"""

from __future__ import annotations

import json
import random
import sys
import time
from pathlib import Path
from typing import Any

SEED = 1234
LONGEST = 2048
"""Tokens that the shared cache of a sequence has room for."""


class Genai:
    """A folder as onnxruntime-genai loads it."""

    def __init__(self, folder: str) -> None:
        import numpy
        import onnxruntime_genai

        self._numpy, self._genai = numpy, onnxruntime_genai
        self.name = f"onnxruntime-genai {onnxruntime_genai.__version__}"
        config = json.loads((Path(folder) / "genai_config.json").read_text("utf-8"))
        self.vocab_size: int = config["model"]["vocab_size"]
        self._model = onnxruntime_genai.Model(folder)
        self._generator: Any = None

    def prefill(self, ids: list[int]) -> Any:
        """Begin a sequence; return the logits of the last token."""
        params = self._genai.GeneratorParams(self._model)
        params.set_search_options(max_length=LONGEST, do_sample=False)
        self._generator = self._genai.Generator(self._model, params)
        return self._append(ids)

    def decode(self, token: int) -> Any:
        """Continue it by a token."""
        return self._append([token])

    def _append(self, ids: list[int]) -> Any:
        self._generator.append_tokens(self._numpy.array(ids, self._numpy.int32))
        return self._generator.get_output("logits")[0, -1]


def main() -> None:
    """Answer requests until there are no more."""
    try:
        engine = Genai(sys.argv[2])
    except Exception as error:  # whatever it is, the benchmark is told
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), flush=True)
        return
    print(json.dumps({"name": engine.name, "implementations": []}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        count = request["tokens"]
        ids = [random.Random(SEED + i).randrange(engine.vocab_size) for i in range(count)]
        began = time.perf_counter()
        if request["do"] == "decode":
            seconds = []
            for token in ids:
                began = time.perf_counter()
                engine.decode(token)
                seconds.append(time.perf_counter() - began)
            answer: dict[str, Any] = {"seconds": seconds}
        else:
            logits = engine.prefill(ids)
            answer = {"seconds": time.perf_counter() - began, "logits": [float(value) for value in logits]}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
