"""The errors that oxfuse raises on purpose. They live here because the runtime must not import the compiler.

`oxfuse.errors` re-exports them. A message names what was found, what was expected and what to do next.
"""


class OxfuseError(Exception):
    """Base of every error that oxfuse raises on purpose."""

    exit_code = 70


class UserError(OxfuseError):
    """Something the caller can put right: a path, an option, a checkpoint, an input. Command line: exit code 2, no traceback."""

    exit_code = 2


class InternalError(OxfuseError):
    """A fault of oxfuse itself: a pass broke a graph, a rewrite disagrees with what it replaced. Command line: exit code 70."""
