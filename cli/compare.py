"""`geodiag compare RUN RUN…`: runs side by side, as one HTML file that needs no network."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from geodiag.cli.output import STATUS_STYLE, number, print_json, screen
from geodiag.cli.report_file import JSON, OPEN, OUT, size_of, write_page

if TYPE_CHECKING:
    from geodiag.dashboard.reports.comparison import Comparison

_RUNS = "Run directories, two or more; paths or URLs. They may be training."


def compare(
    runs: Annotated[list[str], typer.Argument(metavar="RUN RUN…", help=_RUNS)],
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE.html", help=f"{OUT}  (default: compare-RUN-RUN.html)"),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help=JSON)] = False,
    open_browser: Annotated[bool, typer.Option("--open", help=OPEN)] = False,
) -> None:
    """Write one HTML file that sets runs side by side: losses, metrics, stages, spikes, and the
    settings that differ.

    It needs no network, follows light and dark, and can be printed. --json prints an object whose
    lists follow the order of the runs: runs (label, run, status, last_step, loss, tokens, spikes,
    problems), shared (last_step, steps,
    loss: the means over the newest steps that all have), metrics (name → unit, worse, worst, last,
    and better, the places of the runs that stand better), differences (setting → values). What a
    run does not have is null.
    """
    import time

    from geodiag.dashboard.reports.comparison import compare as look_at
    from geodiag.dashboard.reports.comparison_page import page
    from geodiag.run import open_run

    told = look_at([open_run(r) for r in runs])
    path = None
    if out is not None or open_browser or not json:
        path = write_page(page(told, time.time()), out, _name(told), then_open=open_browser)
    if json:
        print_json(told.as_json())
    elif path is not None:
        _say(told, path)


def _name(told: "Comparison") -> str:
    """`compare-a-b`, `compare-a-b-and-3-more`."""
    names = [s.label for s in told.runs]
    return "-".join(
        ["compare", *names[:2], *([f"and-{len(names) - 2}-more"] if len(names) > 2 else [])]
    )


def _say(told: "Comparison", path: Path) -> None:
    from rich.markup import escape
    from rich.table import Table

    shared, differences = told.shared(), told.differences()
    table = Table(
        "run", "status", "last step", "loss, shared", "spikes", "composite gain", box=None, pad_edge=False
    )  # fmt: skip
    for column in table.columns[2:]:
        column.justify = "right"
    for s, loss in zip(told.runs, shared["loss"], strict=True):
        h, worst = s.health, s.health.composite.worst
        status = f"[{STATUS_STYLE[h.status]}]{h.status}[/]"
        step = "–" if h.last_step is None else f"{h.last_step:,}"
        gain = number(worst.value, "×") if worst else "–"
        table.add_row(escape(s.label), status, step, number(loss), str(len(s.spikes)), gain)
    screen().print(table)
    if shared["last_step"] is None:
        screen().print("no step in common: there is no shared loss", style="dim")
    else:
        n, last = shared["steps"], shared["last_step"]
        screen().print(
            f"loss, shared: mean of the {n} newest steps that all have, up to step {last:,}",
            style="dim",
        )
    settings = ", ".join(list(differences)[:6]) + (", …" if len(differences) > 6 else "")
    screen().print(
        f"{len(differences)} settings differ" + (f": {escape(settings)}" if settings else "")
    )
    for s in told.runs:
        for piece, why in s.cache.problems().items():
            screen().print(f"{s.label}: not read: {piece}: {why}", style="yellow", markup=False)
    screen().print(f"wrote {escape(str(path))} ({size_of(path)})")
