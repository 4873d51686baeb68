"""`geodiag export`: write a run as TensorBoard event files or CSV."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from geodiag.cli.output import print_json, prose, screen
from geodiag.cli.progress import progress_bar

if TYPE_CHECKING:
    from geodiag.export.run_export import Exported


def export(
    run: Annotated[
        str,
        typer.Argument(
            metavar="RUN", help="A run directory; a path or a URL. It may be still training."
        ),
    ],
    to: Annotated[
        Literal["tensorboard", "csv"],
        typer.Option(help="TensorBoard event files, or one CSV file per table."),
    ],
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder to create.", show_default="exports/FORMAT/RUN"),
    ] = None,
    tables: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAMES",
            help="Tables to export, separated by commas; repeatable.",
            show_default="all; for TensorBoard all but experts, tokens and matrices",
        ),
    ] = None,
    metrics: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAMES",
            help="Metrics to export, by name or pattern, e.g. loss,'amax_gain*'; repeatable.",
            show_default="all",
        ),
    ] = None,
    steps: Annotated[
        str | None,
        typer.Option(
            metavar="A:B",
            help="Steps from A up to B, which is excluded; A or B may be left out.",
            show_default="all",
        ),
    ] = None,
    attempt: Annotated[
        str,
        typer.Option(
            help="newest, a number, or all: with steps that were rolled back or resumed, "
            "each attempt as a TensorBoard run of its own."
        ),
    ] = "newest",
    ranks: Annotated[
        Literal["merged", "each"],
        typer.Option(
            help="merged reduces the ranks to one value by the metric's rule; each keeps all ranks."
        ),
    ] = "merged",
    places: Annotated[
        Literal["summary", "all"] | None,
        typer.Option(
            help="Curves of layers, experts and tokens: summary is the worst and the mean of them, "
            "all is one curve each.",
            show_default="summary; all for metrics named in --metrics",
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace an older export in the folder.")
    ] = False,
    partial: Annotated[
        bool, typer.Option("--partial", help="Skip pieces of the run that cannot be read.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the list of files as JSON.")] = False,
) -> None:
    """Write a run as TensorBoard event files or as CSV files."""
    from geodiag.export.output_folder import default_out
    from geodiag.export.run_export import export as write
    from geodiag.run import open_run

    opened = open_run(run)
    choice = {
        "tables": tables,
        "metrics": metrics,
        "steps": steps,
        "attempt": attempt,
        "ranks": ranks,
        "places": places,
    }
    where = out or default_out(opened, to)
    with progress_bar(f"reading {opened.name}") as advance:
        done = write(opened, to, where, force=force, partial=partial, advance=advance, **choice)
    if json:
        print_json(done.as_json())
    else:
        _print(done)


def _print(done: "Exported") -> None:
    size = sum(f["bytes"] for f in done.files)
    rows = sum(done.rows.values())
    count = "1 file" if len(done.files) == 1 else f"{len(done.files)} files"
    summary = f"{count}, {_bytes(size)}, from {rows:,} rows in {done.seconds:.1f} s"
    screen().print(f"{done.out}  {summary}", style="bold", markup=False)
    if done.tags is None:
        for f in (f for f in done.files if "rows" in f):
            screen().print(f"  {f['file']}  {f['rows']:,} rows")
        screen().print(prose("columns.csv describes each column and its unit", indent=2))
    else:
        for line in _curves(done):
            screen().print(prose(line, indent=2))
    for piece, why in done.problems.items():
        screen().print(f"not read: {piece}: {why}", style="yellow", markup=False)


def _curves(done: "Exported") -> list[str]:
    lines = [f"{done.tags:,} tags, {done.values:,} values"]
    many = [t for t in ("layers", "experts", "tokens") if t in done.rows]
    if done.choice.places == "summary" and many:
        tables = ", ".join(many)
        lines.append(f"{tables}: worst and mean only; for one curve each pass --places all")
    if done.choice.left_out:
        tables = ", ".join(done.choice.left_out)
        lines.append(f"left out: {tables}; to export them, name all wanted tables in --tables")
    return [*lines, f"tensorboard --logdir {done.out}"]


def _bytes(n: int) -> str:
    if n >= 1e9:
        return f"{n / 1e9:.1f} GB"
    if n >= 1e6:
        return f"{n / 1e6:.1f} MB"
    return f"{n / 1e3:.1f} kB"
