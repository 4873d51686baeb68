"""`geodiag report RUN`: one run as one HTML file that needs no network."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from geodiag.cli.output import STATUS_STYLE, number, print_json, prose, screen
from geodiag.cli.report_file import JSON, OPEN, OUT, size_of, write_page

if TYPE_CHECKING:
    from geodiag.dashboard.reports.report_page import Report


def report(
    run: Annotated[
        str,
        typer.Argument(metavar="RUN", help="A run directory; a path or a URL. It may be training."),
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE.html", help=f"{OUT}  (default: report-RUN.html)"),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help=JSON)] = False,
    open_browser: Annotated[bool, typer.Option("--open", help=OPEN)] = False,
) -> None:
    """Write one HTML file that tells a run: health, loss, the cascade behind each spike, gain,
    routing, activations.

    It needs no network, follows light and dark, and can be printed. --json prints what `geodiag
    show --json` does, of the key metrics, with name, model, config, versions, cascades (as `geodiag
    cascade --json`, of the worst spikes) and untold, the number of spikes beyond those.
    """
    import time

    from geodiag.dashboard.reports.report_page import report as look_at
    from geodiag.run import open_run

    told = look_at(open_run(run))
    path = None
    if out is not None or open_browser or not json:
        path = write_page(
            told.html(time.time()), out, f"report-{told.cache.run.name}", then_open=open_browser
        )
    if json:
        print_json(told.as_json())
    elif path is not None:
        _say(told, path)


def _say(told: "Report", path: Path) -> None:
    from rich.markup import escape

    h = told.health
    step = "no step yet" if h.last_step is None else f"last step {h.last_step:,}"
    status = f"[{STATUS_STYLE[h.status]}]{h.status}[/]"
    screen().print(
        f"[bold]{escape(told.cache.run.name)}[/]  {status}  {step}  loss {number(h.last_loss)}"
    )
    for c in told.cascades:
        screen().print(prose(f"step {c.spike_onset:,}: {c.words}", indent=2))
    if told.untold:
        screen().print(f"  and {told.untold:,} more: geodiag cascade RUN tells of all")
    for piece, why in told.cache.problems().items():
        screen().print(f"not read: {piece}: {why}", style="yellow", markup=False)
    screen().print(f"wrote {escape(str(path))} ({size_of(path)})")
