"""The command line: `geodiag COMMAND …`. Commands parse, call and print; the heavy imports are
inside them.
"""

import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from geodiag import __version__
from geodiag.cli.bench import bench
from geodiag.cli.cascade import cascade
from geodiag.cli.compare import compare
from geodiag.cli.dashboard import dashboard
from geodiag.cli.demo import demo
from geodiag.cli.doctor import doctor
from geodiag.cli.export import export
from geodiag.cli.output import print_error
from geodiag.cli.report import report
from geodiag.cli.routing import routing
from geodiag.cli.run import run
from geodiag.cli.runs import runs
from geodiag.cli.show import show
from geodiag.cli.spikes import spikes
from geodiag.cli.train import train
from geodiag.errors import GeodiagError
from geodiag.extras import requires_extra

_UsageError: Any = typer.BadParameter.__bases__[0]


class _Polite(TyperGroup):
    """The one place where a user's mistake becomes one line and exit code 1, and going away is no
    mistake.
    """

    def make_context(self, *args: Any, **more: Any) -> Any:
        try:
            return super().make_context(*args, **more)
        except _UsageError as error:
            raise _said(error) from None

    def invoke(self, ctx: Any) -> Any:
        try:
            with requires_extra("this command"):
                result = super().invoke(ctx)
            sys.stdout.flush()
            return result
        except GeodiagError as error:
            print_error(error)
            raise typer.Exit(1) from None
        except _UsageError as error:
            raise _said(error) from None
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
        except BrokenPipeError:  # `geodiag runs | head -1`: the reader has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(141) from None


def _said(error: Any) -> Exception:
    """A mistyped command or option, told like every other mistake."""
    if type(error).__name__ == "NoArgsIsHelpError":
        return error  # no arguments at all: the help is the answer
    command = error.ctx.command_path if error.ctx else "geodiag"
    what = " ".join(error.format_message().replace("Value error, ", "").split()).rstrip(".")
    print_error(GeodiagError(f"{what}; see {command} --help"))
    return typer.Exit(1)


app = typer.Typer(
    name="geodiag",
    cls=_Polite,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"geodiag {__version__}")
        raise typer.Exit


@app.callback()
def geodiag(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version and exit.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Where and why a mixture-of-experts training run is about to tear, and what stops it."""


_TRAIN, _LOOK, _HERE = "Train", "Look and steer", "This machine"
app.command(rich_help_panel=_TRAIN)(train)
app.command(rich_help_panel=_TRAIN, context_settings={"allow_interspersed_args": False})(run)
app.command(rich_help_panel=_TRAIN)(demo)
app.command(rich_help_panel=_LOOK)(dashboard)
app.command(rich_help_panel=_LOOK)(runs)
app.command(rich_help_panel=_LOOK)(show)
app.command(rich_help_panel=_LOOK)(spikes)
app.command(rich_help_panel=_LOOK)(cascade)
app.command(rich_help_panel=_LOOK)(report)
app.command(rich_help_panel=_LOOK)(compare)
app.command(rich_help_panel=_LOOK)(routing)
app.command(rich_help_panel=_LOOK)(export)
app.command(rich_help_panel=_HERE)(doctor)
app.add_typer(bench, rich_help_panel=_HERE)


def main() -> None:
    """What the `geodiag` script runs."""
    app()
