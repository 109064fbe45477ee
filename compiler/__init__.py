"""The compiler: a checkpoint goes in, an artifact comes out. It imports everything; only the command line imports it."""

from oxfuse.compiler.compile import compile as compile

__all__ = ["compile"]
