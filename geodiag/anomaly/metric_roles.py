"""Which metric speaks for which part of a layer, and so for which stage: what makes an origin an
origin.

Inside a training step causes run one way: through the layers' forward in order, then back through
the gradients. A metric of a *part* depends on that part's own weights and on what came before it in
the step, so the first part that leaves its range is where the step went wrong. What accumulates
over layers (the stream, composite gains) shows how far it reached, never where it began.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from geodiag.metrics.schema import METRICS, SITES

Part = Literal["data", "map", "attention", "router", "experts", "write", "gradient", "stream"]
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

_PARTS: dict[Part, tuple[str, ...]] = {
    "data": ("data_shift",),
    "map": (
        "amax_gain_fwd",
        "amax_gain_bwd",
        "amax_gain_fwd_max",
        "amax_gain_bwd_max",
        "gain_fwd_min",
        "gain_bwd_min",
        "amax_gain_fwd_of_mean",
        "amax_gain_bwd_of_mean",
        "spectral_norm_res",
        "spectral_norm_res_max",
        "sinkhorn_residual",
    ),
    "attention": ("attn_logit_max",),
    "router": (
        "flip_rate_router",
        "flip_rate",
        "flip_top1",
        "flip_any",
        "router_margin_mean",
        "router_margin_p10",
        "router_entropy",
        "max_vio",
        "load_cv",
        "bias_abs_max",
        "bias_jaccard",
        "spectral_norm_router",
        "tear",
        "load",
        "gate_mass",
    ),
    "experts": (
        "clamp_gate_rate",
        "clamp_up_high_rate",
        "clamp_up_low_rate",
        "gate_amax",
        "up_amax",
        "act_amax",
        "expert_norm_max_median",
        "spectral_norm_gate",
        "spectral_norm_up",
        "spectral_norm_down",
        "curvature",
        "act_rms",
        "clamp_hits",
    ),
    "write": ("transport_gain_fwd", "transport_gain_fwd_max", "branch_share"),
    "gradient": ("grad_norm", "transport_gain_bwd"),
    "stream": ("stream_amax", "stream_rms", "composite_gain_fwd", "composite_gain_fwd_max"),
}
_TWO_SIDED = {
    "router_entropy",
    "router_margin_mean",
    "router_margin_p10",
    "load",
    "gate_mass",
    "branch_share",
}
_TWO_SIDED |= {"bias_jaccard", "act_rms", "transport_gain_fwd"}


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


@dataclass(frozen=True, kw_only=True)
class Signal:
    """How a metric is judged."""

    part: Part
    scale: Literal["log", "root", "plain"]
    sides: Literal["high", "low", "both"]
    floor: float
    """Least spread that counts, on the metric's scale: below it is the noise of an idle quantity.
    """


HASHED = ("load", "max_vio", "load_cv")
"""Where experts are chosen by a hash of the token, these depend on the batch alone."""
_FLOORS = {"log": 0.01, "root": 0.01, "plain": 0.003}
_MAP_FLOOR = 0.02
"""Two per cent more or less gain of one map is nothing to act on, however quiet it was."""


def _signal(name: str, table: str, part: Part) -> Signal | None:
    metric = METRICS.get((table, name))
    if metric is None or (table == "steps") != (
        part == "data"
    ):  # the run's own gradient norm is an outcome
        return None
    positive, counted = metric.unit in ("×", "1", "logit"), metric.unit in ("share", "hits")
    scale: Literal["log", "root", "plain"] = "log" if positive else "root" if counted else "plain"
    if name == "sinkhorn_residual":
        scale = "plain"  # a residual that grows from 1e-6 to 1e-5 is still none
    sides = "both" if name in _TWO_SIDED or metric.worse is None else metric.worse
    return Signal(
        part=part, scale=scale, sides=sides, floor=_MAP_FLOOR if part == "map" else _FLOORS[scale]
    )


SIGNALS: dict[tuple[str, str], Signal] = {
    (table, name): signal
    for part, names in _PARTS.items()
    for name in names
    for table in ("steps", "layers", "experts")
    if (signal := _signal(name, table, part)) is not None
}
"""(table, metric) → how it is judged. A metric that is not here is shown, and says nothing about an
origin.
"""


def place_of(series: Series, hashed: Collection[int] = ()) -> Place:
    """The part of the site that a series speaks for; `hashed` are the layers whose router is a
    hash.
    """
    if series.layer in hashed and series.metric in HASHED:
        return Place(series.layer, series.site, "data")
    return Place(series.layer, series.site, SIGNALS[series.table, series.metric].part)


def rescaled(values: np.ndarray, log: np.ndarray, root: np.ndarray) -> np.ndarray:
    """Values on the scales on which their noise is alike at every size: logarithms, roots of
    shares, or as they are.
    """
    with np.errstate(all="ignore"):
        out = np.where(log, np.log(np.maximum(np.abs(values), 1e-12)), values)
        return np.where(root, np.sqrt(np.maximum(values, 0)), out)
