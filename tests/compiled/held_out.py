"""Text that the bundled model was not trained on."""

from __future__ import annotations

import torch
from torch import Tensor

from oxfuse.artifacts.python_corpus import read_corpus
from oxfuse.runtime import CompiledModel

SEED = 0


def held_out(model: CompiledModel, count: int = 4, length: int = 500) -> Tensor:
    """Return tokens [count, length], the beginnings of as many texts."""
    texts = sorted(read_corpus(SEED).held_out.items())
    ids = [model.tokenizer.encode(text) for _, text in texts if len(text) > 4 * length]
    rows = [row[:length] for row in ids if len(row) >= length][:count]
    assert len(rows) == count
    return torch.tensor(rows)
