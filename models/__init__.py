"""Models: plain-PyTorch references, their configurations, and the readers of their checkpoints.

One folder a model. `load_reference` and `register` are public.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from oxfuse.models.contract import ModelContract, lookup, register
    from oxfuse.models.load import load_reference

_HOMES = {
    "load_reference": "oxfuse.models.load",
    "register": "oxfuse.models.contract",
    "lookup": "oxfuse.models.contract",
    "ModelContract": "oxfuse.models.contract",
}

__all__ = ["ModelContract", "load_reference", "lookup", "register"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'oxfuse.models' has no attribute {name!r}")
