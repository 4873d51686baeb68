"""`geodiag cascade`: the cascade behind each spike, in words and as data."""

import math
from typing import TYPE_CHECKING, Annotated, Any

import typer

from geodiag.cli.output import number, place, print_json, prose, screen

if TYPE_CHECKING:
    from rich.console import RenderableType

    from geodiag.cascade.evidence import Evidence
    from geodiag.cascade.types import Cascade, Onset

_STYLE = {1: "magenta", 2: "cyan", 3: "yellow", "data": "green", None: "red"}
_KINDS = {"nonfinite": "Loss not finite"}
_KNOTS = 8
"""Places of the path that are shown; the words tell of all."""
_ROWS = 5


def cascade(
    run: Annotated[
        str,
        typer.Argument(metavar="RUN", help="A run directory; a path or a URL. It may be training."),
    ],
    spike: Annotated[
        int | None,
        typer.Option(
            help="Number of the spike, 0 the first, -1 the last; or a step.  (default: all spikes)"
        ),
    ] = None,
    json: Annotated[
        bool, typer.Option("--json", help="Print a JSON list, one object a spike.")
    ] = False,
) -> None:
    """Tell the cascade behind each spike: where it began, how it spread, and what would have
    stopped it.
    """
    from geodiag.cascade.explain import cascades, explain
    from geodiag.run import open_run

    opened = open_run(run)
    found = cascades(opened) if spike is None else [explain(opened, spike)]
    if json:
        print_json([c.as_json() for c in found])
        return
    if not found:
        screen().print(
            "Nothing happened to the loss: there is no cascade to tell. A step can be asked about: --spike N"
        )
    for i, c in enumerate(found):
        for part in ["", *_told(c)] if i else _told(c):
            screen().print(part)
    for piece, why in opened.problems.items():
        screen().print(f"not read: {piece}: {why}", style="yellow", markup=False)


def _told(c: "Cascade") -> list["RenderableType"]:
    parts: list[RenderableType] = [_head(c), prose(c.words), ""]
    if c.onset is not None:
        parts += [_path(c), "", _evidence(c), ""]
    parts.append(_verdict(c))
    for caveat in c.caveats:
        said = prose(f"but {caveat}", indent=2)
        said.stylize("yellow")
        parts.append(said)
    return parts


def _head(c: "Cascade") -> str:
    if c.spike is None:
        return f"[bold]Step {c.spike_onset:,}[/]  [dim]the loss did not leave its trend here[/]"
    peak, end = c.spike["peak"], c.spike["end"]
    tail = "" if peak is None else f"  peak at step {peak:,}"
    over = "over at" if end is None or end > c.spike_onset else "training went back to"
    tail += "  still on" if end is None else f"  {over} step {end:,}"
    kind = _KINDS.get(c.spike["kind"], c.spike["kind"].capitalize())
    return f"[bold red]{kind} at step {c.spike_onset:,}[/][dim]{tail}[/]"


def _path(c: "Cascade") -> "RenderableType":
    """Knot under knot in time, from the origin to the loss."""
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for side in ("right", "left", "left", "left", "left"):
        table.add_column(justify=side, no_wrap=True)
    if c.cause == "lr":
        table.add_row(f"step {c.onset:,}", "[bold red]●[/]", "learning rate", "", "")
    knots = [*c.path[:-1][:_KNOTS], c.path[-1]]
    for i, knot in enumerate(knots):
        if knot is c.path[-1] and len(c.path) - 1 > _KNOTS:
            table.add_row("", "", f"[dim]and {len(c.path) - 1 - _KNOTS} more places[/]", "", "")
        mark = "●" if i == 0 and c.cause != "lr" else "◆" if knot is c.path[-1] else "│"
        table.add_row(*_knot(c, knot, mark))
    return table


def _knot(c: "Cascade", knot: "Onset", mark: str) -> tuple[str, ...]:
    from geodiag.cascade.defence import NAMES

    style = _STYLE[knot.stage]
    early = c.spike_onset - knot.step
    when = f"{early} before" if early > 0 else "with the loss" if early == 0 else f"{-early} after"
    if knot.metric == "loss" and c.spike is None:
        return f"step {knot.step:,}", f"[{style}]{mark}[/]", "[bold]asked about[/]", "", ""
    if knot.stage is None:
        return f"step {knot.step:,}", f"[{style}]{mark}[/]", "[bold]loss[/]", "", ""
    where = place(knot.layer, knot.site, knot.expert) or "the batch"
    name = "" if knot.stage == "data" else f"[{style}]{knot.stage} {NAMES[knot.stage]}[/]"
    return f"step {knot.step:,}", f"[{style}]{mark}[/]", where, name, f"[dim]{when}[/]"


def _evidence(c: "Cascade") -> "RenderableType":
    from rich.table import Table

    table = Table(
        "evidence",
        "is",
        "usually",
        "robust z",
        "where",
        box=None,
        pad_edge=False,
        header_style="dim",
    )
    for column in table.columns[1:4]:
        column.justify = "right"
    for e in c.evidence[:_ROWS]:
        table.add_row(*_evidence_row(e))
    return table


def _evidence_row(e: "Evidence") -> tuple[str, ...]:
    z = "≥ 1000" if e.score >= 1000 else f"{e.score:.0f}"
    where = ", ".join(w for w in (f"step {e.step:,}", place(e.layer, e.site, e.expert)) if w)
    value = number(e.value, e.unit) if math.isfinite(e.value) else "not finite"
    return e.metric, value, number(e.usual, e.unit), z, where


def _verdict(c: "Cascade") -> "RenderableType":
    filled = round(10 * c.confidence)
    rows: list[Any] = [
        f"[bold]confidence[/] {'█' * filled}[dim]{'░' * (10 - filled)}[/] {c.confidence:.2f}"
    ]
    if c.defence:
        rows.append(f"[bold]fits[/]       [green]{c.defence}[/]")
    for other in c.alternatives[:2]:
        stage = other.stage if other.stage == "data" else f"stage {other.stage}"
        where = place(other.layer, other.site, other.expert) or "the batch"
        rows.append(
            f"[dim]or         {stage}, {where}, step {other.onset:,} ({other.confidence:.2f}): {other.why}[/]"
        )
    return "\n".join(rows)
