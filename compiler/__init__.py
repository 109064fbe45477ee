"""The compiler: a checkpoint goes in, an artifact comes out. It imports everything; only the command line imports it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from oxfuse.compiler.pipeline import compile as compile

__all__ = ["compile"]


def __getattr__(name: str) -> Any:
    if name == "compile":  # on first use: the rest of the package must not pay for it
        from oxfuse.compiler.pipeline import compile

        return compile
    raise AttributeError(f"module 'oxfuse.compiler' has no attribute {name!r}")
