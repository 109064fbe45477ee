"""The command line. Each command is imported when it is called, so that `oxfuse generate` never imports the compiler.

Here errors become exit codes: 0 done, 2 something the caller can put right, 70 a fault of oxfuse, 130 interrupted. An error is
one line on stderr. What goes wrong inside oxfuse leaves its traceback in a file, since the run may have taken an hour.
"""

from __future__ import annotations

import difflib
import errno
import importlib
import io
import os
import platform
import shlex
import sys
import tempfile
import traceback
import warnings
from dataclasses import dataclass
from typing import Any

import click
from click.shell_completion import CompletionItem

from oxfuse import __version__
from oxfuse.errors import InternalError, UserError

NAME = "oxfuse"
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ENOMEM, errno.EMFILE, errno.ENFILE)
"""Errors that say something of the machine, whoever meets them."""

_COMMANDS = {  # the module that holds the command, and its line in the list, which must not cost an import
    "compile": ("oxfuse.compiler.cli", "Compile a checkpoint into an artifact."),
    "verify": ("oxfuse.runtime.cli", "Check an artifact's hashes, and its logits against the reference's."),
    "generate": ("oxfuse.runtime.cli", "Continue a prompt, or answer one."),
    "chat": ("oxfuse.runtime.chat", "Talk with an artifact, turn by turn."),
    "classify": ("oxfuse.runtime.cli_heads", "Tell a text's label."),
    "tag": ("oxfuse.runtime.cli_heads", "Find the labelled stretches of a text."),
    "answer": ("oxfuse.runtime.cli_heads", "Find the answer to a question in a text."),
    "embed": ("oxfuse.runtime.cli_heads", "Print a text's hidden states."),
    "inspect": ("oxfuse.runtime.cli", "Show what an artifact holds and needs; executes nothing."),
    "bench": ("oxfuse.compiler.bench.cli", "Measure an artifact's speed."),
    "doctor": ("oxfuse.compiler.cli", "Tell what this machine can compile and run, and why not."),
    "quickstart": ("oxfuse.compiler.cli", "Compile, verify and run the bundled model."),
    "completion": ("oxfuse.runtime.completion", "Print the script that completes commands in your shell."),
}


class _Lazy(click.Group):
    """A group whose commands are looked up in the module that holds them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module = _COMMANDS[cmd_name][0]
        try:
            command: Any = getattr(importlib.import_module(module), cmd_name)
        except ModuleNotFoundError as error:
            raise _missing_package(cmd_name, error) from error
        assert isinstance(command, click.Command)
        return command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in _COMMANDS and not ctx.resilient_parsing:
            near = difflib.get_close_matches(args[0], _COMMANDS)
            hint = f"Did you mean {' or '.join(near)}?" if near else f"Commands: {', '.join(_COMMANDS)}."
            raise click.UsageError(f"There is no command {args[0]!r}. {hint}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in _COMMANDS.items()])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        if incomplete.startswith("-"):
            return super().shell_complete(ctx, incomplete)
        return [CompletionItem(name, help=line) for name, (_, line) in _COMMANDS.items() if name.startswith(incomplete)]


@dataclass(kw_only=True)
class _Settings:
    """What stands before the command's name."""

    traceback: bool = False


@click.group(
    cls=_Lazy,
    context_settings={"help_option_names": ["-h", "--help"]},
    invoke_without_command=True,
    epilog="`oxfuse COMMAND --help` shows a command's options, with examples. New here: `oxfuse quickstart`.",
)
@click.version_option(__version__, prog_name=NAME)
@click.option("--traceback", is_flag=True, envvar="OXFUSE_TRACEBACK", help="Show where an error arose, for a report of a fault.")
@click.pass_context
def oxfuse(ctx: click.Context, traceback: bool) -> None:
    """Compile GPT-OSS and GPT-NeoX checkpoints into artifacts, and run them."""
    ctx.ensure_object(_Settings).traceback = traceback
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


def main() -> None:
    """Run the command line of this process and exit."""
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # torch's exporter and compiler deprecate much; a user can change none of it
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a path or a text that the terminal's encoding lacks is no reason to fail
            stream.reconfigure(errors="backslashreplace")
    code = run(sys.argv[1:])
    try:
        sys.stdout.flush()
    except OSError as error:  # else the interpreter tries again at its end and complains
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = code or (1 if error.errno == errno.EPIPE else _fail(f"The output cannot be written: {error}."))
    sys.exit(code)


def run(arguments: list[str]) -> int:
    """Run one command line and return its exit code."""
    settings = _Settings()
    try:
        code = oxfuse.main(arguments, prog_name=NAME, standalone_mode=False, obj=settings)
        return code if isinstance(code, int) else 0
    except click.Abort:
        return _interrupted()
    except Exception as error:
        if settings.traceback:
            traceback.print_exception(error)
        return _explain(error, settings.traceback)


def _interrupted() -> int:
    click.echo(f"{NAME}: interrupted", err=True)
    return 130


def _explain(error: Exception, shown: bool) -> int:
    """Say in one line what went wrong and return the exit code; `shown` tells that the traceback has been printed."""
    if isinstance(error, click.UsageError):
        command = error.ctx.command_path if error.ctx else NAME
        message = error.format_message().strip()
        return _fail(f"{message}{'' if message[-1:] in '.?!)' else '.'} See `{command} --help`.")
    if isinstance(error, click.ClickException):
        return _fail(error.format_message())
    if isinstance(error, UserError):
        return _fail(str(error))
    if isinstance(error, MemoryError):
        return _fail(
            "This machine's memory is not enough. `oxfuse doctor` and `oxfuse inspect` tell what there is and what is needed."
        )
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        return _fail(f"{error}. Free what is short, or use another place.")
    what = str(error) if isinstance(error, InternalError) else f"{type(error).__name__}: {error}"
    where = "the traceback above" if shown else _write_traceback(error)
    return _fail(f"{what.rstrip('.')}. This is a fault of oxfuse: please report it with {where}.", "internal error", 70)


def _fail(message: str, kind: str = "error", code: int = 2) -> int:
    click.echo(f"{NAME}: {kind}: {' '.join(message.split())}", err=True)
    return code


def _write_traceback(error: Exception) -> str:
    """Write the traceback into a file, and return how to get at it."""
    lines = [
        f"{NAME} {__version__}, Python {platform.python_version()}, {platform.platform()}\n",
        *([f"torch {torch.__version__}\n"] if (torch := sys.modules.get("torch")) else []),
        f"{shlex.join(sys.argv)}\n\n",
        *traceback.format_exception(error),
    ]
    try:
        with tempfile.NamedTemporaryFile("w", prefix=f"{NAME}-fault-", suffix=".txt", delete=False, encoding="utf-8") as file:
            file.writelines(lines)
        return file.name
    except OSError:
        return f"what `{NAME} --traceback {shlex.join(sys.argv[1:])}` prints"


def _missing_package(command: str, error: ModuleNotFoundError) -> Exception:
    package = (error.name or "").partition(".")[0]
    if package == NAME:
        return InternalError(f"The command {command} is not in this build: {error}")
    return UserError(
        f"{NAME} {command} needs the Python package {package}, which is not installed: pip install {package}, "
        f"or install {NAME} again. `{NAME} doctor` lists all that is missing."
    )


if __name__ == "__main__":
    main()
