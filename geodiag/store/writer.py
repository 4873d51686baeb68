"""Writing the tables of a run: rows to journals, journals to Parquet parts. One writer per rank."""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from geodiag.metrics.schema import CATEGORIES, SCHEMAS
from geodiag.store.files import Folder
from geodiag.store.journal import Journal, read_journal
from geodiag.store.lock import Lock
from geodiag.store.parquet_parts import list_parts, merge_parts, sweep, write_part
from geodiag.store.rank_pieces import fit

ROLL_BYTES = 8 << 20
ROLL_BATCHES = 400
"""A journal becomes a part at this size, or this number of batches."""


class TableWriter:
    """Appends rows of one rank to the tables of a run."""

    def __init__(self, folder: Path, rank: int, attempt: int) -> None:
        self.folder = folder
        self.rank = rank
        self.attempt = attempt
        self.first_step: int | None = None
        """First step of this attempt; an earlier attempt's, or None, before its first row."""
        self.last_step: int | None = None
        self._attempt_of_first_step = -1
        self._journals: dict[str, Journal] = {}
        self._lock = Lock(folder / "journal" / f"rank-{rank}.lock")
        self._fold_leftovers()

    def append(self, table: str, columns: Mapping[str, Any]) -> None:
        """Append rows of `table`, which are safe from kill -9 when this returns.

        OSError where the disk refuses them; they stay in memory and are written with the next rows
        that fit.
        """
        batch = to_batch(table, columns, self.rank, self.attempt)
        if not batch.num_rows:
            return
        if table == "steps":
            self._note_steps(batch["step"])
        if table not in self._journals:
            self._journals[table] = Journal(self._journal_path(table), SCHEMAS[table])
        journal = self._journals[table]
        journal.append(batch)
        if len(journal.batches) >= ROLL_BATCHES or journal.bytes >= ROLL_BYTES:
            self._roll(table, journal)

    def _note_steps(self, steps: pa.Array) -> None:
        if self._attempt_of_first_step != self.attempt:
            self._attempt_of_first_step = self.attempt
            self.first_step = steps[0].as_py()
        self.last_step = steps[-1].as_py()

    def close(self) -> None:
        """Turn every journal into a part and release the lock.

        OSError where the disk refuses a part; the other journals become parts all the same.
        """
        refused: OSError | None = None
        for table, journal in self._journals.items():
            try:
                if journal.batches:
                    self._roll(table, journal)
            except OSError as e:
                refused = e
        if refused:
            raise refused
        self._journals.clear()
        self._lock.release()

    def _journal_path(self, table: str) -> Path:
        return self.folder / "journal" / f"rank-{self.rank}-{table}.arrows"

    def _table_folder(self, table: str) -> Path:
        return self.folder / table / f"rank-{self.rank}"

    def _roll(self, table: str, journal: Journal) -> None:
        """Turn a journal into a part, and merge small parts."""
        folder = self._table_folder(table)
        write_part(folder, pa.Table.from_batches(journal.batches), [journal.id])
        journal.restart()
        # On a full disk the rows are safe in small parts, and the next roll merges again.
        with contextlib.suppress(OSError):
            merge_parts(folder)

    def _fold_leftovers(self) -> None:
        """Turn the journals that a killed process left into parts, before new rows are written."""
        for table in SCHEMAS:
            sweep(self._table_folder(table))
            path = self._journal_path(table)
            path.with_suffix(".tmp").unlink(missing_ok=True)
            if path.exists():
                self._fold(table, path)

    def _fold(self, table: str, path: Path) -> None:
        journal_id, batches = read_journal(path.read_bytes())
        rows = fit(pa.Table.from_batches(batches), SCHEMAS[table]) if batches else None
        if not journal_id or isinstance(rows, str):
            path.rename(path.with_suffix(".unreadable"))  # kept, so that nothing is lost
            return
        known = list_parts(Folder.of(self._table_folder(table)), "", {})
        if rows is not None and not any(journal_id in p.journals for p in known):
            write_part(self._table_folder(table), rows, [journal_id])
        path.unlink()


def to_batch(table: str, columns: Mapping[str, Any], rank: int, attempt: int) -> pa.RecordBatch:
    """Return columns as one record batch of the table's schema.

    Values are sequences of one length, scalars (repeated), or numpy masked arrays (masked is null).
    A column that is not given is null. ValueError for a column that the table does not have.
    """
    schema = SCHEMAS[table]
    unknown = set(columns) - set(schema.names)
    if unknown:
        raise ValueError(f"table {table} has no column {', '.join(sorted(unknown))}")
    if columns.get("step") is None:
        raise ValueError(f"rows of table {table} need a step")
    rows = max((len(v) for v in columns.values() if not _is_scalar(v)), default=1)
    given = {"rank": rank, "attempt": attempt, **columns}
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite
        return pa.record_batch(
            [_array(field, given.get(field.name), rows) for field in schema], schema=schema
        )


def _is_scalar(value: Any) -> bool:
    return (
        value is None
        or isinstance(value, str | int | float | np.generic)
        or getattr(value, "ndim", 1) == 0
    )


def _array(field: pa.Field, value: Any, rows: int) -> pa.Array:
    if value is None:
        return pa.nulls(rows, field.type)
    if _is_scalar(value):
        value = [value.item() if hasattr(value, "item") else value] * rows
    if pa.types.is_dictionary(field.type):
        return _coded(field, value)
    mask = np.ma.getmaskarray(value) if isinstance(value, np.ma.MaskedArray) else None
    if not isinstance(value, np.ndarray):
        return pa.array(value, field.type)
    data = np.ma.getdata(value).astype(field.type.to_pandas_dtype(), copy=False)
    return pa.array(data, field.type, mask=mask)


def _coded(field: pa.Field, values: Any) -> pa.Array:
    """Return texts as codes into the column's fixed dictionary."""
    codes = {name: code for code, name in enumerate(CATEGORIES[field.name])}
    unknown = {v for v in values if v is not None and v not in codes}
    if unknown:
        raise ValueError(
            f"{field.name} is one of {', '.join(codes)}, not {', '.join(map(str, unknown))}"
        )
    numbers = pa.array([None if v is None else codes[v] for v in values], pa.int8())
    return pa.DictionaryArray.from_arrays(numbers, pa.array(list(codes)))
