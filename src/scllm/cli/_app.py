"""The command-line application, with one-line errors and exit codes."""

from __future__ import annotations

import traceback
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from scllm import __version__, settings

__all__ = ["Debug", "Verbose", "app"]

BAD_INPUT, FAILED = 2, 1
_BAD_INPUT = (ValueError, KeyError, TypeError, FileNotFoundError)
_PACKAGE = Path(__file__).parents[1]


class _OneLineErrors(TyperGroup):
    """Command group that reports errors of all commands in one line on stderr."""

    def invoke(self, ctx: typer.Context) -> Any:
        """Run the command; exit with 2 for bad input and 1 for other failures."""
        warnings.formatwarning = _one_line_warning
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort):
            raise
        except Exception as error:
            if ctx.ensure_object(dict).get("debug"):
                traceback.print_exc()
            else:
                typer.echo(f"error: {_one_line(error)}", err=True)
            raise typer.Exit(_exit_code(error)) from None


def _one_line(error: Exception) -> str:
    if hasattr(error, "format_message"):  # an invalid option or argument
        context = getattr(error, "ctx", None)
        where = context.command_path if context is not None else "scllm"
        text = " ".join(error.format_message().split())
        if text.startswith("Missing argument"):  # which one is a guess, as a single word is read as the last argument
            names = [one.metavar for one in context.command.params if one.param_type_name == "argument"]
            text = f"Expected `{where} {' '.join(names)}`, but an argument is missing."
        return f"{text} See `{where} --help`."
    # the text of a KeyError is its quoted argument
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    if _exit_code(error) == BAD_INPUT:
        return " ".join(text.split())
    first = text.strip().splitlines()[:1]
    return first[0] if first else f"{type(error).__name__}. Run again with --debug to see the traceback."


def _exit_code(error: Exception) -> int:
    """Return 2 if a check of scllm or of the command line raised; the same exception from elsewhere is a failure."""
    if hasattr(error, "format_message"):
        return BAD_INPUT
    frames = traceback.extract_tb(error.__traceback__)
    is_ours = bool(frames) and Path(frames[-1].filename).is_relative_to(_PACKAGE)
    return BAD_INPUT if is_ours and isinstance(error, _BAD_INPUT) else FAILED


def _one_line_warning(message: Warning | str, category: type[Warning], *_: object, **__: object) -> str:
    return f"warning: {' '.join(str(message).split())}\n"


def _say_more(ctx: typer.Context, value: bool) -> None:
    if value:
        before, settings.verbosity = settings.verbosity, 3
        ctx.call_on_close(lambda: setattr(settings, "verbosity", before))


def _keep_traceback(ctx: typer.Context, value: bool) -> None:
    ctx.find_root().ensure_object(dict)["debug"] = value


def _say_version(value: bool) -> None:
    if value:
        typer.echo(__version__)
        raise typer.Exit


Verbose = Annotated[bool, typer.Option("--verbose", callback=_say_more, help="Show details too, such as each epoch.")]
Debug = Annotated[
    bool, typer.Option("--debug", callback=_keep_traceback, is_eager=True, help="Show the traceback of an error.")
]

app = typer.Typer(
    name="scllm",
    cls=_OneLineErrors,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@app.callback()
def scllm(
    version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Pretrain, fine-tune and use single-cell transformers on AnnData files."""
