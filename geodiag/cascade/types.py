"""The parts of a cascade: onsets, alternatives, evidence, and the whole."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from geodiag.cascade.defence import Stage
from geodiag.cascade.evidence import Evidence
from geodiag.jsonable import jsonable

Cause = Literal["layer", "lr", "data"]


@dataclass(frozen=True, kw_only=True)
class Onset:
    """A place that left its range: one point on the path from the origin to the loss."""

    stage: Stage
    """None for the loss itself."""
    layer: int | None
    site: str | None
    expert: int | None
    step: int
    score: float
    metric: str


@dataclass(frozen=True, kw_only=True)
class Alternative:
    """Another possible origin, less likely."""

    stage: Stage
    layer: int | None
    site: str | None
    expert: int | None
    onset: int
    confidence: float
    why: str
    """Why it is less likely."""


@dataclass(frozen=True, kw_only=True)
class Cascade:
    """The answer to "where did it start, and what would have stopped it?"."""

    spike: dict[str, Any] | None
    """The fields of the spike; None if the step to explain has no spike."""
    spike_onset: int
    """The step at which the loss left its trend, or the step to explain."""
    stage: Stage
    """1 local curvature, 2 routing instability, 3 amplification, "data" the batch; None if the
    cause is not in a layer or the batch.
    """
    layer: int | None
    site: str | None
    expert: int | None
    domain: str | None
    onset: int | None
    """The step at which the origin left its range; None if there is no internal precursor."""
    lead: int | None
    """Steps from the onset to the loss."""
    cause: Cause | None
    confidence: float
    """How much better this answer is than the next one, 0 to 1."""
    defence: str | None
    """The suggested fix."""
    evidence: tuple[Evidence, ...]
    alternatives: tuple[Alternative, ...]
    path: tuple[Onset, ...]
    """How the cascade spread, in time: the origin first, the loss last."""
    words: str
    """The answer in one to four sentences."""
    caveats: tuple[str, ...]
    """Gaps in the record that make the answer less certain."""

    def as_json(self) -> dict[str, Any]:
        """Return all fields as plain data, null where unknown."""
        data: dict[str, Any] = jsonable(asdict(self))
        data["evidence"] = [e.as_json() for e in self.evidence]
        return data
