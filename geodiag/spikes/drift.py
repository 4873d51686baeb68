"""Slow divergence: a level that climbs away from its minimum without ever jumping."""

from typing import Any, NamedTuple


class Climb(NamedTuple):
    """A slow rise of the level that exceeded the limit."""

    onset: int
    """Last step at which the level was within one σ of its minimum."""
    best: float
    """The minimum that the level climbed away from."""
    score: float
    """Height of the climb in σ."""


class DriftDetector:
    """Compares a slow level with its running minimum.

    Idea: a one-sided test on level − minimum, as in the Page-Hinkley test (Page 1954, Biometrika
    41). Unlike there, the minimum is forgotten: it rises by one σ in `memory` updates, so that a
    slow planned rise of the loss does not add up for ever.
    """

    def __init__(self, *, limit: float, memory: float) -> None:
        """
        limit: height in σ that is a divergence.
        memory: updates in which the minimum rises by one σ.
        """
        self.limit = limit
        self.memory = memory
        self.restart()

    def restart(self) -> None:
        """Forget the minimum; the next level becomes the new one."""
        self.best: float | None = None
        self._onset = 0

    def update(self, step: int, level: float, sigma: float) -> Climb | None:
        """Return the climb if `level` is more than `limit` σ above the minimum, else None.

        After a climb the minimum restarts at the present level.
        """
        if self.best is None or level <= self.best + sigma:
            self._onset = step

        # best[t] = min(level[t], best[t-1] + σ / memory)
        self.best = level if self.best is None else min(level, self.best + sigma / self.memory)
        if level - self.best <= self.limit * sigma:
            return None

        climb = Climb(self._onset, self.best, (level - self.best) / sigma)
        self.best = level
        return climb

    def state_dict(self) -> dict[str, Any]:
        """Return the state as JSON-able data."""
        return {"best": self.best, "onset": self._onset}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state from `state_dict()`."""
        self.best = state["best"]
        self._onset = state["onset"]
