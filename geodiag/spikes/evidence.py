"""When is a rise a spike? Evidence builds up while the loss is out of its range, and drains while
it is in it.
"""

import math
from collections import deque
from itertools import pairwise
from typing import Any

from geodiag.spikes.sorted_window import SortedWindow


class Evidence:
    """Adds up how far updates lie out of range until a clear excess has lasted `hold` steps.

    `hold` updates in a row at `threshold` σ are exactly enough; weaker ones take longer, and
    however strong, updates that span fewer than `hold` steps never are. Where near misses are
    common (a share `tails` of updates), the noise has heavy tails, and one update alone proves
    nothing, however sparse the log. The gradient norm can only
    confirm: beside a gradient norm `threshold` σ above its own past, a loss out of its range counts
    as clear.
    """

    def __init__(
        self, *, threshold: float, normal: float, hold: int, noise: int, tails: float
    ) -> None:
        self.threshold, self.normal, self.hold, self.tails = threshold, normal, hold, tails
        self._enough = hold * (threshold - normal)
        self._sum = 0.0
        self._near_misses = 0.0
        self._steps: deque[int] = deque(maxlen=4)
        self._log_grads = SortedWindow(noise)
        self._memory = 4 * noise

    @property
    def last_step(self) -> int | None:
        return self._steps[-1] if self._steps else None

    def tick(self, step: int) -> None:
        """An update came at `step`."""
        self._steps.append(step)

    @property
    def interval(self) -> int:
        """Steps between updates lately, at most `hold`; one gap in the log does not change it."""
        steps = list(self._steps)
        apart = sorted(b - a for a, b in pairwise(steps))
        return min(max(apart[len(apart) // 2], 1), self.hold) if apart else 1

    def add(self, score: float, grad_norm: float | None) -> bool:
        """Adds an update's σ; True when it is enough for a spike."""
        if self.normal < score < self.threshold and self._grad_score(grad_norm) > self.threshold:
            score = self.threshold
        self._near_misses -= self._near_misses / self._memory
        # An update that stands for n steps weighs √n. One alone can do where updates are `hold`
        # steps apart; closer together, none may weigh so much that fewer than `hold` steps would
        # do.
        updates = math.ceil(self.hold / self.interval)
        if updates == 1 and self.hold > 1 and self._near_misses > self.tails:
            updates = 2
        most = 0.98 * self._enough / (updates - 1) if updates > 1 else math.inf
        weighed = math.sqrt(self.interval) * (score - self.normal)
        self._sum = max(0.0, self._sum + min(weighed, most))
        return self._sum >= self._enough

    def learn(self, grad_norm: float | None) -> None:
        """Takes the gradient norm of a normal update as normal."""
        if grad_norm is not None and math.isfinite(grad_norm) and grad_norm > 0:
            self._log_grads.push(math.log(grad_norm))

    def _grad_score(self, grad_norm: float | None) -> float:
        grads = self._log_grads
        if (
            grad_norm is None
            or not math.isfinite(grad_norm)
            or grad_norm <= 0
            or len(grads) < grads.size // 4
        ):
            return 0.0
        # Below 5 % of noise a gradient norm is as good as constant.
        return (math.log(grad_norm) - grads.median) / max(grads.sigma, 0.05)

    def near_miss(self) -> None:
        """The loss left its range, was never clear of it, and came back."""
        self._near_misses += 1 / self._memory

    def clear(self) -> None:
        self._sum = 0.0

    def restart(self) -> None:
        """Training went back: what came before says nothing about the spacing of updates."""
        self._sum = 0.0
        self._steps.clear()

    def state_dict(self) -> dict[str, Any]:
        return {
            "sum": self._sum,
            "near_misses": self._near_misses,
            "steps": list(self._steps),
            "log_grads": list(self._log_grads.values),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._sum, self._near_misses = state["sum"], state["near_misses"]
        self._steps = deque(state["steps"], maxlen=self._steps.maxlen)
        self._log_grads = SortedWindow(self._log_grads.size, state["log_grads"])
