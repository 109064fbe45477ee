"""The engines that are compared, as data: which artifacts of one checkpoint, and which peers. Imports no torch.

In: names. Out: an `EngineSpec` for each; `contenders.py` makes them ready.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from oxfuse.errors import UserError

Dense = Literal["bf16", "q8_0"]
OURS, PEER = "oxfuse", "transformers"
LLAMA_BF16, LLAMA_Q8 = "llama-bf16", "llama-q8"
INT8, INT8_DENSE = "oxfuse-int8", "oxfuse-int8-dense"


@dataclass(frozen=True, kw_only=True)
class EngineSpec:
    """An engine by name. `policy`: options of `oxfuse.compile`; `dense`: what llama.cpp's file holds dense matrices in.

    `rival`: which of llama.cpp's rows holds the same weights. `int8`: whether it may multiply in int8, which sets its floor.
    `most_tokens`: the longest prompt or context that it is asked for.
    """

    key: str
    title: str
    kind: Literal["oxfuse", "transformers", "llama"]
    policy: Mapping[str, Any] = field(default_factory=dict)
    dense: Dense = "bf16"
    rival: str | None = None
    int8: bool = False
    most_tokens: int | None = None

    def takes(self, tokens: int) -> bool:
        """Tell whether the engine is asked for sequences that begin with so many tokens."""
        return self.most_tokens is None or tokens <= self.most_tokens


VARIANTS = (
    EngineSpec(key=OURS, title="oxfuse exact", kind="oxfuse", rival=LLAMA_BF16),
    EngineSpec(
        key=INT8, title="oxfuse int8 activations", kind="oxfuse", policy={"activations": "int8"}, rival=LLAMA_BF16, int8=True
    ),
    EngineSpec(
        key=INT8_DENSE,
        title="oxfuse int8 activations, dense",
        kind="oxfuse",
        policy={"activations": "int8", "dense": "int8"},
        rival=LLAMA_Q8,
        int8=True,
    ),
)
PEERS = (
    EngineSpec(key=LLAMA_BF16, title="llama.cpp, dense bf16", kind="llama", dense="bf16", int8=True),
    EngineSpec(key=LLAMA_Q8, title="llama.cpp, dense q8_0", kind="llama", dense="q8_0", int8=True),
    # Its attention holds all scores of a layer at once: at 4096 tokens it needed more memory than all others together.
    EngineSpec(key=PEER, title="transformers bf16", kind="transformers", most_tokens=1024),
)
ENGINES = VARIANTS + PEERS


def chosen(specs: Collection[EngineSpec], only: Collection[str], skip: Collection[str]) -> tuple[EngineSpec, ...]:
    """Return the engines in `only`, or all, but for those in `skip`.

    Raises UserError for a name that none has, and where no engine of oxfuse stays.
    """
    keys = {spec.key for spec in specs}
    if unknown := sorted({*only, *skip} - keys):
        raise UserError(f"{unknown[0]} is no engine here: choose among {', '.join(sorted(keys))}.")
    kept = tuple(spec for spec in specs if (not only or spec.key in only) and spec.key not in skip)
    if not any(spec.kind == "oxfuse" for spec in kept):
        raise UserError("--only and --skip leave no engine of oxfuse, whose artifact says what a token costs: keep one.")
    return kept
