"""`geodiag spikes`: run the online spike detector over a recorded loss."""

import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from geodiag.cli.output import number, print_json, screen

if TYPE_CHECKING:
    from geodiag.spikes.detector import Spike

_STYLE = {
    "spike": "bold red",
    "divergence": "red",
    "nonfinite": "bold magenta",
    "outlier": "yellow",
}


def spikes(
    target: Annotated[
        str,
        typer.Argument(
            metavar="RUN|CSV",
            help="A run directory, or a CSV with the columns step,loss[,grad_norm].",
        ),
    ],
    json_: Annotated[
        bool, typer.Option("--json", help="Print a JSON list instead of a table.")
    ] = False,
) -> None:
    """List spikes, outliers, divergences and non-finite losses, as detected during training."""
    from geodiag.spikes.loss_curves import find_spikes, read_updates

    updates = read_updates(target)
    found = find_spikes(updates)
    if json_:
        print_json([_as_json(spike) for spike in found])
    elif found:
        _print_table(found)
    else:
        first = updates[0].step
        last = updates[-1].step
        count = "one update" if len(updates) == 1 else f"{len(updates):,} updates"
        screen().print(f"No spikes in {count} (steps {first:,} to {last:,}).")


def _as_json(spike: "Spike") -> dict[str, Any]:
    # JSON has no infinity: a non-finite loss has no score.
    return asdict(spike) | {"score": spike.score if math.isfinite(spike.score) else None}


def _print_table(found: list["Spike"]) -> None:
    from rich.table import Table

    table = Table("kind", "detected", "onset", "peak", "end", "score", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for spike in found:
        steps = [
            "–" if step is None else f"{step:,}"
            for step in (spike.detected, spike.onset, spike.peak)
        ]
        end = "still on" if spike.end is None else f"{spike.end:,}"
        score = "not finite" if math.isinf(spike.score) else number(spike.score, "σ")
        table.add_row(f"[{_STYLE[spike.kind]}]{spike.kind}[/]", *steps, end, score)
    screen().print(table)
