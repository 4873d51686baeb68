"""What a cascade is made of: onsets, alternatives, evidence, and the whole."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from geodiag.cascade.defence import Stage
from geodiag.cascade.evidence import Evidence
from geodiag.jsonable import jsonable


@dataclass(frozen=True, kw_only=True)
class Onset:
    """A place that left its range: one knot of the path from the origin to the loss."""

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
    """Another origin that the record allows, less likely."""

    stage: Stage
    layer: int | None
    site: str | None
    expert: int | None
    onset: int
    confidence: float
    why: str


@dataclass(frozen=True, kw_only=True)
class Cascade:
    """The answer to "where did it start, and what would have stopped it?"."""

    spike: dict[str, Any] | None
    """kind, onset, detected, peak, end; None where a step was asked about at which the loss did not
    spike.
    """
    spike_onset: int
    """The step at which the loss left its trend, or that was asked about."""
    stage: Stage
    """1 curvature, 2 chart, 3 amplification, "data" the batch; None where no layer began it."""
    layer: int | None
    site: str | None
    expert: int | None
    domain: str | None
    onset: int | None
    """The step at which the origin left its range; None where there is no internal precursor."""
    lead: int | None
    """Steps from there to the loss."""
    cause: Literal["layer", "lr", "data"] | None
    confidence: float
    """How much better this answer is than the next, 0 to 1."""
    defence: str | None
    evidence: tuple[Evidence, ...]
    alternatives: tuple[Alternative, ...]
    path: tuple[Onset, ...]
    """How it spread, in time: the origin first, the loss last."""
    words: str
    caveats: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """Everything as plain data, null where nothing is known."""
        said = jsonable(asdict(self))
        said["evidence"] = [e.as_json() for e in self.evidence]
        return said
