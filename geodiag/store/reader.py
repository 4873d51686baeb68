"""Reading a table of a run: all ranks, the requested attempt, the requested steps."""

import operator
from bisect import bisect_left
from collections.abc import Sequence
from functools import reduce
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from geodiag.errors import GeodiagError
from geodiag.metrics.schema import SCHEMAS
from geodiag.store.files import Folder
from geodiag.store.manifest import all_starts
from geodiag.store.rank_pieces import Steps, rank_folders, read_rank

__all__ = ["Steps", "read_keys", "read_table"]


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
    for rank in rank_folders(store, table):
        pieces += read_rank(store, table, rank, full, steps, problems)
    if attempt == "newest" and pieces:
        keys = pa.concat_tables([p.select(["attempt", "step"]) for p in pieces])
        starts = all_starts(keys, starts)

    # Filter each piece by itself: most pieces are kept whole or as a slice, which copies nothing.
    pieces = [_filter(_slice(p, steps), starts, attempt, as_of) for p in pieces]
    rows = pa.concat_tables(pieces).unify_dictionaries() if pieces else full.empty_table()
    return _sorted(rows).select(schema.names)


def read_keys(store: Folder, table: str) -> pa.Table:
    """Return attempt and step of every row that can be read, of all attempts."""
    return read_table(store, table, ["attempt", "step"], None, {}, "all", {})


def _select(table: str, columns: Sequence[str] | None) -> pa.Schema:
    """Return the schema of the requested columns."""
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


def _number(attempt: Any) -> int:
    try:
        return operator.index(attempt)
    except TypeError:
        raise GeodiagError(
            f"there is no attempt {attempt!r}; pass a number, 'newest' or 'all'"
        ) from None


def _slice(rows: pa.Table, steps: Steps | None) -> pa.Table:
    """Return the rows of these steps; a slice where the rows are sorted, as within one attempt."""
    low, high = steps or (None, None)
    if low is None and high is None:
        return rows
    step = rows["step"].to_numpy()
    if (step[1:] >= step[:-1]).all():
        # np.searchsorted would copy the column in order to compare it with a Python int.
        first = 0 if low is None else bisect_left(step, low)
        end = len(step) if high is None else bisect_left(step, high)
        return rows.slice(first, max(0, end - first))
    inside = np.ones(len(step), bool)
    if low is not None:
        inside &= step >= low
    if high is not None:
        inside &= step < high
    return rows.filter(pa.array(inside))


def _filter(
    rows: pa.Table, starts: dict[int, int], attempt: int | str, as_of: int | None
) -> pa.Table:
    """Return the rows that belong to the requested attempt."""
    if not len(rows) or attempt == "all":
        return rows
    if attempt != "newest":
        return rows.filter(pc.equal(rows["attempt"], attempt))

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
    return rows.filter(reduce(pc.and_, tests)) if tests else rows


def _sorted(rows: pa.Table) -> pa.Table:
    """Sort by rank, attempt and step; rows that are sorted, as of one writer, are not copied."""
    step = rows["step"].to_numpy()
    if _has_one_value(rows["rank"]) and _has_one_value(rows["attempt"]):
        key = step
    else:
        rank = rows["rank"].to_numpy().astype(np.int64)
        attempt = rows["attempt"].to_numpy().astype(np.int64)
        key = (rank << 48) + (attempt << 32) + step
    if (key[1:] >= key[:-1]).all():
        return rows
    return rows.take(pa.array(np.argsort(key, kind="stable")))


def _has_one_value(column: pa.ChunkedArray) -> bool:
    ends = pc.min_max(column).as_py()
    return bool(ends["min"] == ends["max"])
