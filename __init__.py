"""oxfuse compiles GPT-OSS and GPT-NeoX checkpoints into artifacts that run without the training stack.

The names below are the public surface. They are imported on first use, so that a program which only runs artifacts never
imports the compiler.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from oxfuse import errors, models
    from oxfuse.compiler import compile
    from oxfuse.compiler.explain import Explanation, explain
    from oxfuse.runtime import Chunk, CompiledModel, Generation, Session, load

_HOMES = {
    "compile": "oxfuse.compiler",
    "explain": "oxfuse.compiler.explain",
    "Explanation": "oxfuse.compiler.explain",
    "load": "oxfuse.runtime",
    "CompiledModel": "oxfuse.runtime",
    "Session": "oxfuse.runtime",
    "Generation": "oxfuse.runtime",
    "Chunk": "oxfuse.runtime",
}
_MODULES = ("errors", "models", "compiler", "passes", "runtime")

__all__ = [
    "Chunk",
    "CompiledModel",
    "Explanation",
    "Generation",
    "Session",
    "__version__",
    "compile",
    "errors",
    "explain",
    "load",
    "models",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"oxfuse.{name}")
    raise AttributeError(f"module 'oxfuse' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, *_MODULES})
