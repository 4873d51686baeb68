"""`geodiag report RUN`: write one run as one HTML file that works offline."""

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
        typer.Argument(
            metavar="RUN", help="A run directory; a path or a URL. It may be still training."
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE.html", help=OUT, show_default="report-RUN.html"),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help=JSON)] = False,
    open_browser: Annotated[bool, typer.Option("--open", help=OPEN)] = False,
) -> None:
    """Write one HTML file about a run: health, loss, cascades, gain, routing, activations.

    The file works offline, follows the light or dark mode, and can be printed.

    --json prints the object of `geodiag show --json` with the key metrics only, and with the keys
    name, model, config, versions, cascades (the worst spikes, as in `geodiag cascade --json`) and
    untold, the number of the other spikes.
    """
    import time

    from geodiag.dashboard.reports.report_page import report as make_report
    from geodiag.run import open_run

    content = make_report(open_run(run))
    path = None
    if out is not None or open_browser or not json:
        path = write_page(
            content.html(time.time()),
            out,
            f"report-{content.cache.run.name}",
            then_open=open_browser,
        )
    if json:
        print_json(content.as_json())
    elif path is not None:
        _print(content, path)


def _print(content: "Report", path: Path) -> None:
    from rich.markup import escape

    h = content.health
    step = "no step yet" if h.last_step is None else f"last step {h.last_step:,}"
    status = f"[{STATUS_STYLE[h.status]}]{h.status}[/]"
    screen().print(
        f"[bold]{escape(content.cache.run.name)}[/]  {status}  {step}  loss {number(h.last_loss)}"
    )
    for c in content.cascades:
        screen().print(prose(f"step {c.spike_onset:,}: {c.words}", indent=2))
    if content.untold:
        screen().print(f"  and {content.untold:,} more spikes: geodiag cascade RUN explains all")
    for piece, why in content.cache.problems().items():
        screen().print(f"not read: {piece}: {why}", style="yellow", markup=False)
    screen().print(f"wrote {escape(str(path))} ({size_of(path)})")
