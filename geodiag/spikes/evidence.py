"""Evidence accumulation: how long and how far the loss must be out of range to be a spike."""

import math
from collections import deque
from itertools import pairwise
from typing import Any

from geodiag.spikes.sorted_window import SortedWindow

_LEAST_GRAD_SIGMA = 0.05
"""A gradient norm with less than 5 % of noise counts as constant."""


class EvidenceAccumulator:
    """Sums how far updates are out of range until a clear excess has lasted `hold` steps.

    Exactly `hold` updates in a row at `threshold` σ are enough. Weaker excesses take longer, and
    updates that span fewer than `hold` steps are never enough, however large they are. If near
    misses are common (more than a share `tails` of the updates), the noise has heavy tails, and a
    single update is never enough, even in a sparse log.

    The gradient norm can only confirm a spike: if it is `threshold` σ above its own past, a loss
    that is merely out of range counts as a clear excess.
    """

    def __init__(
        self, *, threshold: float, normal: float, hold: int, noise: int, tails: float
    ) -> None:
        """The arguments are those of `SpikeDetector`."""
        self.threshold = threshold
        self.normal = normal
        self.hold = hold
        self.tails = tails
        self._enough = hold * (threshold - normal)
        self._sum = 0.0
        self._near_misses = 0.0
        self._steps: deque[int] = deque(maxlen=4)
        self._log_grads = SortedWindow(noise)
        self._memory = 4 * noise

    @property
    def last_step(self) -> int | None:
        """The step of the newest update; None before the first."""
        return self._steps[-1] if self._steps else None

    def record_step(self, step: int) -> None:
        """Record the step of an update, from which `interval` is measured."""
        self._steps.append(step)

    @property
    def interval(self) -> int:
        """Recent number of steps between updates, at most `hold`.

        It is a median of three, so that one gap in the log does not change it.
        """
        steps = list(self._steps)
        distances = sorted(b - a for a, b in pairwise(steps))
        if not distances:
            return 1
        return min(max(distances[len(distances) // 2], 1), self.hold)

    def add(self, score: float, grad_norm: float | None) -> bool:
        """Add the score of an update; return True if the evidence is enough for a spike."""
        if self.normal < score < self.threshold and self._grad_score(grad_norm) > self.threshold:
            score = self.threshold
        self._near_misses -= self._near_misses / self._memory

        # One update alone can be enough only if updates are `hold` steps apart. Otherwise its
        # weight is limited, so that at least `updates` of them are needed.
        updates = math.ceil(self.hold / self.interval)
        if updates == 1 and self.hold > 1 and self._near_misses > self.tails:
            updates = 2
        most = 0.98 * self._enough / (updates - 1) if updates > 1 else math.inf

        # Idea: a one-sided cumulative sum (CUSUM), S[t] = max(0, S[t-1] + w (z[t] − normal)),
        # alarm at S ≥ hold (threshold − normal). Source: Page 1954, Biometrika 41.
        # w = √n for an update that stands for n steps: the error of a mean of n falls as 1/√n.
        weighted = math.sqrt(self.interval) * (score - self.normal)
        self._sum = max(0.0, self._sum + min(weighted, most))
        return self._sum >= self._enough

    def learn(self, grad_norm: float | None) -> None:
        """Add the gradient norm of a normal update to the window of normal ones."""
        if grad_norm is not None and math.isfinite(grad_norm) and grad_norm > 0:
            self._log_grads.push(math.log(grad_norm))

    def _grad_score(self, grad_norm: float | None) -> float:
        """Return the robust σ of log(gradient norm) above its median; 0 if unknown."""
        grads = self._log_grads
        if (
            grad_norm is None
            or not math.isfinite(grad_norm)
            or grad_norm <= 0
            or len(grads) < grads.size // 4
        ):
            return 0.0
        return (math.log(grad_norm) - grads.median) / max(grads.sigma, _LEAST_GRAD_SIGMA)

    def add_near_miss(self) -> None:
        """Count a near miss: the loss left its range but returned without a clear excess."""
        self._near_misses += 1 / self._memory

    def clear(self) -> None:
        """Drop the summed evidence."""
        self._sum = 0.0

    def restart(self) -> None:
        """Drop the summed evidence and the spacing of updates, after a rollback."""
        self._sum = 0.0
        self._steps.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return the state as JSON-able data."""
        return {
            "sum": self._sum,
            "near_misses": self._near_misses,
            "steps": list(self._steps),
            "log_grads": list(self._log_grads.values),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state from `state_dict()`."""
        self._sum = state["sum"]
        self._near_misses = state["near_misses"]
        self._steps = deque(state["steps"], maxlen=self._steps.maxlen)
        self._log_grads = SortedWindow(self._log_grads.size, state["log_grads"])
