"""`geodiag runs`: list the runs in a folder, one line per run."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from geodiag.cli.output import STATUS_STYLE, number, print_json, screen

if TYPE_CHECKING:
    from geodiag.health import Health

_METRICS_OF_TABLE = ("composite_gain_fwd", "composite_gain_bwd")
"""Metrics in the table; `--json` has all."""


def runs(
    folder: Annotated[
        str, typer.Argument(metavar="DIR", help="A folder of runs, or one run; a path or a URL.")
    ] = "runs",
    json: Annotated[
        bool, typer.Option("--json", help="Print a JSON list instead of a table.")
    ] = False,
) -> None:
    """List the runs in DIR: status, steps, loss, spikes, worst composite gain."""
    from geodiag.health import health
    from geodiag.run import find_runs

    shown = None if json else _METRICS_OF_TABLE
    found = [health(run, shown) for run in find_runs(folder)]
    if json:
        print_json([h.as_json() for h in found])
    else:
        _print_table(found)


def _print_table(found: list["Health"]) -> None:
    from rich.table import Table

    headings = ("run", "status", "last step", "loss", "spikes", "worst composite gain")
    table = Table(*headings, box=None, pad_edge=False)
    for column in table.columns[2:]:
        column.justify = "right"
    for h in found:
        worst = h.composite.worst
        gain = f"{number(worst.value, '×')} at step {worst.step:,}" if worst else "–"
        status = f"[{STATUS_STYLE[h.status]}]{h.status}[/]"
        step = "–" if h.last_step is None else f"{h.last_step:,}"
        table.add_row(Path(h.run).name, status, step, number(h.last_loss), str(len(h.spikes)), gain)
    screen().print(table)
    for h in found:
        for piece, why in h.problems.items():
            screen().print(f"{Path(h.run).name}: {piece}: {why}", style="yellow", markup=False)
