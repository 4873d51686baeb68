"""One metric as a dense array of rows × steps.

NaN means "no value". A measured value that is not finite is stored as ±inf (+inf where high is bad,
−inf where low is bad), so that a gap and a blow-up cannot be confused.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from geodiag.metrics.schema import METRICS, SITES, Metric
from geodiag.store.merge_ranks import reduce_over_ranks

# S steps, R rows (sites or experts), n table rows.

SECOND_KEY = {"layers": "site", "experts": "expert"}
"""The key column that distinguishes two rows of one layer."""
_MOST_ROWS = 1 << 12


@dataclass(frozen=True)
class Grid:
    """One metric over rows and steps. A row is (layer, site index) or (layer, expert)."""

    metric: Metric
    rows: tuple[tuple[int, int], ...]
    steps_S: np.ndarray
    values_RS: np.ndarray

    def window(self, low: int | None, high: int | None) -> "Grid":
        """Return the steps low ≤ step ≤ high; None leaves an end open."""
        a = 0 if low is None else int(np.searchsorted(self.steps_S, low))
        b = len(self.steps_S) if high is None else int(np.searchsorted(self.steps_S, high, "right"))
        return Grid(self.metric, self.rows, self.steps_S[a:b], self.values_RS[:, a:b])

    def of_layer(self, layer: int) -> "Grid":
        """Return the rows of one layer."""
        return self._rows([i for i, row in enumerate(self.rows) if row[0] == layer])

    def measured(self) -> "Grid":
        """Return the rows that have at least one value."""
        return self._rows(
            np.flatnonzero(~np.isnan(self.values_RS).all(1)).tolist() if len(self.steps_S) else []
        )

    def at(self, step: int) -> np.ndarray:
        """Return the newest value of each row at or before `step`."""
        upto_RS = self.values_RS[:, : int(np.searchsorted(self.steps_S, step, "right"))]
        out_R = np.full(len(self.rows), np.nan, np.float32)
        for i, row_S in enumerate(upto_RS):
            known = np.flatnonzero(~np.isnan(row_S))
            if len(known):
                out_R[i] = row_S[known[-1]]
        return out_R

    def worst(self) -> tuple[float, int, tuple[int, int]] | None:
        """Return (value, step, row) of the worst value, or None if nothing was measured."""
        if np.isnan(self.values_RS).all():
            return None
        pick = np.nanargmin if self.metric.worse == "low" else np.nanargmax
        r, s = np.unravel_index(int(pick(self.values_RS)), self.values_RS.shape)
        return float(self.values_RS[r, s]), int(self.steps_S[s]), self.rows[r]

    def _rows(self, keep: list[int]) -> "Grid":
        return Grid(
            self.metric, tuple(self.rows[i] for i in keep), self.steps_S, self.values_RS[keep]
        )


def row_name(row: tuple[int, int]) -> str:
    """Return the name of a site in URLs and hover texts, e.g. `3.ffn`."""
    return f"{row[0]}.{SITES[row[1]]}"


def to_grids(table: str, rows: pa.Table, names: list[str]) -> dict[str, Grid]:
    """Return one grid per metric; ranks are merged by the rule of each metric."""
    step_n = rows["step"].to_numpy()
    layer_n = rows["layer"].to_numpy()
    second_n = _second_key(table, rows)
    rank_n = rows["rank"].to_numpy()
    width = _rows_per_step(step_n, layer_n, second_n, rank_n)
    if width:
        keys = tuple(zip(layer_n[:width].tolist(), second_n[:width].tolist(), strict=True))
        values = {n: values_of(rows[n], METRICS[table, n]).reshape(-1, width).T for n in names}
        steps_S = step_n[::width]
        return {n: Grid(METRICS[table, n], keys, steps_S, v) for n, v in values.items()}
    steps_S, column_n = _dense_index(step_n)
    codes_R, row_n = _dense_index(layer_n.astype(np.int32) * _MOST_ROWS + second_n)
    keys = tuple((int(c // _MOST_ROWS), int(c % _MOST_ROWS)) for c in codes_R)
    ranks, rank_n = _dense_index(rank_n)
    shape = (len(ranks), len(codes_R), len(steps_S))
    grids = {}
    for name in names:
        metric = METRICS[table, name]
        values_RS = merged_values(rows[name], metric, (rank_n, row_n, column_n), shape)
        grids[name] = Grid(metric, keys, steps_S, values_RS)
    return grids


def _second_key(table: str, rows: pa.Table) -> np.ndarray:
    """Return the expert of each row, or the index of its site in SITES."""
    column = rows[SECOND_KEY[table]]
    if not pa.types.is_dictionary(column.type):
        return column.to_numpy()
    column = column.unify_dictionaries()
    known = column.chunk(0).dictionary.to_pylist() if column.num_chunks else []
    index_of = np.array([SITES.index(k) for k in known] or [0], np.int16)
    codes = [chunk.indices.to_numpy(zero_copy_only=False) for chunk in column.chunks]
    return index_of[np.concatenate(codes)] if codes else np.array([], np.int16)


def _rows_per_step(
    step_n: np.ndarray, layer_n: np.ndarray, second_n: np.ndarray, rank_n: np.ndarray
) -> int:
    """Return R if every step has the same R sorted rows of one rank, else 0.

    With R rows per step, a grid is a reshape of the column.
    """
    if not len(step_n) or step_n[0] < 0:
        return 0
    width = int((step_n != step_n[0]).argmax()) or len(step_n)
    if len(step_n) % width or rank_n.min() != rank_n.max():
        return 0
    same = all((key_n.reshape(-1, width) == key_n[:width]).all() for key_n in (layer_n, second_n))
    inside = (step_n.reshape(-1, width) == step_n[::width, None]).all()
    code_R = layer_n[:width].astype(np.int64) * _MOST_ROWS + second_n[:width]
    ordered = (np.diff(step_n[::width]) > 0).all() and (np.diff(code_R) > 0).all()
    return width if same and inside and ordered else 0


def values_of(column: pa.ChunkedArray, metric: Metric) -> np.ndarray:
    """Return float32 values: null becomes NaN, a value that is not finite becomes ±inf."""
    value_n = column.to_numpy().astype(np.float32, copy=False)
    if np.isfinite(value_n).all():
        return value_n
    return _by_convention(np.ma.MaskedArray(value_n, column.is_null().to_numpy()), metric)


def merged_values(
    column: pa.ChunkedArray, metric: Metric, at: tuple[np.ndarray, ...], shape: tuple[int, ...]
) -> np.ndarray:
    """Return a column, ranks merged, as an array of `shape[1:]` by the convention of this module.

    `at` are the indices of the column's values in an array of `shape`, ranks along the first axis.
    """
    if not shape[0]:
        return np.full(shape[1:], np.nan, np.float32)
    values = np.zeros(shape, np.float32)
    mask = np.ones(shape, bool)
    values[at] = column.to_numpy()
    mask[at] = column.is_null().to_numpy()
    each_rank = np.ma.MaskedArray(values, mask)
    return _by_convention(reduce_over_ranks(each_rank, metric.ranks, metric.worse), metric)


def _by_convention(values: np.ma.MaskedArray, metric: Metric) -> np.ndarray:
    """Return float32 values: masked becomes NaN, a value that is not finite becomes ±inf."""
    nonfinite = np.float32(-np.inf if metric.worse == "low" else np.inf)
    data = np.ma.getdata(values)
    measured = np.where(np.isfinite(data), data, nonfinite)
    return np.where(np.ma.getmaskarray(values), np.float32(np.nan), measured)


def extend(head: Grid, tail: Grid) -> Grid | None:
    """Return `head` continued by `tail`. Where they overlap, `tail` replaces `head`.

    Return None if `tail` has rows that `head` does not have.
    """
    if not set(tail.rows) <= set(head.rows):
        return None
    if not len(tail.steps_S):
        return head
    keep = int(np.searchsorted(head.steps_S, tail.steps_S[0]))
    new_RS = np.full((len(head.rows), len(tail.steps_S)), np.nan, np.float32)
    new_RS[[head.rows.index(r) for r in tail.rows]] = tail.values_RS
    steps_S = np.concatenate([head.steps_S[:keep], tail.steps_S])
    return Grid(
        head.metric, head.rows, steps_S, np.concatenate([head.values_RS[:, :keep], new_RS], 1)
    )


def concatenate(parts: Sequence[Grid]) -> Grid | None:
    """Join grids of consecutive steps into one. Return None if their rows differ."""
    some = [p for p in parts if len(p.steps_S)] or parts[:1]
    first = some[0]
    if any(p.rows != first.rows for p in some):
        return None
    if len(some) == 1:
        return first
    steps_S = np.concatenate([p.steps_S for p in some])
    return Grid(first.metric, first.rows, steps_S, np.concatenate([p.values_RS for p in some], 1))


def _dense_index(key_n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (sorted distinct keys, index of each key among them).

    Counting is faster than sorting here: there are millions of keys from a small range.
    """
    if not len(key_n):
        return key_n, key_n
    low = key_n.min()
    present = np.bincount(key_n - low) > 0
    return np.flatnonzero(present) + low, (np.cumsum(present) - 1)[key_n - low]
