"""The same curves made harder: would the detector have done as well on logs that nobody wrote in
this way?

Each trial changes every curve and moves the labels along. Nothing is tuned on them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from geodiag.spikes.loss_curves import Update

if TYPE_CHECKING:
    from geodiag.benchmarks.spikes import Curve

_APART = 600
"""Rows between planted events."""


@dataclass(frozen=True)
class Trial:
    """What is done to a curve; None for curves that it leaves nothing of."""

    name: str
    change: "Callable[[Curve], Curve | None]"


def noise_of(loss: np.ndarray) -> float:
    """Robust σ of one update, from differences of neighbours."""
    steps = np.diff(loss)
    return float(1.4826 * np.median(np.abs(steps - np.median(steps))) / 2**0.5)


def _kept(curve: "Curve", keep: np.ndarray) -> "Curve":
    """These rows of the curve; a label moves to the first row that is left."""

    def at(row: int) -> int:
        return min(int(np.searchsorted(keep, row)), len(keep) - 1)

    labels = [
        replace(label, onset=at(label.onset), breakout=at(label.breakout), end=at(label.end))
        for label in curve.labels
        if label.end >= keep[0]
    ]
    return replace(curve, updates=[curve.updates[i] for i in keep], labels=labels)


def every(n: int) -> Trial:
    return Trial(f"one update in {n}", lambda c: _kept(c, np.arange(0, len(c.updates), n)))


def begun(row: int) -> Trial:
    """The detector sees the curve from `row` on only."""

    def change(curve: "Curve") -> "Curve | None":
        if len(curve.updates) < row + 200:
            return None
        late = [label for label in curve.labels if label.onset >= row + 20]
        return _kept(replace(curve, labels=late), np.arange(row, len(curve.updates)))

    return Trial(f"from update {row} on", change)


def losses(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Trial:
    """Another loss in every row."""

    def changed(curve: "Curve") -> "Curve":
        new = change(np.array([update.loss for update in curve.updates]))
        return replace(
            curve,
            updates=[Update(u.step, float(x)) for u, x in zip(curve.updates, new, strict=True)],
        )

    return Trial(name, changed)


def smoothed(factor: float) -> Trial:
    def average(loss: np.ndarray) -> np.ndarray:
        out, value = np.empty_like(loss), loss[0]
        for i, x in enumerate(loss):
            value = factor * value + (1 - factor) * x
            out[i] = value
        return out

    return losses(f"smoothed by {factor:g} before logging", average)


def noisy(sigmas: float) -> Trial:
    draw = np.random.default_rng(1)
    return losses(
        f"{sigmas:g} σ of noise added",
        lambda x: x + draw.normal(size=len(x)) * sigmas * noise_of(x),
    )


def broken(share: float) -> Trial:
    draw = np.random.default_rng(2)
    return losses(
        f"{100 * share:g} % NaN", lambda x: np.where(draw.random(len(x)) < share, np.nan, x)
    )


def cooldown(loss: np.ndarray) -> np.ndarray:
    """A learning-rate kink: from 60 % of the way on the loss falls faster."""
    way = np.arange(len(loss)) / len(loss)
    return loss - np.maximum(way - 0.6, 0) / 0.4 * 0.15 * loss[-1]


def cliffs(loss: np.ndarray) -> np.ndarray:
    """Epochs: every 1500 updates the loss steps down by 5 %."""
    return loss - np.arange(len(loss)) // 1500 * 0.05 * loss[-1]


def planted(name: str, shape: Sequence[float], sigmas: float, spike: bool) -> Trial:
    """Events of one shape on the healthy and the noisy curves that log every step."""

    def change(curve: "Curve") -> "Curve | None":
        from geodiag.benchmarks.spikes import Label

        loss = np.array([update.loss for update in curve.updates])
        apart = np.median(np.diff([update.step for update in curve.updates]))
        if curve.group not in "CD" or apart > 1:
            return None
        labels: list[Label] = []
        for at in range(400, len(loss) - 100, _APART):
            near = loss[at - 200 : at + len(shape)]
            # Above the trend where it stands, whatever this one update's own noise was.
            event = np.median(near) + sigmas * np.std(near - np.median(near)) * np.array(shape)
            loss[at : at + len(shape)] = np.maximum(loss[at : at + len(shape)], event)
            if spike:
                labels.append(Label("spike", at, at, at + len(shape)))
        updates = [Update(u.step, float(x)) for u, x in zip(curve.updates, loss, strict=True)]
        # Blips of the curve's own are no part of this trial.
        return replace(curve, updates=updates, labels=labels)

    return Trial(name, change)


DECAY = tuple(np.exp(-np.arange(40) / 8).tolist())
TRIALS = (
    *(every(2), every(5), begun(500), begun(2000)),
    losses("loss × 0.1", lambda x: 0.1 * x),
    losses("loss − 1.5", lambda x: x - 1.5),
    losses("printed with 2 digits", lambda x: np.round(x, 2)),
    *(noisy(0.5), noisy(1), broken(0.02), smoothed(0.5), smoothed(0.9)),
    losses("learning-rate kink", cooldown),
    losses("epoch cliffs", cliffs),
)
PLANTED = (
    planted("spikes of 8 σ", DECAY, 8, spike=True),
    planted("spikes of 20 σ", DECAY, 20, spike=True),
    planted("outliers of 1 update", (1.0,), 20, spike=False),
    planted("outliers of 2 updates", (1.0, 1.0), 20, spike=False),
)
