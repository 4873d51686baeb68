"""Evidence: the series behind a verdict, each with its value, its usual value and its score."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from geodiag.anomaly.excursions import excursions
from geodiag.cascade.defence import Stage
from geodiag.cascade.origin import Candidate
from geodiag.cascade.scored_window import ScoredWindow
from geodiag.jsonable import jsonable
from geodiag.metrics.registry import METRICS

_USUAL = 64
"""Samples before the onset that the usual value is the median of."""
_AFTER = 6
"""Samples from the onset on in which the worst one is searched."""
_MIN_SCORE = 3.0
"""Least score of evidence."""


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """One metric that left its range."""

    stage: Stage
    layer: int | None
    site: str | None
    expert: int | None
    metric: str
    step: int
    """The step at which it left its range."""
    score: float
    """Robust z of its worst sample shortly after the onset."""
    value: float
    """The value of that sample."""
    usual: float
    """Median of the samples before the onset."""
    unit: str

    def as_json(self) -> dict[str, Any]:
        return {k: jsonable(v) for k, v in asdict(self).items()}


def origin_evidence(
    window: ScoredWindow, origin: Candidate, stage: Stage, most: int = 6
) -> list[Evidence]:
    """Return the evidence for an origin, the highest score first.

    Of a metric that each expert has, only the expert with the highest score is kept.
    """
    found: dict[str, Evidence] = {}
    for j in np.flatnonzero(window.place_P == window.places.index(origin.place)).tolist():
        metric = window.series[j].metric
        row = series_evidence(window, j, origin.start, stage)
        if row is not None and row.score > found.get(metric, row).score - 1e-9:
            found[metric] = row
    return sorted(found.values(), key=lambda e: -e.score)[:most]


def series_evidence(window: ScoredWindow, j: int, start: int, stage: Stage) -> Evidence | None:
    """Return the worst sample of series `j` from row `start` on; None if it is in range."""
    series = window.series[j]
    scores = window.score_SP[start : start + _AFTER, j]
    if not (scores >= _MIN_SCORE).any():
        return None
    worst = start + int(np.nanargmax(scores))
    values = window.recorded.values_SP[:, j]
    begun = [e.start for e in excursions(window.score_SP[:, j]) if start <= e.start <= worst]
    return Evidence(
        stage=stage,
        layer=series.layer,
        site=series.site,
        expert=series.expert,
        metric=series.metric,
        step=int(window.step_S[begun[0] if begun else worst]),
        score=float(window.score_SP[worst, j]),
        value=float(values[worst]),
        usual=usual_value(values, start),
        unit=METRICS[series.table, series.metric].unit,
    )


def usual_value(values: np.ndarray, start: int) -> float:
    """Return the median of the finite samples before row `start`; NaN if there are none."""
    before = values[:start]
    before = before[np.isfinite(before)][-_USUAL:]
    return float(np.median(before)) if len(before) else float("nan")
