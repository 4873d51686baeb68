"""Reading a run's tables: closed parts plus the journal, newest attempt, all ranks, bad pieces
skipped and named.
"""

import operator
import time
from bisect import bisect_left
from collections.abc import Sequence
from functools import reduce
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from geodiag.errors import GeodiagError
from geodiag.metrics.schema import SCHEMAS
from geodiag.store.files import Folder, first_line
from geodiag.store.journal import read_journal
from geodiag.store.manifest import all_starts
from geodiag.store.parquet_parts import UNREADABLE, Part, list_parts

Steps = tuple[int | None, int | None]
_TRIES = 20


def read_table(
    store: Folder,
    table: str,
    columns: Sequence[str] | None,
    steps: Steps | None,
    starts: dict[int, int],
    attempt: int | str,
    problems: dict[str, str],
    as_of: int | None = None,
) -> pa.Table:
    """Return rows of `table`, sorted by rank, attempt and step.

    `starts` are the first steps of the attempts in the manifest. With `as_of`, `newest` is the
    newest attempt up to that one. `Run.read_arrow` describes the other arguments.
    """
    schema = _select(table, columns)
    attempt = attempt if attempt in ("newest", "all") else _number(attempt)
    needed = list(dict.fromkeys([*schema.names, "rank", "attempt", "step"]))
    full = pa.schema([SCHEMAS[table].field(n) for n in needed])
    pieces = []
    for rank in sorted({*_part_ranks(store, table), *_journal_ranks(store, table)}):
        pieces += _read_rank(store, table, rank, full, steps, problems)
    if attempt == "newest" and pieces:
        starts = all_starts(
            pa.concat_tables([p.select(["attempt", "step"]) for p in pieces]), starts
        )
    # Piece by piece: most are wanted whole or as a slice, and filtering copies.
    pieces = [_cut(p, steps) for p in pieces]
    pieces = [
        p if (keep := _wanted(p, starts, attempt, as_of)) is None else p.filter(keep)
        for p in pieces
    ]
    rows = pa.concat_tables(pieces).unify_dictionaries() if pieces else full.empty_table()
    return _in_order(rows).select(schema.names)


def _in_order(rows: pa.Table) -> pa.Table:
    """Sorted by rank, attempt and step; one writer's parts lie in that order already, and are left
    as they are.
    """
    if _one_value(rows["rank"]) and _one_value(rows["attempt"]):
        place = rows["step"].to_numpy()
    else:
        rank, attempt, step = (
            rows[n].to_numpy().astype(np.int64) for n in ("rank", "attempt", "step")
        )
        place = (rank << 48) + (attempt << 32) + step
    if (place[1:] >= place[:-1]).all():
        return rows
    return rows.take(pa.array(np.argsort(place, kind="stable")))


def _one_value(column: pa.ChunkedArray) -> bool:
    ends = pc.min_max(column).as_py()
    return ends["min"] == ends["max"]


def read_keys(store: Folder, table: str) -> pa.Table:
    """Attempt and step of every row that can be read, all attempts."""
    return read_table(store, table, ["attempt", "step"], None, {}, "all", {})


def _part_ranks(store: Folder, table: str) -> list[str]:
    return [n for n in store.names(table) if n.startswith("rank-")]


def _journal_ranks(store: Folder, table: str) -> list[str]:
    tail = f"-{table}.arrows"
    return [n[: -len(tail)] for n in store.names("journal") if n.endswith(tail)]


def _select(table: str, columns: Sequence[str] | None) -> pa.Schema:
    if table not in SCHEMAS:
        raise GeodiagError(f"there is no table {table!r}; pass one of {', '.join(SCHEMAS)}")
    schema = SCHEMAS[table]
    if columns is None:
        return schema
    unknown = [c for c in columns if c not in schema.names]
    if unknown:
        raise GeodiagError(
            f"table {table} has no column {', '.join(unknown)}; it has {', '.join(schema.names)}"
        )
    return pa.schema([schema.field(c) for c in columns])


def _read_rank(
    store: Folder,
    table: str,
    rank: str,
    schema: pa.Schema,
    steps: Steps | None,
    problems: dict[str, str],
) -> list[pa.Table]:
    """One rank's rows as they stood at one moment: looked at again where the writer moved files
    meanwhile.
    """
    folder = f"{table}/{rank}"
    pieces: list[pa.Table] | None = None
    for trial in range(_TRIES):
        found: dict[str, str] = {}
        try:
            before = store.names(folder)
            # The journal before the parts: a part closed from here on names the journal it
            # swallowed.
            now = _read_once(store, table, rank, schema, steps, found)
        except FileNotFoundError:
            now = None  # merged away between the listing and the reading
        if now is not None:
            pieces, seen = now, found
            if store.names(folder) == before:
                break  # a listing taken while files come and go may show neither the old ones nor the new
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
    journal = f"journal/{rank}-{table}.arrows"
    raw = store.read(journal)
    parts = list_parts(store, f"{table}/{rank}", problems)
    pieces = [
        t
        for p in parts
        if _overlaps(p, steps) and (t := _read_part(store, p, schema, steps, problems))
    ]
    if raw is None:
        return pieces
    name, batches = read_journal(raw)
    if not name:
        problems[journal] = "unreadable (no Arrow stream)"
    elif batches and not any(name in p.journals for p in parts):
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
            have = set(file.schema_arrow.names)
            read = file.read_row_groups(
                _groups(file.metadata, steps), [n for n in schema.names if n in have]
            )
    except FileNotFoundError:
        raise
    except UNREADABLE as e:
        problems[name] = f"unreadable ({first_line(e)})"
        return None
    fitted = fit(read, schema)
    if isinstance(fitted, str):
        problems[name] = fitted
        return None
    return fitted


def _groups(footer: pq.FileMetaData, steps: Steps | None) -> list[int]:
    """The row groups of a part that may hold these steps, as far as the footer tells."""
    low, high = steps or (None, None)
    column = footer.schema.names.index("step") if "step" in footer.schema.names else None
    wanted = []
    for i in range(footer.num_row_groups):
        seen = None if column is None else footer.row_group(i).column(column).statistics
        ends = (seen.min, seen.max) if seen is not None and seen.has_min_max else None
        if ends is None or ((low is None or ends[1] >= low) and (high is None or ends[0] < high)):
            wanted.append(i)
    return wanted


def fit(rows: pa.Table, schema: pa.Schema) -> pa.Table | str:
    """`rows` in the form of `schema`, absent columns as nulls; or one line that says why that
    cannot be.
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
            same_kind = pa.types.is_floating(column.type) == pa.types.is_floating(field.type) and (
                pa.types.is_integer(column.type) == pa.types.is_integer(field.type)
            )
            try:
                if not same_kind and column.null_count < len(column):
                    raise pa.ArrowInvalid("other kind")
                column = column.cast(field.type)
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
                return f"column {field.name} is {column.type}, not {field.type}"
        columns.append(column)
    return pa.table(columns, schema=schema)


def _cut(rows: pa.Table, steps: Steps | None) -> pa.Table:
    """A piece's rows of these steps: a slice where they lie in order, as one attempt's do."""
    low, high = steps or (None, None)
    if low is None and high is None:
        return rows
    step = rows["step"].to_numpy()
    if (step[1:] >= step[:-1]).all():
        first = (
            0 if low is None else bisect_left(step, low)
        )  # numpy's own search copies the column to compare it
        end = len(step) if high is None else bisect_left(step, high)
        return rows.slice(first, max(0, end - first))
    inside = np.ones(len(step), bool) if low is None else step >= low
    return rows.filter(pa.array(inside if high is None else inside & (step < high)))


def _wanted(
    rows: pa.Table, starts: dict[int, int], attempt: int | str, as_of: int | None
) -> pa.ChunkedArray | None:
    """Return which of a piece's rows belong to the requested attempt; None for all of them."""
    if not len(rows) or attempt == "all":
        return None
    if attempt != "newest":
        return pc.equal(rows["attempt"], attempt)

    oldest, newest = pc.min_max(rows["attempt"]).as_py().values()
    last_step = pc.max(rows["step"]).as_py()
    tests = []
    if as_of is not None and newest > as_of:
        tests.append(pc.less_equal(rows["attempt"], as_of))
    for later, start in starts.items():
        # Rows of an attempt end where a later attempt began.
        ended = later > oldest and last_step >= start
        if ended and (as_of is None or later <= as_of):
            of_later = pc.greater_equal(rows["attempt"], later)
            tests.append(pc.or_(of_later, pc.less(rows["step"], start)))
    return reduce(pc.and_, tests) if tests else None


def _number(attempt: Any) -> int:
    try:
        return operator.index(attempt)
    except TypeError:
        raise GeodiagError(
            f"there is no attempt {attempt!r}; pass a number, 'newest' or 'all'"
        ) from None
