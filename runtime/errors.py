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


def shown(value: object, most: int = 80) -> str:
    """Return a value as a message shows it: its repr, cut where a damaged file made it long."""
    try:
        text = repr(value)
    except ValueError:  # an int of thousands of digits
        return f"a {type(value).__name__} that is too long to print"
    return text if len(text) <= most else f"{text[:most]}… ({len(text)} characters)"
