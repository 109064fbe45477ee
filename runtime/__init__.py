"""Loads artifacts and runs them: everything that a machine without the compiler needs.

The public names are imported on first use, because `oxfuse.errors` lives here and must not cost an import of torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from oxfuse.runtime.artifact import load
    from oxfuse.runtime.generate import Chunk, Generation
    from oxfuse.runtime.model import CompiledModel
    from oxfuse.runtime.session import Session

_HOMES = {"Chunk": "generate", "Generation": "generate", "CompiledModel": "model", "load": "artifact", "Session": "session"}

__all__ = ["Chunk", "CompiledModel", "Generation", "Session", "load"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"oxfuse.runtime.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'oxfuse.runtime' has no attribute {name!r}")
