"""One cell of the stage map: the series behind its stage in its layer, each beside what is usual
for it.
"""

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
"""Samples before the cell, or before its cascade, that say what is usual."""
_MIN_BYTES = 8
_NEAR = 8


class Series(NamedTuple):
    """One metric at one site, and the range that it kept to before."""

    metric: Metric
    site: str
    step_S: np.ndarray
    value_S: np.ndarray
    usual: tuple[float, float] | None
    """Where all but the odd one of the samples before lay; None where there are too few."""
    score: float
    """How far outside it went near the cell, in widths of that range."""


def cell_series(
    cache: RunCache,
    cell: StageCell,
    window: tuple[int, int],
    before: int,
    told: Sequence[str] = (),
    most: int = 5,
) -> list[Series]:
    """The metrics that speak for the cell's stage in its layer: what is `told`, then what left its
    range the furthest.

    `before` is the step up to which things were usual.
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
    found.sort(key=lambda s: (s.metric.name not in told, -s.score))
    return _one_a_metric(found)[:most]


def _series(grid: Grid, row: int, cell: StageCell, before: int) -> Series:
    known = ~np.isnan(grid.values_RS[row])
    step_S, value_S = grid.steps_S[known], grid.values_RS[row][known]
    past = value_S[(step_S < before) & np.isfinite(value_S)][-_BEFORE:]
    usual, score = None, -math.inf
    if len(past) >= _MIN_BYTES:
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
    """Of attention and feed-forward, the site that stands out more."""
    seen: dict[str, Series] = {}
    for s in ranked:
        seen.setdefault(s.metric.name, s)
    return list(seen.values())
