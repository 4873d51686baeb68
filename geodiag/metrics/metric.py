"""Metric: name, unit, definition and every other fact that geodiag needs of a recorded metric."""

from dataclasses import dataclass
from typing import Any, Literal

Reduction = Literal["mean", "max", "min", "sum", "last"]

Group = Literal[
    "streams", "gains", "routers", "experts", "parameters",  # measured in every sampled step
    "flips", "tear", "tokens", "domains", "attention", "curvature", "growth", "spectra",  # probes
]  # fmt: skip
"""Metrics that are measured together: if none of a group is due, the group costs nothing."""

IN_STEP: tuple[Group, ...] = ("streams", "gains", "routers", "experts", "parameters")
"""Groups measured by the hooks of the training step itself; all others are probes."""

Place = Literal["step", "site", "router", "experts", "attention", "layer", "token", "sequence"]
"""What has one value of the metric: the step, a residual site, a router, a layer's experts, …"""

Part = Literal["data", "map", "attention", "router", "experts", "write", "stream", "gradient"]
"""The part of a layer whose weights the metric depends on."""

Scale = Literal["log", "root", "plain"]
Side = Literal["high", "low"]


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Where the pages draw a metric."""

    page: Literal["gain", "routing", "activations"]
    menu: str | None = None
    """Its entry in the menu of the page's large chart; None: not in the menu."""
    quantity: str | None = None
    """Metrics of a quantity share a menu entry and differ in `over`; default: the metric's name."""
    over: Literal["mean", "max", "min", "of_mean"] | None = None
    """How the quantity is reduced over tokens."""
    panel: str | None = None
    """The panel below the large chart in which the metric is a line; None: in none."""
    legend: str | None = None
    """The line's name in that panel."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One recorded metric. Everything that geodiag does with a metric follows from these fields."""

    name: str
    table: str
    unit: str
    micro: Reduction
    """How values of several micro-batches become one. Means are weighted by tokens."""
    ranks: Reduction
    """How values of several ranks become one."""
    every: int = 1
    """Default cadence, in steps."""
    healthy: tuple[float | None, float | None] | None = None
    """The range a healthy run stays in, where there is one for all models."""
    worse: Side | None = "high"
    """Which end is the bad one, so that `show` can name the worst layer."""
    stage: int | None = None
    """The stage of the tear cascade it is evidence for: 1 curvature, 2 routing, 3 amplification."""
    help: str
    source: str = "geodiag"

    group: Group | None = None
    """What it is measured with; None for what the trainer reports or the detector computes."""
    place: Place = "step"
    part: Part | None = None
    """The part of a layer that it speaks for when geodiag searches for an origin; None: for none,
    because it accumulates over layers or mixes several parts."""
    sides: Literal["high", "low", "both"] | None = None
    """Deviations from its own past that count as abnormal; None: those on the `worse` end."""
    scale: Scale | None = None
    """The scale on which its noise is alike at every size; None: by the unit."""
    headline: Literal["Outcome", "Stage 1", "Stage 2", "Stage 3"] | None = None
    """The section of the one-screen summary that it appears in."""
    live: bool = False
    """Shown on the progress line of a training that runs: its largest value over places."""
    chart: Chart | None = None

    @property
    def key(self) -> str:
        """`table.name`: the name under which values, cadences and options refer to the metric."""
        return f"{self.table}.{self.name}"

    @property
    def abnormal_sides(self) -> Literal["high", "low", "both"]:
        """`sides`, with its default."""
        return self.sides or self.worse or "both"

    @property
    def noise_scale(self) -> Scale:
        """`scale`, with its default: logarithms of sizes, roots of shares and counts."""
        if self.scale is not None:
            return self.scale
        if self.unit in ("×", "1", "logit"):
            return "log"
        return "root" if self.unit in ("share", "hits") else "plain"


def metric(
    table: str,
    name: str,
    unit: str,
    reduce: Reduction | tuple[Reduction, Reduction],
    help: str,
    **more: Any,
) -> Metric:
    """Declare a metric; `reduce` is over micro-batches and ranks alike, or a pair of the two."""
    micro, ranks = (reduce, reduce) if isinstance(reduce, str) else reduce
    return Metric(table=table, name=name, unit=unit, micro=micro, ranks=ranks, help=help, **more)
