"""Export of a run: tables as CSV files, or curves and texts as TensorBoard event files.

Choice (tables, columns, attempts) → Pieces (a range of steps at a time) → CsvFiles or EventFiles
→ whole_folder
"""

import json
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import pyarrow as pa

from geodiag.errors import GeodiagError
from geodiag.export.csv_files import CsvFiles
from geodiag.export.output_folder import MARK, disk_errors, refuse_early, whole_folder
from geodiag.export.rows import Pieces
from geodiag.export.selection import Choice, choose
from geodiag.export.tensorboard_files import EventFiles
from geodiag.run import Run

Format = Literal["tensorboard", "csv"]
Advance = Callable[[int, int, str], None]
"""Callback after every piece: pieces done, pieces in all, name of the table."""


class Files(Protocol):
    """A file format: takes the rows of the tables piece by piece."""

    rows_by_file: dict[str, int]

    @property
    def tags(self) -> int | None:
        """Number of curves and texts, None for a format without them."""

    @property
    def values(self) -> int:
        """Number of values written so far: points of curves and events, or rows."""

    def write(self, table: str, rows: pa.Table) -> None:
        """Append rows, which are sorted by step."""

    def finish(self) -> None:
        """Write what comes after the last row, and close the files."""

    def abandon(self) -> None:
        """Close the files without completing them."""


@dataclass(frozen=True, kw_only=True)
class Exported:
    """Description of a finished export; also written to `export.json`."""

    run: str
    to: str
    out: str
    choice: Choice
    files: list[dict[str, Any]]
    """Name and bytes; of a CSV its rows."""
    rows: dict[str, int]
    """Table → number of rows that were read."""
    tags: int | None
    values: int
    seconds: float
    problems: dict[str, str]

    def as_json(self) -> dict[str, Any]:
        data: dict[str, Any] = {
            "run": self.run,
            "to": self.to,
            "out": self.out,
            "files": self.files,
        }
        data |= {
            "rows": self.rows,
            "tags": self.tags,
            "values": self.values,
            "seconds": round(self.seconds, 3),
        }
        return data | {"left_out": self.choice.left_out, "problems": self.problems}


def export(
    run: Run,
    to: Format,
    out: Path,
    *,
    force: bool = False,
    partial: bool = False,
    advance: Advance | None = None,
    **asked: Any,
) -> Exported:
    """Write `run` to the folder `out`, whole or not at all; `asked` are the arguments of `choose`.

    GeodiagError where there is nothing to write, where `out` cannot be written or is in use, and,
    unless `partial`, where a piece of the run cannot be read. A run that is still training is
    exported up to its current step.
    """
    began = time.monotonic()
    choice = choose(to, **asked)
    refuse_early(out, run, force)
    pieces = Pieces(run, choice, partial)
    rows = dict.fromkeys(choice.tables, 0)
    with whole_folder(out, force) as folder:
        files: Files = (
            CsvFiles(folder, choice)
            if to == "csv"
            else EventFiles(folder, choice, run, pieces.times)
        )
        try:
            for done, (table, piece) in enumerate(pieces, 1):
                with disk_errors(out):
                    files.write(table, piece)
                rows[table] += len(piece)
                if advance:
                    advance(done, len(pieces), table)
            if not files.values:
                raise GeodiagError(
                    f"{run.url} recorded nothing of what is asked for; {pieces.available()}"
                )
            with disk_errors(out):
                files.finish()
        except BaseException:  # Ctrl-C too: files are closed before their folder goes
            with suppress(OSError):  # the first error is the one to report
                files.abandon()
            raise
        done_now = Exported(
            run=run.url,
            to=to,
            out=str(out),
            choice=choice,
            files=_listed(folder, files.rows_by_file),
            rows={t: n for t, n in rows.items() if n},
            tags=files.tags,
            values=files.values,
            seconds=time.monotonic() - began,
            problems=dict(run.problems),
        )
        with disk_errors(out):
            (folder / MARK).write_text(
                json.dumps(done_now.as_json(), indent=1) + "\n", encoding="utf-8"
            )
    return done_now


def _listed(folder: Path, rows: dict[str, int]) -> list[dict[str, Any]]:
    """Return name, size and, for a CSV, number of rows of every file of the export."""
    found = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        entry: dict[str, Any] = {"file": name, "bytes": path.stat().st_size}
        found.append(entry | ({"rows": rows[name]} if name in rows else {}))
    return found
