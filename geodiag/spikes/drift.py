"""Slow divergence: a level that climbs away from its best without ever jumping."""

from typing import Any, NamedTuple


class Climb(NamedTuple):
    onset: int
    best: float
    score: float


class Drift:
    """Compares a slow level with the best it has had. The best is forgotten at one σ in `memory`
    updates.
    """

    def __init__(self, *, limit: float, memory: float) -> None:
        self.limit, self.memory = limit, memory
        self.restart()

    def restart(self) -> None:
        """Forgets the best: the next level is it."""
        self.best: float | None = None
        self._onset = 0

    def update(self, step: int, level: float, sigma: float) -> Climb | None:
        """The climb, when the level has come `limit` σ above its best; the best then starts anew."""
        if self.best is None or level <= self.best + sigma:
            self._onset = step
        self.best = level if self.best is None else min(level, self.best + sigma / self.memory)
        if level - self.best <= self.limit * sigma:
            return None
        climb = Climb(self._onset, self.best, (level - self.best) / sigma)
        self.best = level
        return climb

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "onset": self._onset}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best, self._onset = state["best"], state["onset"]
