"""How the commands present themselves: options in sections, examples word for word, folders that complete.

Every command of every room is made with `HelpPage` and `option`, so all help pages read alike.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

GENERAL = "Options"


class SectionOption(click.Option):
    """An option that stands under a heading of the help page."""

    def __init__(self, *args: Any, section: str = GENERAL, **attributes: Any) -> None:
        """Take what click.Option takes; `section` is the heading."""
        super().__init__(*args, **attributes)
        self.section = section


option = functools.partial(click.option, cls=SectionOption)


class HelpPage(click.Command):
    """A command whose help shows its options in sections, in the order of their first option, and examples that can be copied."""

    def __init__(self, *args: Any, examples: Sequence[str] = (), **attributes: Any) -> None:
        """Take what click.Command takes; `examples` are lines of a shell, a comment included where the line needs one."""
        super().__init__(*args, **attributes)
        self.examples = tuple(examples)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, those without a section (such as --help) last."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None and isinstance(param, click.Option):  # the docstring tells what the arguments are
                sections.setdefault(getattr(param, "section", GENERAL), []).append(record)
        for name in sorted(sections, key=lambda name: name == GENERAL):  # a stable sort
            with formatter.section(name):
                formatter.write_dl(sections[name])

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples as they are: a wrapped command line cannot be copied."""
        if self.examples:
            formatter.write_paragraph()
            formatter.write("Examples:\n")
            for line in self.examples:
                formatter.write(f"  {line}\n")


class Folder(click.Path):
    """A folder's path, existing or not; what is wrong with it is said by whoever opens it. Completes to folders."""

    def __init__(self) -> None:
        """Make the type."""
        super().__init__(path_type=Path)
        self.name = "folder"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Let the shell offer folders."""
        return [CompletionItem(incomplete, type="dir")]


FOLDER = Folder()
FILE = click.Path(path_type=Path)
"""A file's path, existing or not."""


def folders(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Let the shell offer folders for a parameter that may be something else too."""
    return [CompletionItem(incomplete, type="dir")]


Completer = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]


def one_of(*words: str) -> Completer:
    """Let the shell offer `words`; another one is refused by the code that knows them, with its reason."""
    return lambda ctx, param, incomplete: [CompletionItem(word) for word in words if word.startswith(incomplete)]
