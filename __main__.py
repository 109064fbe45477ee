"""The command line. Each command is imported when it is called, so that `oxfuse generate` never imports the compiler."""

from __future__ import annotations

import importlib
import sys
import warnings
from typing import Any

import click

from oxfuse import __version__
from oxfuse.errors import OxfuseError

_COMMANDS = {
    "compile": "oxfuse.compiler.cli",
    "quickstart": "oxfuse.compiler.cli",
    "generate": "oxfuse.runtime.cli",
    "inspect": "oxfuse.runtime.cli",
    "verify": "oxfuse.runtime.cli",
}


class _Lazy(click.Group):
    """A group whose commands are looked up in the module that holds them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        command: Any = getattr(importlib.import_module(_COMMANDS[cmd_name]), cmd_name)
        assert isinstance(command, click.Command)
        return command


@click.group(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="oxfuse")
def oxfuse() -> None:
    """Compile GPT-OSS and GPT-NeoX checkpoints into artifacts, and run them."""


def main() -> None:
    """Run the command line. A UserError prints one line and exits 2, a fault of oxfuse exits 70."""
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # torch's exporter and compiler deprecate much; a user can change none of it
    try:
        oxfuse.main(standalone_mode=False)
    except click.exceptions.Exit as exit_:
        sys.exit(exit_.exit_code)
    except click.Abort:
        click.echo("oxfuse: interrupted", err=True)
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except OxfuseError as error:
        click.echo(f"oxfuse: error: {error}", err=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
