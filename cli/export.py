"""`geodiag export`: a run for the tools people already have."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from geodiag.cli.output import print_json, prose, screen
from geodiag.cli.progress import bar

if TYPE_CHECKING:
    from geodiag.export.run_export import Exported

_RUN = "A run directory; a path or a URL. It may be training."
_OUT = "Folder to make.  (default: exports/FORMAT/RUN)"
_TABLES = "Tables, with commas or repeated.  (default: all of them; as curves, all but experts, tokens and matrices)"
_METRICS = (
    "Metrics by name or pattern, with commas or repeated, e.g. loss,'amax_gain*'.  (default: all)"
)
_STEPS = "A:B for the steps A ≤ step < B; either end may be left out.  (default: all)"
_ATTEMPT = "newest, a number, or all: rolled-back and resumed steps too, each attempt as a TensorBoard run of its own."
_RANKS = "merged puts the ranks together as the registry says; each keeps them apart."
_PLACES = (
    "Curves of layers, experts and tokens: summary is the worst and the mean over them, all is one each.  "
    "(default: summary, or all where --metrics names them)"
)
_FORCE = "Replace an older export in that folder."
_PARTIAL = "Export the rest where a piece of the run cannot be read."


def export(
    run: Annotated[str, typer.Argument(metavar="RUN", help=_RUN)],
    to: Annotated[
        Literal["tensorboard", "csv"], typer.Option(help="Event files, or a CSV a table.")
    ],
    out: Annotated[Path | None, typer.Option(metavar="DIR", help=_OUT, show_default=False)] = None,
    tables: Annotated[list[str] | None, typer.Option(metavar="NAMES", help=_TABLES)] = None,
    metrics: Annotated[list[str] | None, typer.Option(metavar="NAMES", help=_METRICS)] = None,
    steps: Annotated[str | None, typer.Option(metavar="A:B", help=_STEPS)] = None,
    attempt: Annotated[str, typer.Option(help=_ATTEMPT)] = "newest",
    ranks: Annotated[Literal["merged", "each"], typer.Option(help=_RANKS)] = "merged",
    places: Annotated[Literal["summary", "all"] | None, typer.Option(help=_PLACES)] = None,
    force: Annotated[bool, typer.Option("--force", help=_FORCE)] = False,
    partial: Annotated[bool, typer.Option("--partial", help=_PARTIAL)] = False,
    json: Annotated[bool, typer.Option("--json", help="Print what was written as JSON.")] = False,
) -> None:
    """Write a run as TensorBoard event files or as CSV, for the tools people already have."""
    from geodiag.export.output_folder import default_out
    from geodiag.export.run_export import export as write
    from geodiag.run import open_run

    opened = open_run(run)
    asked = {
        "tables": tables,
        "metrics": metrics,
        "steps": steps,
        "attempt": attempt,
        "ranks": ranks,
        "places": places,
    }
    where = out or default_out(opened, to)
    with bar(f"reading {opened.name}") as advance:
        done = write(opened, to, where, force=force, partial=partial, advance=advance, **asked)
    if json:
        print_json(done.as_json())
    else:
        _print(done)


def _print(done: "Exported") -> None:
    size = sum(f["bytes"] for f in done.files)
    rows = sum(done.rows.values())
    count = "1 file" if len(done.files) == 1 else f"{len(done.files)} files"
    said = f"{count}, {_bytes(size)}, from {rows:,} rows in {done.seconds:.1f} s"
    screen().print(f"{done.out}  {said}", style="bold", markup=False)
    if done.tags is None:
        for f in (f for f in done.files if "rows" in f):
            screen().print(f"  {f['file']}  {f['rows']:,} rows")
        screen().print(prose("columns.csv says what each column is, and its unit", indent=2))
    else:
        for line in _curves(done):
            screen().print(prose(line, indent=2))
    for piece, why in done.problems.items():
        screen().print(f"not read: {piece}: {why}", style="yellow", markup=False)


def _curves(done: "Exported") -> list[str]:
    lines = [f"{done.tags:,} tags, {done.values:,} values"]
    many = [t for t in ("layers", "experts", "tokens") if t in done.rows]
    if done.choice.places == "summary" and many:
        lines.append(
            f"of {', '.join(many)} the worst and the mean over all of them; a curve for each: --places all"
        )
    if done.choice.left_out:
        left = ", ".join(done.choice.left_out)
        lines.append(f"left out: {left}; to have some of them, name all that are wanted: --tables")
    return [*lines, f"tensorboard --logdir {done.out}"]


def _bytes(n: int) -> str:
    return (
        f"{n / 1e9:.1f} GB"
        if n >= 1e9
        else f"{n / 1e6:.1f} MB"
        if n >= 1e6
        else f"{n / 1e3:.1f} kB"
    )
