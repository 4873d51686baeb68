"""A window of a run as arrays: one row per step, one column per series, ranks merged."""

from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from geodiag.anomaly.metric_roles import SIGNALS, Series
from geodiag.metrics.metric import Metric
from geodiag.metrics.registry import METRICS
from geodiag.metrics.schema import SITES
from geodiag.run import Run
from geodiag.store.merge_ranks import reduce_over_ranks

# S steps, P series

_PLACE_COLUMNS = {"layers": ["layer", "site"], "experts": ["layer", "expert"]}
"""Table → the columns that name the place of a row."""
_OUTCOME = ("loss", "grad_norm", "lr", "data_shift")
_MAX_KINDS = 65536
"""Most sites or experts of a layer: a place is layer · 65536 + site or expert."""


@dataclass(frozen=True)
class SeriesWindow:
    """The recorded values of a window of steps: NaN if not sampled, infinite if not finite."""

    step_S: np.ndarray
    series: list[Series]
    values_SP: np.ndarray
    outcome: dict[str, np.ndarray]
    """Columns of the table `steps`, one value per step."""
    missing: list[str] = field(default_factory=list)
    """Tables without a row in this window."""
    ranks: int = 0
    """Ranks that have rows in this window."""

    @property
    def layers(self) -> list[int]:
        return sorted({s.layer for s in self.series if s.layer >= 0})

    @property
    def hashed(self) -> set[int]:
        """Layers with a hash router: they have loads, but no router margins."""
        loads = {s.layer for s in self.series if s.metric == "max_vio"}
        margins = {s.layer for s in self.series if s.metric == "router_margin_mean"}
        return loads - margins if margins else set()

    @property
    def sampled_S(self) -> np.ndarray:
        """True for the steps at which any series was sampled."""
        if not self.values_SP.size:
            return np.zeros(len(self.step_S), bool)
        sampled_S: np.ndarray = np.isfinite(self.values_SP).any(1)
        return sampled_S


def read_series(run: Run, first: int, last: int, attempt: int | None = None) -> SeriesWindow:
    """Read the steps `first` to `last` as an attempt recorded them; by default the newest one."""
    if attempt is not None:
        run = run.as_of_attempt(attempt)
    keys = ["rank", "attempt", "step"]
    window = (first, last + 1)
    steps = run.read_arrow("steps", [*keys, *_OUTCOME], window)
    tables = {}
    for table, place in _PLACE_COLUMNS.items():
        names = [name for t, name in SIGNALS if t == table]
        tables[table] = run.read_arrow(table, [*keys, *place, *names], window)
    missing = [name for name, rows in {"steps": steps, **tables}.items() if not len(rows)]
    present = {name: rows for name, rows in tables.items() if len(rows)}

    recorded = [rows["step"].to_numpy() for rows in (steps, *present.values())]
    step_S = np.unique(np.concatenate(recorded))
    series: list[Series] = []
    blocks = [np.zeros((len(step_S), 0))]
    for table, rows in present.items():
        columns, block = _pivot(table, rows, step_S)
        series += columns
        blocks.append(block)

    outcome = _outcome(steps, step_S)
    for name in (n for t, n in SIGNALS if t == "steps" and not np.isnan(outcome[n]).all()):
        series.append(Series(name, -1, None))
        blocks.append(outcome[name][:, None])
    ranks = max((len(np.unique(rows["rank"].to_numpy())) for rows in present.values()), default=0)
    return SeriesWindow(step_S, series, np.concatenate(blocks, 1), outcome, missing, ranks)


def _pivot(table: str, rows: pa.Table, step_S: np.ndarray) -> tuple[list[Series], np.ndarray]:
    """Return the series in `rows` and their values (S, P); series without a sample are left out."""
    layer = rows["layer"].to_numpy().astype(np.int64)
    if table == "layers":
        kind = np.asarray(rows["site"].combine_chunks().indices.to_numpy(), int)
    else:
        kind = rows["expert"].to_numpy()
    keys, place = np.unique(layer * _MAX_KINDS + kind, return_inverse=True)
    row = np.searchsorted(step_S, rows["step"].to_numpy())
    rank = np.unique(rows["rank"].to_numpy(), return_inverse=True)[1]

    series = []
    columns = [np.zeros((len(step_S), 0))]
    for name in (n for t, n in SIGNALS if t == table):
        column = rows[name]
        if column.null_count == len(column):
            continue
        shape = (len(step_S), len(keys))
        values = _merged_values(column, METRICS[table, name], (rank, row, place), shape)
        sampled = ~np.isnan(values).all(0)
        series += [_series(table, name, int(keys[i])) for i in np.flatnonzero(sampled)]
        columns.append(values[:, sampled])
    return series, np.concatenate(columns, 1)


def _series(table: str, name: str, key: int) -> Series:
    layer, kind = divmod(key, _MAX_KINDS)
    if table == "layers":
        return Series(name, layer, SITES[kind])
    return Series(name, layer, "ffn", kind)


def _merged_values(
    column: pa.ChunkedArray,
    metric: Metric,
    at: tuple[np.ndarray, np.ndarray, np.ndarray],
    shape: tuple[int, int],
) -> np.ndarray:
    """Return one value per step and place, ranks merged.

    at: rank, row and place of each value.
    """
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
    """Return the columns of the table `steps`, ranks merged; NaN if not recorded."""
    row = np.searchsorted(step_S, steps["step"].to_numpy())
    rank = np.unique(steps["rank"].to_numpy(), return_inverse=True)[1]
    place = np.zeros(len(row), int)
    outcome = {}
    for name in _OUTCOME:
        outcome[name] = np.full(len(step_S), np.nan)
        if name in steps.column_names and steps[name].null_count < len(steps):
            metric = METRICS["steps", name]
            shape = (len(step_S), 1)
            outcome[name] = _merged_values(steps[name], metric, (rank, row, place), shape)[:, 0]
    return outcome
