"""The metric series behind one cell of the stage map, each with its usual range."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from geodiag.anomaly.metric_roles import SIGNALS, STAGE_OF
from geodiag.dashboard.cascade.selection import StageCell
from geodiag.dashboard.data.grid import Grid
from geodiag.dashboard.data.run_cache import RunCache
from geodiag.metrics.schema import SITES, Metric

_BEFORE = 96
"""Samples before the cell or the cascade from which the usual range is computed."""
_MIN_SAMPLES = 8
_NEAR = 8


class Series(NamedTuple):
    """One metric at one site, with its range before the cascade."""

    metric: Metric
    site: str
    step_S: np.ndarray
    value_S: np.ndarray
    usual: tuple[float, float] | None
    """2 % and 98 % quantile of the samples before; None if there are too few."""
    score: float
    """Distance from the median near the cell, in widths of the usual range."""


def cell_series(
    cache: RunCache,
    cell: StageCell,
    window: tuple[int, int],
    before: int,
    first_metrics: Sequence[str] = (),
    most: int = 5,
) -> list[Series]:
    """Return the metrics of the cell's stage in its layer, at most `most`.

    Metrics named in `first_metrics` come first, then those that left their usual range the
    furthest. Values before step `before` count as usual.
    """
    names = [
        n
        for (table, n), s in SIGNALS.items()
        if table == "layers" and s.part and STAGE_OF[s.part] == cell.stage
    ]
    first = min(window[0], before - _BEFORE)
    key = ("stretch", cell.stage, first, window[1])
    grids = cache.memo(key, lambda: cache.read_steps("layers", names, first, window[1]))
    found = []
    for grid in grids:
        mine = grid.of_layer(cell.layer).measured()
        found += [_series(mine, i, cell, before) for i in range(len(mine.rows))]
    found.sort(key=lambda s: (s.metric.name not in first_metrics, -s.score))
    return _one_a_metric(found)[:most]


def _series(grid: Grid, row: int, cell: StageCell, before: int) -> Series:
    known = ~np.isnan(grid.values_RS[row])
    step_S, value_S = grid.steps_S[known], grid.values_RS[row][known]
    past = value_S[(step_S < before) & np.isfinite(value_S)][-_BEFORE:]
    usual = None
    score = -math.inf
    if len(past) >= _MIN_SAMPLES:
        low, middle, high = (float(np.quantile(past, q)) for q in (0.02, 0.5, 0.98))
        usual = (low, high)
        cadence = int(np.median(np.diff(step_S))) if len(step_S) > 1 else 1
        near = value_S[
            (step_S >= cell.step - cadence) & (step_S <= cell.step + max(_NEAR, cadence))
        ]
        wide = max(high - low, 0.02 * abs(middle), 1e-6)
        sides = grid.metric.abnormal_sides
        away = {"high": near - middle, "low": middle - near}.get(sides, np.abs(near - middle))
        if len(near):
            score = math.inf if np.isinf(near).any() else float(away.max() / wide)
    return Series(grid.metric, SITES[grid.rows[row][1]], step_S, value_S, usual, score)


def _one_a_metric(ranked: list[Series]) -> list[Series]:
    """Keep the site with the highest score of each metric: attention or feed-forward."""
    best: dict[str, Series] = {}
    for s in ranked:
        best.setdefault(s.metric.name, s)
    return list(best.values())
