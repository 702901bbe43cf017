"""The command ``frostline``: one subcommand a file."""

from __future__ import annotations

import logging
import sys
import traceback
from typing import Annotated

import typer

from frostline.cli import cost, fit, measure, plan, watch
from frostline.errors import FrostlineError

app = typer.Typer(
    name="frostline",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(epilog=cost.EXAMPLES)(cost.cost)
app.command(epilog=measure.EXAMPLES)(measure.measure)
app.command(epilog=fit.EXAMPLES)(fit.fit)
app.command(epilog=plan.EXAMPLES)(plan.plan)
app.command(epilog=watch.EXAMPLES, context_settings=watch.SETTINGS)(watch.watch)


def _print_version(asked: bool) -> None:
    if asked:
        from frostline import __version__

        typer.echo(f"frostline {__version__}")
        raise typer.Exit


@app.callback()
def _frostline(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """What does it cost to train part of a network? Exactly, and before it runs."""


def main() -> None:
    """Run the command line. What a caller can cause is one message on stderr and exit code 2."""
    debug = "--debug" in sys.argv
    if not debug:  # torch logs every shape error of a fake kernel with a traceback, beside raising it
        logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)
    try:
        app(prog_name="frostline")
    except FrostlineError as error:
        if debug:
            traceback.print_exc()
        _complain(str(error), error)
        raise SystemExit(2) from None
    except Exception as error:  # the user's own, out of the target or the step; or ours
        if debug:
            traceback.print_exc()
        _complain(f"{type(error).__name__}: {error}", error)
        raise SystemExit(2) from None


def _complain(message: str, error: BaseException) -> None:
    print(f"frostline: error: {message}", file=sys.stderr)
    for note in getattr(error, "__notes__", []):
        print(f"  {note}", file=sys.stderr)
    if not isinstance(error, FrostlineError):
        print("  (--debug shows where it was raised)", file=sys.stderr)


__all__ = ["app", "main"]
