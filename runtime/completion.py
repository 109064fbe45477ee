"""Completion of commands, options and folders in the user's shell, by click's own scripts."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from oxfuse.runtime.help_page import HelpPage

SHELLS = ("bash", "zsh", "fish")


@click.command(
    cls=HelpPage,
    examples=(
        'eval "$(oxfuse completion bash)"                  # try it in this shell',
        "oxfuse completion bash >> ~/.bashrc              # bash, from the next shell on",
        "oxfuse completion zsh >> ~/.zshrc                # zsh, below `compinit`",
        "oxfuse completion fish > ~/.config/fish/completions/oxfuse.fish",
    ),
)
@click.argument("shell", metavar="SHELL", type=click.Choice(SHELLS))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the script that completes oxfuse's commands, options and folders in SHELL: bash (4.4 or later), zsh or fish."""
    root = ctx.find_root()
    name = root.info_name or "oxfuse"
    script = get_completion_class(shell)
    assert script is not None, f"click knows {shell}"
    click.echo(script(root.command, {}, name, f"_{name.upper()}_COMPLETE").source())
