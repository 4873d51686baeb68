"""The part of a layer, and so the stage, that each metric belongs to.

Inside a training step, cause and effect run in one direction: forward through the layers, then
backward through the gradients. A metric of a part depends on the weights of that part and on what
was computed before it, so that the first part out of range is where the step went wrong. Metrics
that accumulate over layers (the stream, composite gains) show how far a fault spread, never where
it began.
"""

from collections.abc import Collection
from typing import NamedTuple

import numpy as np

from geodiag.metrics.metric import Metric, Part
from geodiag.metrics.registry import METRICS
from geodiag.metrics.schema import SITES

PARTS: tuple[Part, ...] = (
    "data",
    "map",
    "attention",
    "router",
    "experts",
    "write",
    "stream",
    "gradient",
)
"""In the order of a site's forward pass; gradients come last."""
STAGE_OF: dict[Part, int | None] = {
    "data": None,
    "map": 3,
    "attention": 1,
    "router": 2,
    "experts": 1,
    "write": 3,
    "stream": 3,
    "gradient": 3,
}


class SeriesPlace(NamedTuple):
    """One part of one site."""

    layer: int
    site: str | None
    part: Part

    @property
    def order(self) -> tuple[int, int, int, int]:
        """Position in a step: the forward pass from the first layer on, then the gradients from the
        last layer on.
        """
        if self.part == "data":
            return -1, 0, 0, 0
        if self.part == "gradient":
            return 1, -self.layer, -SITES.index(self.site or "block"), 0
        return 0, self.layer, SITES.index(self.site or "attn"), PARTS.index(self.part)

    @property
    def stage(self) -> int | None:
        return STAGE_OF[self.part]


class Series(NamedTuple):
    """One recorded quantity at one place."""

    metric: str
    layer: int
    """-1 if it belongs to no layer."""
    site: str | None
    expert: int | None = None

    @property
    def table(self) -> str:
        return "experts" if self.expert is not None else "layers" if self.layer >= 0 else "steps"


HASHED = ("load", "max_vio", "load_cv")
"""Metrics that depend on the batch alone in a layer with a hash router."""
_FLOORS = {"log": 0.01, "root": 0.01, "plain": 0.003}
_MAP_FLOOR = 0.02
"""Changes of 2 % in the gain of one map are ignored, however quiet it was."""

SIGNALS: dict[tuple[str, str], Metric] = {
    (m.table, m.name): m for part in PARTS for m in METRICS.values() if m.part == part
}
"""(table, name) → metric, for the metrics that belong to a part, in the order of parts.

All other metrics are recorded and shown, but not used in the search for an origin.
"""


def least_spread(metric: Metric) -> float:
    """Return the least spread of a metric, on its scale: smaller changes of an idle metric are
    noise.
    """
    return _MAP_FLOOR if metric.part == "map" else _FLOORS[metric.noise_scale]


def place_of(series: Series, hashed: Collection[int] = ()) -> SeriesPlace:
    """Return the part of the site that a series belongs to; `hashed`: layers with a hash router."""
    if series.layer in hashed and series.metric in HASHED:
        return SeriesPlace(series.layer, series.site, "data")
    return SeriesPlace(series.layer, series.site, _part(series))


def rescaled(values: np.ndarray, log: np.ndarray, root: np.ndarray) -> np.ndarray:
    """Return values on a scale on which their noise does not depend on their size.

    log, root: masks of the series to transform. The logarithm is for sizes, the square root for
    shares and counts (it stabilises the variance of a Poisson count; Anscombe 1948, Biometrika 35).
    """
    with np.errstate(all="ignore"):
        out = np.where(log, np.log(np.maximum(np.abs(values), 1e-12)), values)
        return np.where(root, np.sqrt(np.maximum(values, 0)), out)


def _part(series: Series) -> Part:
    part = SIGNALS[series.table, series.metric].part
    assert part is not None
    return part
