"""What a loss normally does: its trend, its noise, and how smooth somebody made it before logging
it.

Only normal updates are learned. Every statistic is a median or a quartile of a short window.
"""

from collections import deque
from typing import Any, NamedTuple

from geodiag.spikes.sorted_window import SortedWindow

_APART = 4
"""Smoothness shows in how differences grow from 1 update apart to this many."""
_YOUNG = 8.0
"""Residuals by which a young noise estimate is doubted: of n, σ is taken to be larger by the factor
1 + 8 / n.
"""
_FURTHEST = 1e9
"""No score is larger, so that scores stay finite."""


class Excess(NamedTuple):
    """How far one loss lies above the trend, in robust σ."""

    total: float
    fresh: float
    """The part that the update before does not explain. In a smoothed log every update carries most
    of the last one.
    """


class Trend:
    """The running trend and noise of a loss. `judge` says how far a loss is off; `learn` takes it
    as normal.

    The level is the lower of a short and a long median: the short one follows a falling loss
    closely, the long one does not follow a rising one. Nothing is extrapolated, so a kink in the
    descent is not a rise.
    """

    def __init__(
        self, *, long: int, short: int, noise: int, warmup: int, floor: float, smooth: float
    ) -> None:
        self.warmup, self.floor, self.smooth = warmup, floor, smooth
        self._long, self._short = SortedWindow(long), SortedWindow(short)
        self._steps: deque[int] = deque(maxlen=long)
        self._residuals, self._near, self._apart = (
            SortedWindow(noise),
            SortedWindow(noise),
            SortedWindow(noise),
        )
        self._unbroken: deque[float] = deque(maxlen=_APART + 1)
        self._last: float | None = None
        self._carry, self._carried = 0.0, noise // 4  # taken as unsmoothed until shown
        self._fell = False
        """Whether the loss has fallen so steeply that this drowned the noise, while residuals were
        still few.
        """

    @property
    def ready(self) -> bool:
        return len(self._long) >= self.warmup

    @property
    def level(self) -> float:
        return min(self._long.median, self._short.median)

    @property
    def slow_level(self) -> float:
        """The level without the short median's noise, for slow drift."""
        return self._long.median

    @property
    def sigma(self) -> float:
        """Noise of one update, never below `floor` of the level."""
        least = max(self.floor * abs(self.level), 1e-12)
        sigma, known = self._residuals.sigma, len(self._residuals)
        if known < self._residuals.size:
            sigma = self._young_sigma(sigma * (1 + _YOUNG / known))
        if sigma < least:
            # A loss printed with few digits takes few values and has no quartiles: then go by the
            # largest normal one.
            return max(least, (self._residuals.largest - self._residuals.median) / 3)
        return sigma

    def _young_sigma(self, sigma: float) -> float:
        # Residuals of a steep descent are the level's lag more than noise. Differences have no
        # level to lag behind; those over `_APART` updates hold most of the noise of a smoothed log
        # too.
        if not self._fell:
            return sigma
        steady = max(self._near.sigma, self._apart.sigma) / 2**0.5
        return min(sigma, steady * (1 + _YOUNG / len(self._apart)))

    def judge(self, loss: float) -> Excess | None:
        """How far `loss` is above the trend; None before there is a trend. Call once an update."""
        if not self.ready:
            return self._judge_early(loss)
        level, sigma, last, carry = self.level, self.sigma, self._last, self._carry
        total = fresh = (loss - level) / sigma
        if carry > self.smooth and last is not None:
            # Where the log is not quite an exponential average, its differences are noisier than
            # one would have.
            new_sigma = max(
                sigma * (1 - carry * carry) ** 0.5, self._near.sigma * ((1 + carry) / 2) ** 0.5
            )
            fresh = (loss - level - carry * (last - level)) / new_sigma
            if loss < last:
                fresh = min(fresh, 0.0)  # a decay, whatever its pace, is nothing new
        self._last = loss
        return Excess(_bounded(total), _bounded(fresh))

    def _judge_early(self, loss: float) -> Excess | None:
        # Too few updates for a trend: only what towers over everything so far can be told.
        if len(self._long) < self.warmup // 4:
            return None
        top = self._long.largest
        scale = max(top - self._long.smallest, 0.1 * abs(top), 1e-12)
        score = _bounded((loss - top) / scale)
        return Excess(score, score)

    def learn(self, step: int, loss: float) -> None:
        """Takes `loss` as normal."""
        residual = loss - (self.level if len(self._long) else loss)
        self._long.push(loss)
        self._short.push(loss)
        self._steps.append(step)
        self._residuals.push(residual)
        self._unbroken.append(loss)
        if len(self._unbroken) > 1:
            self._near.push(loss - self._unbroken[-2])
        if len(self._unbroken) > _APART:
            self._apart.push(loss - self._unbroken[0])
            self._update_carry()
            if len(self._residuals) < self._residuals.size and len(self._apart) >= self.warmup:
                self._fell = self._fell or -self._apart.median > self._apart.sigma

    def _update_carry(self) -> None:
        # For an exponential average with factor c, Var(x[t+4] - x[t]) / Var(x[t+1] - x[t]) = 1 + c
        # + c² + c³; for an unsmoothed loss it is 1. A descent that drowns the noise looks smooth
        # too, and tells nothing.
        near = self._near.sigma
        if len(self._apart) >= self._apart.size // 4 and near > abs(self._apart.median):
            carry = _solve_carry((self._apart.sigma / near) ** 2)
            self._carried = min(self._carried + 1, 4 * self._near.size)
            self._carry += (carry - self._carry) / self._carried

    def skip(self) -> None:
        """An update was not learned: differences must not span it."""
        self._unbroken.clear()

    def lose_thread(self) -> None:
        """What came before does not carry over into the next update."""
        self._unbroken.clear()
        self._last = None

    def forget_from(self, step: int) -> None:
        """Training goes back to `step`: losses of that step and later ones are forgotten, the noise
        is not.
        """
        while self._steps and self._steps[-1] >= step:
            self._steps.pop()
        self._long.keep_oldest(len(self._steps))
        self._short = SortedWindow(self._short.size, self._long.values)
        self.lose_thread()

    def adopt(self, rows: list[tuple[int, float]]) -> None:
        """Takes these (step, loss) rows as all there is to know: the new normal."""
        for window in (self._long, self._short, self._residuals):
            window.keep_oldest(0)
        self._steps.clear()
        self._unbroken.clear()
        self._fell = False
        for step, loss in rows:
            self.learn(step, loss)

    def state_dict(self) -> dict[str, Any]:
        return {
            "long": list(self._long.values),
            "short": list(self._short.values),
            "steps": list(self._steps),
            "residuals": list(self._residuals.values),
            "near": list(self._near.values),
            "apart": list(self._apart.values),
            "unbroken": list(self._unbroken),
            "last": self._last,
            "carry": self._carry,
            "carried": self._carried,
            "fell": self._fell,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in ("long", "short", "residuals", "near", "apart"):
            window: SortedWindow = getattr(self, f"_{name}")
            setattr(self, f"_{name}", SortedWindow(window.size, state[name]))
        self._steps = deque(state["steps"], maxlen=self._steps.maxlen)
        self._unbroken = deque(state["unbroken"], maxlen=self._unbroken.maxlen)
        self._last, self._carry, self._carried = state["last"], state["carry"], state["carried"]
        self._fell = state["fell"]


def _solve_carry(ratio: float) -> float:
    """c ≥ 0 with 1 + c + c² + c³ = ratio, by Newton's method from the chord."""
    if ratio <= 1:
        return 0.0
    if ratio >= _APART:
        return 0.99
    c = (ratio - 1) / (_APART - 1)
    for _ in range(3):
        c -= ((1 + c) * (1 + c * c) - ratio) / (1 + 2 * c + 3 * c * c)
    return c


def _bounded(score: float) -> float:
    return max(-_FURTHEST, min(score, _FURTHEST))
