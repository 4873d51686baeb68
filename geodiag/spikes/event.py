"""One thing that happened to a loss, and its making while it still happens."""

from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

Kind = Literal["spike", "outlier", "divergence", "nonfinite"]


@dataclass(frozen=True, kw_only=True)
class Spike:
    """One thing that happened to the loss."""

    kind: Kind
    """`spike`, `outlier` (over before it lasted), `divergence` (slow, or a spike that stayed),
    `nonfinite`.
    """
    detected: int
    """Step of the update that raised it."""
    onset: int
    """First step of the sustained rise."""
    peak: int | None
    """Step of the largest loss so far."""
    end: int | None
    """Step at which the loss was back in its range, was taken as the new normal, or that a rollback
    went to.
    """
    score: float
    """Robust σ above the trend at the worst update; infinite for `nonfinite`."""


class Row(NamedTuple):
    """One judged update."""

    step: int
    loss: float
    score: float


@dataclass
class OpenSpike:
    """A spike that is still going on: its peak and score can grow."""

    kind: Kind
    detected: int
    onset: int
    peak: int
    largest: float
    score: float

    @classmethod
    def over(cls, kind: Kind, rows: list[Row]) -> "OpenSpike":
        """Raised at the last of these rows, which began at the first."""
        worst = max(rows, key=lambda row: row.loss)
        score = max(row.score for row in rows)
        return cls(kind, rows[-1].step, rows[0].step, worst.step, worst.loss, score)

    def grow(self, row: Row) -> None:
        self.score = max(self.score, row.score)
        if row.loss > self.largest:
            self.peak, self.largest = row.step, row.loss

    def at(self, end: int | None) -> Spike:
        """As it stands, or as it ended."""
        return Spike(
            kind=self.kind,
            detected=self.detected,
            onset=self.onset,
            peak=self.peak,
            end=end,
            score=self.score,
        )

    def state_dict(self) -> dict[str, Any]:
        # JSON knows neither infinity nor NaN, and only a non-finite loss has them.
        return asdict(self) | ({"largest": None, "score": None} if self.kind == "nonfinite" else {})

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "OpenSpike":
        finite = (
            {"largest": float("inf"), "score": float("inf")} if state["kind"] == "nonfinite" else {}
        )
        return cls(**(state | finite))
