"""A window of a run as arrays: one row a step, one column a series, ranks put together, one
attempt's view.
"""

from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from geodiag.anomaly.metric_roles import SIGNALS, Series
from geodiag.metrics.schema import METRICS, SITES
from geodiag.run import Run
from geodiag.store.manifest import all_starts, known_starts


@dataclass(frozen=True)
class Tracks:
    """What was recorded in a window of steps; NaN is not sampled, infinite is what was no finite
    number.
    """

    step_S: np.ndarray
    series: list[Series]
    values_SP: np.ndarray
    outcome: dict[str, np.ndarray]
    """Columns of the table `steps`, one value a step."""
    missing: list[str] = field(default_factory=list)
    """Tables without a row in this window."""
    ranks: int = 0

    @property
    def layers(self) -> list[int]:
        return sorted({s.layer for s in self.series if s.layer >= 0})

    @property
    def hashed(self) -> set[int]:
        """Layers whose experts are chosen by a hash of the token: loads, but no margins."""
        loads = {s.layer for s in self.series if s.metric == "max_vio"}
        margins = {s.layer for s in self.series if s.metric == "router_margin_mean"}
        return loads - margins if margins else set()

    @property
    def sampled_S(self) -> np.ndarray:
        """The steps at which the layers were sampled."""
        return (
            np.isfinite(self.values_SP).any(1)
            if self.values_SP.size
            else np.zeros(len(self.step_S), bool)
        )


def read_tracks(run: Run, first: int, last: int, attempt: int | None = None) -> Tracks:
    """Steps `first` to `last` as a training of that attempt lived them; the newest attempt unless
    one is named.
    """
    parts, missing, ranks = [], [], 0
    steps = rows_of_attempt(
        run, "steps", ["loss", "grad_norm", "lr", "data_shift"], first, last, attempt
    )
    if not len(steps):
        missing.append("steps")
    for table in ("layers", "experts"):
        keys = ["layer", "site"] if table == "layers" else ["layer", "expert"]
        names = [name for t, name in SIGNALS if t == table]
        rows = rows_of_attempt(run, table, [*keys, *names], first, last, attempt)
        if not len(rows):
            missing.append(table)
            continue
        ranks = max(ranks, len(np.unique(rows["rank"].to_numpy())))
        parts.append((table, rows))
    found = [t["step"].to_numpy() for t in (steps, *(rows for _, rows in parts))]
    step_S = np.unique(np.concatenate(found)) if found else np.zeros(0, int)
    series: list[Series] = []
    blocks = [np.zeros((len(step_S), 0))]
    for table, rows in parts:
        more, block = _pivot(table, rows, step_S)
        series += more
        blocks.append(block)
    outcome = _outcome(steps, step_S)
    for name in (n for t, n in SIGNALS if t == "steps" and not np.isnan(outcome[n]).all()):
        series.append(Series(name, -1, None))
        blocks.append(outcome[name][:, None])
    return Tracks(step_S, series, np.concatenate(blocks, 1), outcome, missing, ranks)


def rows_of_attempt(
    run: Run, table: str, names: list[str], first: int, last: int, attempt: int | None
) -> pa.Table:
    """Rows of a table, steps `first` to `last`, as that attempt lived them; the newest unless one
    is named.
    """
    keys = ["rank", "attempt", "step"]
    names = [
        n for n in names if (table, n) in METRICS or n in ("layer", "site", "expert", "domain")
    ]
    if attempt is None:
        return run.read_arrow(table, keys + names, (first, last + 1))
    # A later attempt may be writing already, of which the manifest that was read does not know yet.
    rows = run.read_arrow(table, keys + names, (first, last + 1), attempt="all")
    rows = rows.filter(pc.less_equal(rows["attempt"], attempt))
    mine, step = rows["attempt"].to_numpy(), rows["step"].to_numpy()
    keep = np.ones(len(rows), bool)
    for later, start in all_starts(rows, known_starts(run.manifest)).items():
        if later <= attempt:
            keep &= (mine >= later) | (step < start)
    return rows.filter(pa.array(keep))


def _pivot(table: str, rows: pa.Table, step_S: np.ndarray) -> tuple[list[Series], np.ndarray]:
    """Columns of `rows` as series; what was never sampled is left out."""
    at = np.searchsorted(step_S, rows["step"].to_numpy())
    layer = rows["layer"].to_numpy()
    if table == "layers":
        codes = rows["site"].combine_chunks().indices.to_numpy() if len(rows) else np.zeros(0, int)
        kind = np.asarray(codes, int)
    else:
        kind = rows["expert"].to_numpy()
    keys, place = np.unique(layer.astype(np.int64) * 65536 + kind, return_inverse=True)
    rank = np.unique(rows["rank"].to_numpy(), return_inverse=True)[1]
    series, columns = [], []
    for name in (n for t, n in SIGNALS if t == table):
        column = rows[name]
        if column.null_count == len(column):
            continue
        value = column.to_numpy().astype(np.float64)
        if column.null_count:
            valid = column.is_valid().to_numpy()
            value[valid & np.isnan(value)] = np.inf
        else:
            value[np.isnan(value)] = np.inf
        grid = _by_rank(
            value, rank, at, place, (len(step_S), len(keys)), METRICS[table, name].ranks
        )
        sampled = ~np.isnan(grid).all(0)
        for i in np.flatnonzero(sampled):
            key = divmod(int(keys[i]), 65536)
            layers_site = SITES[key[1]] if table == "layers" else "ffn"
            series.append(Series(name, key[0], layers_site, key[1] if table == "experts" else None))
        columns.append(grid[:, sampled])
    return series, np.concatenate([np.zeros((len(step_S), 0)), *columns], 1)


def _by_rank(
    value: np.ndarray,
    rank: np.ndarray,
    at: np.ndarray,
    place: np.ndarray,
    shape: tuple[int, int],
    how: str,
) -> np.ndarray:
    """One value a step and place: what the ranks saw, put together as the registry says."""
    ranks = int(rank.max()) + 1 if len(rank) else 1
    each = np.full((ranks, *shape), np.nan)
    each[rank, at, place] = value
    if ranks == 1:
        return each[0]
    joined = {"max": np.fmax.reduce, "min": np.fmin.reduce}.get(how)
    if joined is not None:
        return joined(each)
    known = ~np.isnan(each)
    total = np.where(known, each, 0).sum(0)
    return np.where(
        known.any(0), total if how == "sum" else total / np.maximum(known.sum(0), 1), np.nan
    )


def _outcome(steps: pa.Table, step_S: np.ndarray) -> dict[str, np.ndarray]:
    at = np.searchsorted(step_S, steps["step"].to_numpy())
    rank = np.unique(steps["rank"].to_numpy(), return_inverse=True)[1]
    alone = np.zeros(len(at), int)
    out = {}
    for name in ("loss", "grad_norm", "lr", "data_shift"):
        out[name] = np.full(len(step_S), np.nan)
        if name in steps.column_names and steps[name].null_count < len(steps):
            column = steps[name]
            value = column.to_numpy().astype(np.float64)
            value[column.is_valid().to_numpy() & np.isnan(value)] = np.inf
            how = METRICS["steps", name].ranks
            out[name] = _by_rank(value, rank, at, alone, (len(step_S), 1), how)[:, 0]
    return out
