"""Nothing to find in a model's graph: `passes/merge.py` makes this op of others, in a GPU's decode program."""

from __future__ import annotations

from oxfuse.passes.fusion import Fusion

FUSION: Fusion | None = None
