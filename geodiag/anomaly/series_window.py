"""A window of a run as arrays: one row a step, one column a series, ranks put together, one
attempt's view.
"""

from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from geodiag.anomaly.metric_roles import SIGNALS, Series
from geodiag.metrics.schema import METRICS, SITES, Metric
from geodiag.run import Run
from geodiag.store.merge_ranks import reduce_over_ranks


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
    if attempt is not None:
        run = run.as_of_attempt(attempt)
    keys, window = ["rank", "attempt", "step"], (first, last + 1)
    steps = run.read_arrow("steps", [*keys, "loss", "grad_norm", "lr", "data_shift"], window)
    if not len(steps):
        missing.append("steps")
    for table in ("layers", "experts"):
        place = ["layer", "site"] if table == "layers" else ["layer", "expert"]
        names = [name for t, name in SIGNALS if t == table]
        rows = run.read_arrow(table, [*keys, *place, *names], window)
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
        shape = (len(step_S), len(keys))
        grid = _merged_values(column, METRICS[table, name], (rank, at, place), shape)
        sampled = ~np.isnan(grid).all(0)
        for i in np.flatnonzero(sampled):
            key = divmod(int(keys[i]), 65536)
            layers_site = SITES[key[1]] if table == "layers" else "ffn"
            series.append(Series(name, key[0], layers_site, key[1] if table == "experts" else None))
        columns.append(grid[:, sampled])
    return series, np.concatenate([np.zeros((len(step_S), 0)), *columns], 1)


def _merged_values(
    column: pa.ChunkedArray,
    metric: Metric,
    at: tuple[np.ndarray, np.ndarray, np.ndarray],
    shape: tuple[int, int],
) -> np.ndarray:
    """One value a step and place, ranks merged; `at` are rank, step and place of each row."""
    ranks = int(at[0].max()) + 1 if len(at[0]) else 1
    values = np.zeros((ranks, *shape))
    mask = np.ones(values.shape, bool)
    values[at] = column.to_numpy()
    mask[at] = column.is_null().to_numpy()
    merged = reduce_over_ranks(np.ma.MaskedArray(values, mask), metric.ranks, metric.worse)
    data = np.ma.getdata(merged)
    measured = np.where(np.isnan(data), np.inf, data)
    return np.where(np.ma.getmaskarray(merged), np.nan, measured)


def _outcome(steps: pa.Table, step_S: np.ndarray) -> dict[str, np.ndarray]:
    at = np.searchsorted(step_S, steps["step"].to_numpy())
    rank = np.unique(steps["rank"].to_numpy(), return_inverse=True)[1]
    alone = np.zeros(len(at), int)
    out = {}
    for name in ("loss", "grad_norm", "lr", "data_shift"):
        out[name] = np.full(len(step_S), np.nan)
        if name in steps.column_names and steps[name].null_count < len(steps):
            metric = METRICS["steps", name]
            shape = (len(step_S), 1)
            out[name] = _merged_values(steps[name], metric, (rank, at, alone), shape)[:, 0]
    return out
