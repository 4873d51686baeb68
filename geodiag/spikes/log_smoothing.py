"""How much a loss was smoothed before it was logged, measured from differences of the log."""

from collections import deque
from typing import Any

from geodiag.spikes.sorted_window import SortedWindow, small_sample_factor

_LAG = 4
"""Updates between the two losses of a long difference."""


class LogSmoothing:
    """Running estimate of the factor c of a log that is an exponential average.

    Idea: in y[t] = c y[t-1] + (1 − c) x[t], differences grow with their lag:
    Var(y[t+4] − y[t]) / Var(y[t+1] − y[t]) = (1 − c⁴) / (1 − c) = 1 + c + c² + c³,
    from the autocovariance Cov(y[t], y[t+k]) ∝ cᵏ of an AR(1) process (Box and Jenkins, section
    3.2). The ratio is 1 for an unsmoothed loss.
    """

    def __init__(self, noise: int) -> None:
        """noise: number of differences in each estimate."""
        self._short_differences = SortedWindow(noise)
        self._long_differences = SortedWindow(noise)
        self._consecutive: deque[float] = deque(maxlen=_LAG + 1)
        self.factor = 0.0
        """c; 0 for an unsmoothed log."""
        self._estimates = noise // 4  # weight of the initial assumption that c = 0

    @property
    def samples(self) -> int:
        """Number of long differences seen so far, at most the window."""
        return len(self._long_differences)

    @property
    def difference_sigma(self) -> float:
        """σ of the difference of two consecutive losses."""
        return self._short_differences.sigma

    @property
    def descent_exceeds_noise(self) -> bool:
        """True if the median fall over `_LAG` updates is larger than its noise."""
        return -self._long_differences.median > self._long_differences.sigma

    def noise_of_differences(self) -> float:
        """Return the noise of one loss, estimated from differences."""
        # σ(difference) = √2 σ(loss) for independent noise. Long differences also contain most of
        # the noise of a smoothed log.
        sigma = max(self._short_differences.sigma, self._long_differences.sigma) / 2**0.5
        return sigma * small_sample_factor(len(self._long_differences))

    def learn(self, loss: float) -> bool:
        """Add the loss of the next update; return True if a long difference could be formed."""
        self._consecutive.append(loss)
        if len(self._consecutive) > 1:
            self._short_differences.push(loss - self._consecutive[-2])
        if len(self._consecutive) <= _LAG:
            return False
        self._long_differences.push(loss - self._consecutive[0])
        self._update_factor()
        return True

    def _update_factor(self) -> None:
        """Average a new estimate into the factor."""
        long, short = self._long_differences, self._short_differences.sigma
        # A descent that exceeds the noise makes differences grow with their lag too, but is no
        # smoothing: skip the estimate.
        if len(long) < long.size // 4 or short <= abs(long.median):
            return
        estimate = _solve_factor((long.sigma / short) ** 2)
        self._estimates = min(self._estimates + 1, 4 * long.size)
        self.factor += (estimate - self.factor) / self._estimates

    def break_sequence(self) -> None:
        """Forget the latest losses: the next update does not follow on them."""
        self._consecutive.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return the state as JSON-able data."""
        return {
            "near": list(self._short_differences.values),
            "apart": list(self._long_differences.values),
            "unbroken": list(self._consecutive),
            "carry": self.factor,
            "carried": self._estimates,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state from `state_dict()`."""
        size = self._short_differences.size
        self._short_differences = SortedWindow(size, state["near"])
        self._long_differences = SortedWindow(size, state["apart"])
        self._consecutive = deque(state["unbroken"], maxlen=_LAG + 1)
        self.factor = state["carry"]
        self._estimates = state["carried"]


def _solve_factor(ratio: float) -> float:
    """Return c ≥ 0 with 1 + c + c² + c³ = `ratio`, by three steps of Newton's method."""
    if ratio <= 1:
        return 0.0
    if ratio >= _LAG:
        return 0.99
    c = (ratio - 1) / (_LAG - 1)  # start on the chord between c = 0 and c = 1
    for _ in range(3):
        c -= ((1 + c) * (1 + c * c) - ratio) / (1 + 2 * c + 3 * c * c)
    return c
