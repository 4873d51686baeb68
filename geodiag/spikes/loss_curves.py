"""Loss curves from a CSV or a run, and the spikes that the detector finds in them."""

import csv
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from geodiag.errors import GeodiagError
from geodiag.run import open_run
from geodiag.spikes.detector import Spike, SpikeDetector


class Update(NamedTuple):
    """One row of a loss curve: the arguments of `SpikeDetector.update`."""

    step: int
    loss: float
    grad_norm: float | None = None


def read_updates(target: str) -> list[Update]:
    """Return the updates of a run directory or a CSV, in the order of the training.

    Rows without a loss are left out. Raises GeodiagError if there is nothing to read.
    """
    updates = _read_csv(Path(target)) if Path(target).is_file() else _read_run(target)
    if not updates:
        raise GeodiagError(
            f"{target} has no recorded loss; pass a run that has trained, or a CSV with rows"
        )
    return updates


def find_spikes(updates: Iterable[Update], detector: SpikeDetector | None = None) -> list[Spike]:
    """Run the detector over the updates and return all that it raises, as known at the end."""
    detector = detector or SpikeDetector()
    found: list[Spike] = []
    for update in updates:
        verdict = detector.update(*update)
        if verdict.ended:
            _replace_or_append(found, verdict.ended)
        if verdict.raised:
            found.append(verdict.raised)
    if detector.current:
        _replace_or_append(found, detector.current)
    return found


def _replace_or_append(found: list[Spike], spike: Spike) -> None:
    """Replace the earlier state of `spike` in `found`; append it if there is none.

    There is none if it was raised before the first of these updates.
    """
    for i in reversed(range(len(found))):
        if (found[i].kind, found[i].detected) == (spike.kind, spike.detected):
            found[i] = spike
            return
    found.append(spike)


def _read_run(target: str) -> list[Update]:
    try:
        run = open_run(target)
    except GeodiagError as error:
        other = (
            ", or a CSV with the columns step,loss" if "pass a run directory" in str(error) else ""
        )
        raise GeodiagError(f"{error}{other}") from None
    # All attempts, because a spike that was rolled back is still reported.
    table = run.read_arrow("steps", ["step", "loss", "grad_norm"], attempt="all", ranks="merged")
    return [
        Update(row["step"], row["loss"], row["grad_norm"])
        for row in table.to_pylist()
        if row["loss"] is not None
    ]


def _read_csv(path: Path) -> list[Update]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.reader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not text"
        raise GeodiagError(
            f"cannot read {path}: {why}; pass a CSV with the columns step,loss"
        ) from None
    if not rows:
        raise GeodiagError(f"{path} is empty; pass a CSV with the columns step,loss")

    columns = _find_columns(path, rows[0])
    cells = (
        (line, [_cell(row, column) for column in columns])
        for line, row in enumerate(rows[1:], start=2)
    )
    return [_update(path, line, row) for line, row in cells if row[1]]


def _find_columns(path: Path, header: list[str]) -> list[int | None]:
    """Return the column of each field of `Update`; None for a missing gradient norm."""
    names = [name.strip().lower() for name in header]
    missing = [name for name in ("step", "loss") if name not in names]
    if missing:
        has = ", ".join(header) or "none"
        raise GeodiagError(
            f"{path} has no column {' and no column '.join(missing)}; rename one (it has: {has})"
        )
    return [names.index(name) if name in names else None for name in Update._fields]


def _cell(row: Sequence[str], column: int | None) -> str:
    return row[column].strip() if column is not None and column < len(row) else ""


def _update(path: Path, line: int, cells: list[str]) -> Update:
    step, loss, grad_norm = (
        _number(path, line, name, cell) for name, cell in zip(Update._fields, cells, strict=True)
    )
    if step is None or not math.isfinite(step) or step != int(step):
        raise GeodiagError(f"{path}, line {line}: step is {cells[0]!r}; write a whole number")
    assert loss is not None  # rows without a loss are left out before
    return Update(int(step), loss, grad_norm)


def _number(path: Path, line: int, name: str, cell: str) -> float | None:
    if not cell:
        return None
    try:
        return float(cell)
    except ValueError:
        raise GeodiagError(
            f"{path}, line {line}: {name} is {cell!r}; write a number, nan or inf"
        ) from None
