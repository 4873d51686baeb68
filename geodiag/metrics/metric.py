"""What is said of one recorded quantity: its name, unit, reductions, cadence, healthy range,
definition, source.
"""

from dataclasses import dataclass
from typing import Any, Literal

Reduction = Literal["mean", "max", "min", "sum", "last"]


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One recorded quantity: what it is called, measured in, and how it is put together."""

    name: str
    table: str
    unit: str
    micro: Reduction
    """How values of several micro-batches become one. Means are weighted by tokens."""
    ranks: Reduction
    every: int = 1
    """Default cadence, in steps."""
    healthy: tuple[float | None, float | None] | None = None
    """The range a healthy run stays in, where there is one for all models."""
    worse: Literal["high", "low"] | None = "high"
    """Which end is the bad one, so that `show` can name the worst layer."""
    stage: int | None = None
    """The stage of the tear cascade it is evidence for: 1 curvature, 2 chart, 3 amplification."""
    help: str
    source: str = "geodiag"


def metric(
    table: str,
    name: str,
    unit: str,
    reduce: Reduction | tuple[Reduction, Reduction],
    help: str,
    **more: Any,
) -> Metric:
    """A metric whose reduction over micro-batches and ranks is one, or a pair of them."""
    micro, ranks = (reduce, reduce) if isinstance(reduce, str) else reduce
    return Metric(table=table, name=name, unit=unit, micro=micro, ranks=ranks, help=help, **more)
