"""The normal behaviour of a loss: its level, its noise, and how much the log was smoothed.

Only normal updates are learned. Every statistic is a median or a quartile of a short window.
"""

from collections import deque
from typing import Any, NamedTuple

from geodiag.spikes.log_smoothing import LogSmoothing
from geodiag.spikes.sorted_window import SortedWindow, small_sample_factor

_MAX_SCORE = 1e9
"""Bound on scores, so that scores stay finite."""


class Excess(NamedTuple):
    """How far one loss is above the trend, in robust σ."""

    total: float
    innovation: float
    """The part that the previous loss does not predict. In a smoothed log, every value repeats most
    of the previous one. Equal to `total` in a log without smoothing.
    """


class Trend:
    """Running level and noise of a loss.

    `judge` returns how far a loss is above the trend; `learn` adds a normal loss to it.

    The level is the lower one of a short and a long running median. The short median follows a
    falling loss closely; the long median does not follow a rising one. The trend is never
    extrapolated, so that the end of a steep descent is not judged as a rise.
    """

    def __init__(
        self, *, long: int, short: int, noise: int, warmup: int, floor: float, smooth: float
    ) -> None:
        """The arguments are those of `SpikeDetector`."""
        self.warmup = warmup
        self.floor = floor
        self.smooth = smooth
        self._long = SortedWindow(long)
        self._short = SortedWindow(short)
        self._steps: deque[int] = deque(maxlen=long)
        self._residuals = SortedWindow(noise)
        self._smoothing = LogSmoothing(noise)
        self._last: float | None = None
        self._steep_descent = False
        """True after a descent so steep that it exceeded the noise while residuals were few."""

    @property
    def ready(self) -> bool:
        """True once enough updates were learned for a trend."""
        return len(self._long) >= self.warmup

    @property
    def level(self) -> float:
        """The normal loss."""
        # level = min(median of the last `long`, median of the last `short`)
        return min(self._long.median, self._short.median)

    @property
    def slow_level(self) -> float:
        """The long median alone: less noisy than `level`, for slow drift."""
        return self._long.median

    @property
    def sigma(self) -> float:
        """Noise of one update, at least `floor` times the level."""
        # Idea: the interquartile range of the residuals loss − level; outliers do not widen it.
        # σ = max(IQR / 1.349 · (1 + 8 / n) while n is small, floor · |level|)
        least = max(self.floor * abs(self.level), 1e-12)
        count = len(self._residuals)
        sigma = self._residuals.sigma
        if count < self._residuals.size:
            sigma = self._small_sample_sigma(sigma * small_sample_factor(count))
        if sigma < least:
            # A loss printed with few digits takes few values, and its quartiles coincide.
            # The largest normal residual then replaces them.
            return max(least, (self._residuals.largest - self._residuals.median) / 3)
        return sigma

    def _small_sample_sigma(self, sigma: float) -> float:
        """Return σ without the lag of the level, if the loss fell steeply."""
        # In a steep descent, residuals measure the lag of the level more than the noise.
        # Differences of consecutive losses have no such lag.
        if not self._steep_descent:
            return sigma
        return min(sigma, self._smoothing.noise_of_differences())

    def judge(self, loss: float) -> Excess | None:
        """Return how far `loss` is above the trend; None if there is no trend yet.

        Call it once for each update.
        """
        if not self.ready:
            return self._judge_early(loss)
        # z = (loss − level) / σ
        sigma = self.sigma
        total = (loss - self.level) / sigma
        innovation = self._innovation(loss, total, sigma)
        self._last = loss
        return Excess(_bounded(total), _bounded(innovation))

    def _innovation(self, loss: float, total: float, sigma: float) -> float:
        """Return the part of the excess that the previous loss does not predict, in σ."""
        # Idea: a log smoothed as y[t] = c y[t-1] + (1 − c) x[t] is an AR(1) process around its
        # level, so that the innovation is (y[t] − level) − c (y[t-1] − level), with standard
        # deviation σ √(1 − c²). Source: Box and Jenkins, Time Series Analysis, section 3.2.
        factor = self._smoothing.factor
        last = self._last
        if factor <= self.smooth or last is None:
            return total

        # If the log is not quite an exponential average, its differences are noisier than those of
        # one; their own σ is then the better estimate.
        innovation_sigma = max(
            sigma * (1 - factor * factor) ** 0.5,
            self._smoothing.difference_sigma * ((1 + factor) / 2) ** 0.5,
        )
        level = self.level
        innovation: float = (loss - level - factor * (last - level)) / innovation_sigma
        if loss < last:
            return min(innovation, 0.0)  # a falling loss is never new evidence
        return innovation

    def _judge_early(self, loss: float) -> Excess | None:
        """Return the excess over the largest loss so far, in ranges of the losses so far."""
        # Before there is a trend, only a loss far above all earlier ones can be detected.
        if len(self._long) < self.warmup // 4:
            return None
        top = self._long.largest
        scale = max(top - self._long.smallest, 0.1 * abs(top), 1e-12)
        score = _bounded((loss - top) / scale)
        return Excess(score, score)

    def learn(self, step: int, loss: float) -> None:
        """Add a normal loss to the trend."""
        residual = loss - (self.level if len(self._long) else loss)
        self._long.push(loss)
        self._short.push(loss)
        self._steps.append(step)
        self._residuals.push(residual)
        if (
            self._smoothing.learn(loss)
            and len(self._residuals) < self._residuals.size
            and self._smoothing.samples >= self.warmup
        ):
            self._steep_descent = self._steep_descent or self._smoothing.descent_exceeds_noise

    def skip(self) -> None:
        """Note that an update was not learned: differences must not span it."""
        self._smoothing.break_sequence()

    def forget_previous(self) -> None:
        """Stop predicting the next loss from the previous one."""
        self._smoothing.break_sequence()
        self._last = None

    def rewind_to(self, step: int) -> None:
        """Forget the losses of `step` and later, after a rollback; the noise estimate stays."""
        while self._steps and self._steps[-1] >= step:
            self._steps.pop()
        self._long.keep_oldest(len(self._steps))
        self._short = SortedWindow(self._short.size, self._long.values)
        self.forget_previous()

    def restart_from(self, updates: list[tuple[int, float]]) -> None:
        """Forget the trend, and learn it again from these (step, loss) pairs."""
        for window in (self._long, self._short, self._residuals):
            window.keep_oldest(0)
        self._steps.clear()
        self._smoothing.break_sequence()
        self._steep_descent = False
        for step, loss in updates:
            self.learn(step, loss)

    def state_dict(self) -> dict[str, Any]:
        """Return the state as JSON-able data."""
        return {
            "long": list(self._long.values),
            "short": list(self._short.values),
            "steps": list(self._steps),
            "residuals": list(self._residuals.values),
            "last": self._last,
            "fell": self._steep_descent,
            **self._smoothing.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state from `state_dict()`."""
        self._long = SortedWindow(self._long.size, state["long"])
        self._short = SortedWindow(self._short.size, state["short"])
        self._residuals = SortedWindow(self._residuals.size, state["residuals"])
        self._steps = deque(state["steps"], maxlen=self._steps.maxlen)
        self._last = state["last"]
        self._steep_descent = state["fell"]
        self._smoothing.load_state_dict(state)


def _bounded(score: float) -> float:
    return max(-_MAX_SCORE, min(score, _MAX_SCORE))
