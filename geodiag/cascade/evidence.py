"""Evidence: the series behind a verdict, each with its value, what is usual for it, and how far
that is.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from geodiag.anomaly.excursions import excursions
from geodiag.cascade.defence import Stage
from geodiag.cascade.origin import Candidate
from geodiag.cascade.stage_map import Judged
from geodiag.jsonable import jsonable
from geodiag.metrics.schema import METRICS

_USUAL = 64
_AFTER = 6
_LEAST = 3.0


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """One quantity that left its range."""

    stage: Stage
    layer: int | None
    site: str | None
    expert: int | None
    metric: str
    step: int
    """When it did."""
    score: float
    """Robust z of the worst of the next few samples."""
    value: float
    usual: float
    """Median of the samples before."""
    unit: str

    def as_json(self) -> dict[str, Any]:
        return {k: jsonable(v) for k, v in asdict(self).items()}


def rows_of(window: Judged, origin: Candidate, stage: Stage, most: int = 6) -> list[Evidence]:
    """What speaks for an origin, the loudest first; of an expert's series, the loudest expert only."""
    found: dict[str, Evidence] = {}
    for j in np.flatnonzero(window.place_P == window.places.index(origin.place)).tolist():
        series = window.series[j]
        row = evidence(window, j, origin.start, stage)
        if row is not None and row.score > found.get(series.metric, row).score - 1e-9:
            found[series.metric] = row
    return sorted(found.values(), key=lambda e: -e.score)[:most]


def evidence(window: Judged, j: int, start: int, stage: Stage) -> Evidence | None:
    """The worst moment of series `j` in the samples from row `start` on."""
    series, scores = window.series[j], window.score_SP[start : start + _AFTER, j]
    if not (scores >= _LEAST).any():
        return None
    worst = start + int(np.nanargmax(scores))
    values = window.tracks.values_SP[:, j]
    mine = [e.start for e in excursions(window.score_SP[:, j]) if start <= e.start <= worst]
    return Evidence(
        stage=stage,
        layer=series.layer,
        site=series.site,
        expert=series.expert,
        metric=series.metric,
        step=int(window.step_S[mine[0] if mine else worst]),
        score=float(window.score_SP[worst, j]),
        value=float(values[worst]),
        usual=usual(values, start),
        unit=METRICS[series.table, series.metric].unit,
    )


def usual(values: np.ndarray, start: int) -> float:
    """The median of the finite samples before row `start`; NaN where there are none."""
    before = values[:start]
    before = before[np.isfinite(before)][-_USUAL:]
    return float(np.median(before)) if len(before) else float("nan")
