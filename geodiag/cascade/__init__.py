"""The cascade behind a loss spike: which stage failed first, in which layer, and how it spread."""

from geodiag.cascade.explain import cascades, explain
from geodiag.cascade.stage_map import stage_map
from geodiag.cascade.types import Alternative, Cascade, Onset

__all__ = ["Alternative", "Cascade", "Onset", "cascades", "explain", "stage_map"]
