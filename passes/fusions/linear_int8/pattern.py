"""No fusion: a policy of the compile, not the graph, says that dense layers shall have weights of 8 bits (passes/pack.py)."""

from __future__ import annotations

from oxfuse.passes.fusion import Fusion

FUSION: Fusion | None = None
