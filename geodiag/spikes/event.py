"""Spike events: a finished or current spike, and the mutable record of an open one."""

from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

Kind = Literal["spike", "outlier", "divergence", "nonfinite"]


@dataclass(frozen=True, kw_only=True)
class Spike:
    """One abnormal stretch of the loss."""

    kind: Kind
    """`spike`; `outlier` (too short for a spike); `divergence` (a slow climb, or a spike whose loss
    stayed high); `nonfinite`.
    """
    detected: int
    """Step of the update at which the detector raised it."""
    onset: int
    """First step of the sustained rise."""
    peak: int | None
    """Step of the largest loss so far."""
    end: int | None
    """Step at which the loss was back in its range or its new level was accepted as normal, or the
    step that a rollback returned to. None while the spike is open.
    """
    score: float
    """Largest robust σ above the trend; infinite for `nonfinite`."""


class ScoredUpdate(NamedTuple):
    """One update of the training with its score."""

    step: int
    loss: float
    score: float
    """Robust σ above the trend."""


@dataclass
class OpenSpike:
    """A spike that has not ended: its peak and its score can still grow."""

    kind: Kind
    detected: int
    onset: int
    peak: int
    largest: float
    """Largest loss so far, the loss of step `peak`."""
    score: float

    @classmethod
    def from_updates(cls, kind: Kind, updates: list[ScoredUpdate]) -> "OpenSpike":
        """Open a spike that began at the first of `updates` and is detected at the last."""
        worst = max(updates, key=lambda update: update.loss)
        score = max(update.score for update in updates)
        return cls(kind, updates[-1].step, updates[0].step, worst.step, worst.loss, score)

    def extend(self, update: ScoredUpdate) -> None:
        """Add one more update, and move the peak if its loss is the largest."""
        self.score = max(self.score, update.score)
        if update.loss > self.largest:
            self.peak = update.step
            self.largest = update.loss

    def as_spike(self, end: int | None) -> Spike:
        """Return the spike so far; `end` is None while it is open."""
        return Spike(
            kind=self.kind,
            detected=self.detected,
            onset=self.onset,
            peak=self.peak,
            end=end,
            score=self.score,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the state as JSON-able data."""
        # JSON has neither infinity nor NaN, and only a non-finite loss needs them.
        return asdict(self) | ({"largest": None, "score": None} if self.kind == "nonfinite" else {})

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "OpenSpike":
        """Restore an open spike from `state_dict()`."""
        finite = (
            {"largest": float("inf"), "score": float("inf")} if state["kind"] == "nonfinite" else {}
        )
        return cls(**(state | finite))
