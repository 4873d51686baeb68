"""One rank's rows of a table: closed Parquet parts plus the journal, read without a lock.

The training writes, closes and merges pieces while they are read, so a listing that changed during
the reading is read again. Unreadable pieces are skipped and entered in `problems`.
"""

import time
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from geodiag.store.files import Folder, first_line
from geodiag.store.journal import read_journal
from geodiag.store.parquet_parts import UNREADABLE, Part, list_parts

Steps = tuple[int | None, int | None]
"""(a, b) for a ≤ step < b; None leaves an end open."""

_TRIES = 20


def rank_folders(store: Folder, table: str) -> list[str]:
    """Return `rank-0`, …: the ranks that have parts or a journal of the table."""
    with_parts = [n for n in store.names(table) if n.startswith("rank-")]
    ending = f"-{table}.arrows"
    with_journal = [n.removesuffix(ending) for n in store.names("journal") if n.endswith(ending)]
    return sorted({*with_parts, *with_journal})


def read_rank(
    store: Folder,
    table: str,
    rank: str,
    schema: pa.Schema,
    steps: Steps | None,
    problems: dict[str, str],
) -> list[pa.Table]:
    """Return pieces with one rank's rows, at least those of `steps`, as of one moment.

    Each piece has the columns of `schema`.
    """
    folder = f"{table}/{rank}"
    pieces: list[pa.Table] | None = None
    seen: dict[str, str] = {}
    for trial in range(_TRIES):
        found: dict[str, str] = {}
        try:
            before = store.names(folder)
            now = _read_once(store, table, rank, schema, steps, found)
        except FileNotFoundError:
            now = None  # a part was merged away between the listing and the reading
        if now is not None:
            pieces, seen = now, found
            # A listing during a merge may have neither the old parts nor the new one.
            if store.names(folder) == before:
                break
        time.sleep(0.001 * trial)
    if pieces is None:
        problems[folder] = "kept changing while it was read; read again"
        return []
    problems |= seen
    return pieces


def _read_once(
    store: Folder,
    table: str,
    rank: str,
    schema: pa.Schema,
    steps: Steps | None,
    problems: dict[str, str],
) -> list[pa.Table]:
    # The journal before the parts: a part that is closed from here on names the journal in it.
    journal = f"journal/{rank}-{table}.arrows"
    content = store.read(journal)
    parts = list_parts(store, f"{table}/{rank}", problems)
    pieces = []
    for part in parts:
        if _overlaps(part, steps):
            rows = _read_part(store, part, schema, steps, problems)
            if rows is not None and len(rows):
                pieces.append(rows)
    if content is None:
        return pieces

    journal_id, batches = read_journal(content)
    if not journal_id:
        problems[journal] = "unreadable (no Arrow stream)"
    elif batches and not any(journal_id in p.journals for p in parts):
        fitted = fit(pa.Table.from_batches(batches), schema)
        if isinstance(fitted, str):
            problems[journal] = fitted
        else:
            pieces.append(fitted)
    return pieces


def _overlaps(part: Part, steps: Steps | None) -> bool:
    low, high = steps or (None, None)
    return (low is None or part.last >= low) and (high is None or part.first < high)


def _read_part(
    store: Folder, part: Part, schema: pa.Schema, steps: Steps | None, problems: dict[str, str]
) -> pa.Table | None:
    name = part.path.removeprefix(store.root + "/")
    try:
        with store.fs.open(part.path, "rb") as f:
            file = pq.ParquetFile(f)
            present = set(file.schema_arrow.names)
            columns = [n for n in schema.names if n in present]
            rows = file.read_row_groups(_row_groups(file.metadata, steps), columns)
    except FileNotFoundError:
        raise
    except UNREADABLE as e:
        problems[name] = f"unreadable ({first_line(e)})"
        return None
    fitted = fit(rows, schema)
    if isinstance(fitted, str):
        problems[name] = fitted
        return None
    return fitted


def _row_groups(footer: pq.FileMetaData, steps: Steps | None) -> list[int]:
    """Return the row groups of a part that may contain these steps, by the footer's statistics."""
    low, high = steps or (None, None)
    column = footer.schema.names.index("step") if "step" in footer.schema.names else None
    wanted = []
    for i in range(footer.num_row_groups):
        statistics = None if column is None else footer.row_group(i).column(column).statistics
        if statistics is None or not statistics.has_min_max:
            wanted.append(i)
            continue
        if (low is None or statistics.max >= low) and (high is None or statistics.min < high):
            wanted.append(i)
    return wanted


def fit(rows: pa.Table, schema: pa.Schema) -> pa.Table | str:
    """Return `rows` with the columns of `schema`, absent ones as nulls.

    A string with the reason where that is not possible.
    """
    columns: list[Any] = []
    for field in schema:
        if field.name not in rows.column_names:
            if not field.nullable:
                return f"has no column {field.name}"
            columns.append(pa.nulls(rows.num_rows, field.type))
            continue
        column = rows[field.name]
        if column.type != field.type:
            # A column of nulls may have any type, because it has no value to misread.
            if not _same_kind(column.type, field.type) and column.null_count < len(column):
                return f"column {field.name} is {column.type}, not {field.type}"
            try:
                column = column.cast(field.type)
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
                return f"column {field.name} is {column.type}, not {field.type}"
        columns.append(column)
    return pa.table(columns, schema=schema)


def _same_kind(one: pa.DataType, other: pa.DataType) -> bool:
    """Return whether both are floats, both integers, or both neither."""
    if pa.types.is_floating(one) != pa.types.is_floating(other):
        return False
    return bool(pa.types.is_integer(one) == pa.types.is_integer(other))
