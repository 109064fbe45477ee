"""Chooses how a Triton kernel is cut into blocks: a table beside each kernel, `tuning.json`, filled on real GPUs.

A table maps a kernel's name to rules. The first rule whose `arch` and `where` fit decides, so that the last one, which asks
nothing, is what any other GPU and shape get.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oxfuse.errors import InternalError

TABLE = "tuning.json"
OPTIONS = ("num_warps", "num_stages")


@dataclass(frozen=True, kw_only=True)
class Config:
    """One way to launch a kernel. `blocks` are its constexpr parameters by name."""

    num_warps: int
    num_stages: int
    blocks: Mapping[str, int]

    @property
    def keywords(self) -> dict[str, int]:
        """Return what is passed to the launch: blocks, warps and stages."""
        return {**self.blocks, "num_warps": self.num_warps, "num_stages": self.num_stages}


def choose(folder: Path, kernel: str, arch: int, **shape: int | str | bool) -> Config:
    """Return the configuration of `kernel` in the table of `folder` for a GPU of `arch` (90 is sm_90) and a shape class.

    A rule is {"arch": [80, 90], "where": {"HEAD_DIM": [64, 128]}, "config": {"KEYS": 64, "num_warps": 4, "num_stages": 3}};
    either condition may be absent. Raises InternalError where no rule fits, or one asks for a property that `shape` lacks.
    """
    for rule in _table(folder).get(kernel, ()):
        where = rule.get("where", {})
        if unknown := where.keys() - shape.keys():
            raise InternalError(f"{folder.name}/{TABLE} asks for {sorted(unknown)} of {kernel}, which has {sorted(shape)}.")
        if arch in rule.get("arch", (arch,)) and all(shape[name] in values for name, values in where.items()):
            config = rule["config"]
            blocks = {name: value for name, value in config.items() if name not in OPTIONS}
            return Config(num_warps=config["num_warps"], num_stages=config["num_stages"], blocks=blocks)
    raise InternalError(f"{folder.name}/{TABLE} has no rule for {kernel} on sm_{arch} with {shape}.")


@functools.cache
def _table(folder: Path) -> dict[str, list[dict[str, Any]]]:
    table: dict[str, list[dict[str, Any]]] = json.loads((folder / TABLE).read_text("utf-8"))
    return table
