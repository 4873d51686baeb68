"""`geodiag compare RUN RUN…`: write runs side by side as one HTML file that works offline."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from geodiag.cli.output import STATUS_STYLE, number, print_json, screen
from geodiag.cli.report_file import JSON, OPEN, OUT, size_of, write_page

if TYPE_CHECKING:
    from geodiag.dashboard.reports.comparison import Comparison

_RUNS = "Run directories, two or more; paths or URLs. They may be still training."


def compare(
    runs: Annotated[list[str], typer.Argument(metavar="RUN RUN…", help=_RUNS)],
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE.html", help=OUT, show_default="compare-RUN-RUN.html"),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help=JSON)] = False,
    open_browser: Annotated[bool, typer.Option("--open", help=OPEN)] = False,
) -> None:
    """Write one HTML file that compares runs: losses, metrics, stages, spikes, settings.

    The file works offline, follows the light or dark mode, and can be printed.

    --json prints an object. Its lists have one item per run, in the order given; null stands for
    what a run does not have.

    Keys: runs (label, run, status, last_step, loss, tokens, spikes, problems); shared (last_step,
    steps, loss: means over the newest steps that all runs have); metrics (name → unit, worse,
    worst, last, better: the positions of the better runs); differences (setting → values).
    """
    import time

    from geodiag.dashboard.reports.comparison import compare as compare_runs
    from geodiag.dashboard.reports.comparison_page import page
    from geodiag.run import open_run

    comparison = compare_runs([open_run(r) for r in runs])
    path = None
    if out is not None or open_browser or not json:
        path = write_page(
            page(comparison, time.time()), out, _file_name(comparison), then_open=open_browser
        )
    if json:
        print_json(comparison.as_json())
    elif path is not None:
        _print(comparison, path)


def _file_name(comparison: "Comparison") -> str:
    """Return e.g. `compare-a-b` or `compare-a-b-and-3-more`."""
    names = [s.label for s in comparison.runs]
    rest = [f"and-{len(names) - 2}-more"] if len(names) > 2 else []
    return "-".join(["compare", *names[:2], *rest])


def _print(comparison: "Comparison", path: Path) -> None:
    from rich.markup import escape
    from rich.table import Table

    shared = comparison.shared()
    differences = comparison.differences()
    headings = ("run", "status", "last step", "loss, shared", "spikes", "composite gain")
    table = Table(*headings, box=None, pad_edge=False)
    for column in table.columns[2:]:
        column.justify = "right"
    for run, loss in zip(comparison.runs, shared["loss"], strict=True):
        h = run.health
        worst = h.composite.worst
        status = f"[{STATUS_STYLE[h.status]}]{h.status}[/]"
        step = "–" if h.last_step is None else f"{h.last_step:,}"
        gain = number(worst.value, "×") if worst else "–"
        table.add_row(escape(run.label), status, step, number(loss), str(len(run.spikes)), gain)
    screen().print(table)
    if shared["last_step"] is None:
        screen().print("the runs have no step in common, so there is no shared loss", style="dim")
    else:
        n = shared["steps"]
        last = shared["last_step"]
        line = f"loss, shared: mean of the {n} newest steps that all runs have, up to step {last:,}"
        screen().print(line, style="dim")
    settings = ", ".join(list(differences)[:6]) + (", …" if len(differences) > 6 else "")
    screen().print(
        f"{len(differences)} settings differ" + (f": {escape(settings)}" if settings else "")
    )
    for run in comparison.runs:
        for piece, why in run.cache.problems().items():
            screen().print(f"{run.label}: not read: {piece}: {why}", style="yellow", markup=False)
    screen().print(f"wrote {escape(str(path))} ({size_of(path)})")
