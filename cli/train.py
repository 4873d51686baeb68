"""`geodiag train`: train a reference model and record it."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from geodiag.cli.dataclass_options import takes_options
from geodiag.cli.train_options import Options, new_run_folder

if TYPE_CHECKING:
    from geodiag.cli.training import Training


@takes_options(Options)
def train(
    options: Options,
    written: frozenset[str],
    resume: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN",
            help="Resume a training that ended or was killed, from its newest snapshot on disk.",
            show_default=False,
            rich_help_panel=Options.panel,
        ),
    ] = None,
) -> None:
    """Train a reference model and record every step in a run directory."""
    from geodiag.cli.progress import watch
    from geodiag.cli.resume import resumed_options
    from geodiag.cli.training import Training

    if resume is not None:
        options = resumed_options(resume, {name: getattr(options, name) for name in written})
    elif "run" not in written:
        options = replace(options, run=new_run_folder(f"{options.size}-{options.residual}"))
    training = Training(options)
    watch(training)
    if training.rank_info.rank == 0:
        _print_verdict(training)


def _print_verdict(training: "Training") -> None:
    from geodiag.cli.show import show

    show(str(training.options.run))
    typer.echo(f"\nSee it: geodiag dashboard {training.options.run}")
