"""Which metric speaks for which part of a layer, and so for which stage: what makes an origin an
origin.

Inside a training step causes run one way: through the layers' forward in order, then back through
the gradients. A metric of a *part* depends on that part's own weights and on what came before it in
the step, so the first part that leaves its range is where the step went wrong. What accumulates
over layers (the stream, composite gains) shows how far it reached, never where it began.
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
"""In the order in which a site's forward passes them; gradients come last."""
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


class Place(NamedTuple):
    """One part of one site."""

    layer: int
    site: str | None
    part: Part

    @property
    def order(self) -> tuple[int, int, int, int]:
        """Its turn within a step: the forward from the first layer, then the gradients from the
        last.
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
    """-1 for what belongs to no layer."""
    site: str | None
    expert: int | None = None

    @property
    def table(self) -> str:
        return "experts" if self.expert is not None else "layers" if self.layer >= 0 else "steps"


HASHED = ("load", "max_vio", "load_cv")
"""Where experts are chosen by a hash of the token, these depend on the batch alone."""
_FLOORS = {"log": 0.01, "root": 0.01, "plain": 0.003}
_MAP_FLOOR = 0.02
"""Two per cent more or less gain of one map is nothing to act on, however quiet it was."""

SIGNALS: dict[tuple[str, str], Metric] = {
    (m.table, m.name): m for part in PARTS for m in METRICS.values() if m.part == part
}
"""(table, metric) → the metrics that speak for a part, and so for an origin, in the order of parts.

All other metrics are recorded and shown, and take no part in the search for an origin.
"""


def least_spread(metric: Metric) -> float:
    """Return the least spread that counts, on the metric's scale: below it is noise of an idle
    quantity.
    """
    return _MAP_FLOOR if metric.part == "map" else _FLOORS[metric.noise_scale]


def place_of(series: Series, hashed: Collection[int] = ()) -> Place:
    """The part of the site that a series speaks for; `hashed` are the layers whose router is a
    hash.
    """
    if series.layer in hashed and series.metric in HASHED:
        return Place(series.layer, series.site, "data")
    return Place(series.layer, series.site, _part(series))


def rescaled(values: np.ndarray, log: np.ndarray, root: np.ndarray) -> np.ndarray:
    """Values on the scales on which their noise is alike at every size: logarithms, roots of
    shares, or as they are.
    """
    with np.errstate(all="ignore"):
        out = np.where(log, np.log(np.maximum(np.abs(values), 1e-12)), values)
        return np.where(root, np.sqrt(np.maximum(values, 0)), out)


def _part(series: Series) -> Part:
    part = SIGNALS[series.table, series.metric].part
    assert part is not None
    return part
