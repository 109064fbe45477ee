"""The errors of oxfuse under their public name; they are defined in `oxfuse.runtime.errors`."""

from oxfuse.runtime.errors import InternalError, OxfuseError, UserError

__all__ = ["InternalError", "OxfuseError", "UserError"]
