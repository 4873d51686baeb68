"""A run for the tools people already have: tables as CSV, or curves and texts as TensorBoard's
event files.

Choice (tables, columns, attempts) → Pieces (a stretch of steps at a time) → CsvFiles or EventFiles
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
from geodiag.export.output_folder import MARK, refuse_early, told, whole_folder
from geodiag.export.rows import Pieces
from geodiag.export.selection import Choice, choose
from geodiag.export.tensorboard_files import EventFiles
from geodiag.run import Run

Format = Literal["tensorboard", "csv"]
Advance = Callable[[int, int, str], None]
"""Called after every piece: pieces done, pieces in all, the table it was of."""


class Files(Protocol):
    """A format: it is given the rows of the tables, piece by piece."""

    rows_by_file: dict[str, int]

    @property
    def tags(self) -> int | None:
        """Curves and texts, where the format has them."""

    @property
    def values(self) -> int:
        """What was taken so far: points of curves and events, or rows."""

    def write(self, table: str, rows: pa.Table) -> None:
        """Appends rows, which lie in the order of their steps."""

    def finish(self) -> None:
        """Writes what comes last, and closes."""

    def abandon(self) -> None:
        """Closes, and no more."""


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was written, and what was not."""

    run: str
    to: str
    out: str
    choice: Choice
    files: list[dict[str, Any]]
    """Name and bytes; of a CSV its rows."""
    rows: dict[str, int]
    """Table → rows that were read of it."""
    tags: int | None
    values: int
    seconds: float
    problems: dict[str, str]

    def as_json(self) -> dict[str, Any]:
        said: dict[str, Any] = {
            "run": self.run,
            "to": self.to,
            "out": self.out,
            "files": self.files,
        }
        said |= {
            "rows": self.rows,
            "tags": self.tags,
            "values": self.values,
            "seconds": round(self.seconds, 3),
        }
        return said | {"left_out": self.choice.left_out, "problems": self.problems}


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
    """Writes `run` to the folder `out`, whole or not at all; `asked` is what `choose` takes.

    GeodiagError where there is nothing to write, where `out` cannot be written or is in use, and,
    unless `partial`, where a piece of the run cannot be read. A run that is still training is
    exported up to the step it is at.
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
                with told(out):
                    files.write(table, piece)
                rows[table] += len(piece)
                if advance:
                    advance(done, len(pieces), table)
            if not files.values:
                raise GeodiagError(
                    f"{run.url} recorded nothing of what is asked for; {pieces.held()}"
                )
            with told(out):
                files.finish()
        except BaseException:  # Ctrl-C too: files are closed before their folder goes
            with suppress(OSError):  # what happened first is what is told
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
        with told(out):
            (folder / MARK).write_text(
                json.dumps(done_now.as_json(), indent=1) + "\n", encoding="utf-8"
            )
    return done_now


def _listed(folder: Path, rows: dict[str, int]) -> list[dict[str, Any]]:
    """Every file of the export, with its size and, where it has any, its rows."""
    found = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        said = {"file": name, "bytes": path.stat().st_size}
        found.append(said | ({"rows": rows[name]} if name in rows else {}))
    return found
