"""The command line `geodiag COMMAND …`.

Commands parse, call and print. They import heavy modules inside their functions, so that `geodiag
--help` is fast.
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


class _OneLineErrors(TyperGroup):
    """Prints a user's mistake as one line and exits with code 1; all other errors propagate."""

    def make_context(self, *args: Any, **more: Any) -> Any:
        try:
            return super().make_context(*args, **more)
        except _UsageError as error:
            raise _usage_error(error) from None

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
            raise _usage_error(error) from None
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
        except BrokenPipeError:
            # `geodiag runs | head -1` closes stdout early; Python must not flush to it at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(141) from None


def _usage_error(error: Any) -> Exception:
    """Print a mistyped command or option like every other mistake; return the exit."""
    if type(error).__name__ == "NoArgsIsHelpError":
        return error  # no arguments at all: typer prints the help
    command = error.ctx.command_path if error.ctx else "geodiag"
    message = " ".join(error.format_message().replace("Value error, ", "").split()).rstrip(".")
    print_error(GeodiagError(f"{message}; see {command} --help"))
    return typer.Exit(1)


app = typer.Typer(
    name="geodiag",
    cls=_OneLineErrors,
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


_TRAIN = "Train"
_READ = "Read and steer runs"
_MACHINE = "This machine"

app.command(rich_help_panel=_TRAIN)(train)
app.command(rich_help_panel=_TRAIN, context_settings={"allow_interspersed_args": False})(run)
app.command(rich_help_panel=_TRAIN)(demo)
app.command(rich_help_panel=_READ)(dashboard)
app.command(rich_help_panel=_READ)(runs)
app.command(rich_help_panel=_READ)(show)
app.command(rich_help_panel=_READ)(spikes)
app.command(rich_help_panel=_READ)(cascade)
app.command(rich_help_panel=_READ)(report)
app.command(rich_help_panel=_READ)(compare)
app.command(rich_help_panel=_READ)(routing)
app.command(rich_help_panel=_READ)(export)
app.command(rich_help_panel=_MACHINE)(doctor)
app.add_typer(bench, rich_help_panel=_MACHINE)


def main() -> None:
    """Run the command line; the `geodiag` script calls this function."""
    app()
