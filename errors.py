"""The errors of oxfuse under their public name; they are defined in `oxfuse.runtime.errors`."""

from oxfuse.runtime.errors import InternalError, OxfuseError, UserError, shown

__all__ = ["InternalError", "OxfuseError", "UserError", "shown"]
