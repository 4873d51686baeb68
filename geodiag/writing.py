"""Writing a run: rows to journals, journals to parts, a heartbeat. One writer a rank."""

import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from geodiag.files import Folder, write_json
from geodiag.journal import Journal, read_journal
from geodiag.parts import list_parts, merge_parts, write_part
from geodiag.reading import fit
from geodiag.schema import CATEGORIES, SCHEMAS

ROLL_BYTES = 8 << 20
ROLL_BATCHES = 400
HEARTBEAT_SECONDS = 1.0


class Writer:
    """The write side of one rank of a run."""

    def __init__(self, folder: Path, rank: int, attempt: int) -> None:
        self.folder, self.rank, self.attempt = folder, rank, attempt
        self.last_step: int | None = None
        self._journals: dict[str, Journal] = {}
        self._beat = 0.0
        self._fold_leftovers()

    def append(self, table: str, columns: Mapping[str, Any]) -> None:
        """Rows of `table`, safe from kill -9 when this returns. OSError where the disk refuses them;
        they then stay in memory and are written with the next rows that fit."""
        batch = to_batch(table, columns, self.rank, self.attempt)
        if table not in self._journals:
            path = self.folder / "journal" / f"rank-{self.rank}-{table}.arrows"
            self._journals[table] = Journal(path, SCHEMAS[table])
        journal = self._journals[table]
        journal.append(batch)
        if len(journal.batches) >= ROLL_BATCHES or journal.bytes >= ROLL_BYTES:
            self._roll(table, journal)

    def heartbeat(self, step: int, force: bool = False) -> None:
        """Says that the training lives and where it is; at most once a second."""
        self.last_step = step
        now = time.time()
        if force or now - self._beat >= HEARTBEAT_SECONDS:
            self._beat = now
            who = {"pid": os.getpid(), "host": socket.gethostname(), "time": now, "step": step}
            write_json(self.folder / "heartbeat.json", who)

    def close(self) -> None:
        """Turns every journal into a part."""
        for table, journal in self._journals.items():
            if journal.batches:
                self._roll(table, journal)
            journal.close()
            journal.path.unlink(missing_ok=True)
        self._journals.clear()

    def _table_folder(self, table: str) -> Path:
        return self.folder / table / f"rank-{self.rank}"

    def _roll(self, table: str, journal: Journal) -> None:
        folder = self._table_folder(table)
        write_part(folder, pa.Table.from_batches(journal.batches), [journal.id])
        journal.restart()
        merge_parts(folder)

    def _fold_leftovers(self) -> None:
        """A journal that a killed process left becomes a part before anything new is written."""
        for path in sorted((self.folder / "journal").glob(f"rank-{self.rank}-*.arrows")):
            table = path.stem.removeprefix(f"rank-{self.rank}-")
            name, batches = read_journal(path.read_bytes())
            folder = self._table_folder(table)
            known = list_parts(Folder.of(self.folder), f"{table}/rank-{self.rank}", {})
            if batches and table in SCHEMAS and not any(name in p.journals for p in known):
                rows = fit(pa.Table.from_batches(batches), SCHEMAS[table])
                if isinstance(rows, str):
                    path.rename(path.with_suffix(".unreadable"))  # keep what we cannot understand
                    continue
                write_part(folder, rows, [name])
            path.unlink()


def to_batch(table: str, columns: Mapping[str, Any], rank: int, attempt: int) -> pa.RecordBatch:
    """Columns as one record batch of the table's schema.

    Values are sequences of one length, scalars (repeated), or numpy masked arrays (masked = null).
    A column that is not given is null. ValueError for a column the table does not have.
    """
    schema = SCHEMAS[table]
    unknown = set(columns) - set(schema.names)
    if unknown:
        raise ValueError(f"table {table} has no column {', '.join(sorted(unknown))}")
    rows = max((len(v) for v in columns.values() if not _is_scalar(v)), default=1)
    given = {"rank": rank, "attempt": attempt, **columns}
    return pa.record_batch([_array(field, given.get(field.name), rows) for field in schema], schema=schema)


def _is_scalar(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float | np.number)


def _array(field: pa.Field, value: Any, rows: int) -> pa.Array:
    if value is None:
        return pa.nulls(rows, field.type)
    if _is_scalar(value):
        value = [value] * rows
    if pa.types.is_dictionary(field.type):
        names = CATEGORIES[field.name]
        codes = [None if v is None else names.index(v) for v in value]
        return pa.DictionaryArray.from_arrays(pa.array(codes, pa.int8()), pa.array(names))
    if isinstance(value, np.ma.MaskedArray):
        return pa.array(value.data.astype(field.type.to_pandas_dtype()), mask=np.ma.getmaskarray(value))
    if isinstance(value, np.ndarray):
        return pa.array(value.astype(field.type.to_pandas_dtype(), copy=False))
    return pa.array(value, field.type)
