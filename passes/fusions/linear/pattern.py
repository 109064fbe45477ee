"""Nothing to find: a dense layer is one node of the graph, `aten.linear`, and stays it until it is lowered."""

from __future__ import annotations

from oxfuse.passes.fusion import Fusion

FUSION: Fusion | None = None
