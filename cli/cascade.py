"""`geodiag cascade`: print the cascade behind each spike, in words or as JSON."""

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
_MAX_PATH_ROWS = 8
"""Rows of the path that are printed; the words describe the whole path."""

_MAX_EVIDENCE_ROWS = 5


def cascade(
    run: Annotated[
        str,
        typer.Argument(
            metavar="RUN", help="A run directory; a path or a URL. It may be still training."
        ),
    ],
    spike: Annotated[
        int | None,
        typer.Option(
            help="One spike only: its number (0 the first, -1 the last) or a step.",
            show_default="all spikes",
        ),
    ] = None,
    json: Annotated[
        bool, typer.Option("--json", help="Print a JSON list, one object a spike.")
    ] = False,
) -> None:
    """Explain each spike: where it began, how it spread, and which defence fits."""
    from geodiag.cascade.explain import cascades, explain
    from geodiag.run import open_run

    opened = open_run(run)
    found = cascades(opened) if spike is None else [explain(opened, spike)]
    if json:
        print_json([c.as_json() for c in found])
        return
    if not found:
        screen().print(
            "No spikes in this run, so there is no cascade. To examine a step: --spike STEP"
        )
    for i, c in enumerate(found):
        for part in ["", *_parts(c)] if i else _parts(c):
            screen().print(part)
    for piece, why in opened.problems.items():
        screen().print(f"not read: {piece}: {why}", style="yellow", markup=False)


def _parts(c: "Cascade") -> list["RenderableType"]:
    parts: list[RenderableType] = [_head(c), prose(c.words), ""]
    if c.onset is not None:
        parts += [_path(c), "", _evidence(c), ""]
    parts.append(_verdict(c))
    for caveat in c.caveats:
        line = prose(f"but {caveat}", indent=2)
        line.stylize("yellow")
        parts.append(line)
    return parts


def _head(c: "Cascade") -> str:
    if c.spike is None:
        return f"[bold]Step {c.spike_onset:,}[/]  [dim]the loss did not leave its trend here[/]"
    peak = c.spike["peak"]
    end = c.spike["end"]
    tail = "" if peak is None else f"  peak at step {peak:,}"
    if end is None:
        tail += "  still on"
    elif end > c.spike_onset:
        tail += f"  over at step {end:,}"
    else:
        tail += f"  rolled back to step {end:,}"
    kind = _KINDS.get(c.spike["kind"], c.spike["kind"].capitalize())
    return f"[bold red]{kind} at step {c.spike_onset:,}[/][dim]{tail}[/]"


def _path(c: "Cascade") -> "RenderableType":
    """Return the path from the origin to the loss, one row per place, in order of time."""
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for side in ("right", "left", "left", "left", "left"):
        table.add_column(justify=side, no_wrap=True)
    if c.cause == "lr":
        table.add_row(f"step {c.onset:,}", "[bold red]●[/]", "learning rate", "", "")
    *places, loss = c.path
    for i, onset in enumerate(places[:_MAX_PATH_ROWS]):
        table.add_row(*_path_row(c, onset, "●" if i == 0 and c.cause != "lr" else "│"))
    left_out = len(places) - _MAX_PATH_ROWS
    if left_out > 0:
        table.add_row("", "", f"[dim]and {left_out} more places[/]", "", "")
    table.add_row(*_path_row(c, loss, "◆" if places or c.cause == "lr" else "●"))
    return table


def _path_row(c: "Cascade", onset: "Onset", mark: str) -> tuple[str, ...]:
    from geodiag.cascade.defence import NAMES

    style = _STYLE[onset.stage]
    early = c.spike_onset - onset.step
    when = f"{early} before" if early > 0 else "with the loss" if early == 0 else f"{-early} after"
    if onset.metric == "loss" and c.spike is None:
        return f"step {onset.step:,}", f"[{style}]{mark}[/]", "[bold]examined step[/]", "", ""
    if onset.stage is None:
        return f"step {onset.step:,}", f"[{style}]{mark}[/]", "[bold]loss[/]", "", ""
    where = place(onset.layer, onset.site, onset.expert) or "the batch"
    name = "" if onset.stage == "data" else f"[{style}]{onset.stage} {NAMES[onset.stage]}[/]"
    return f"step {onset.step:,}", f"[{style}]{mark}[/]", where, name, f"[dim]{when}[/]"


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
    for e in c.evidence[:_MAX_EVIDENCE_ROWS]:
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
        what = f"{stage}, {where}, step {other.onset:,} ({other.confidence:.2f}): {other.why}"
        rows.append(f"[dim]or         {what}[/]")
    return "\n".join(rows)
