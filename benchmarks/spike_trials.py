"""Changed copies of the labelled curves: thinned, noisy, smoothed, cut, with planted events.

Each trial changes every curve and moves its labels along. The detector is not tuned on the trials.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from geodiag.benchmarks.spike_labels import Curve, Label
from geodiag.spikes.loss_curves import Update

_PLANTED_EVERY = 600
"""Rows between planted events."""


@dataclass(frozen=True)
class Trial:
    """A change of a curve; `change` returns None for a curve that is too short for it."""

    name: str
    change: Callable[[Curve], Curve | None]


def noise_of(loss: np.ndarray) -> float:
    """Return a robust σ of one update, from the differences of neighbours."""
    steps = np.diff(loss)
    return float(1.4826 * np.median(np.abs(steps - np.median(steps))) / 2**0.5)


def _keep_rows(curve: Curve, keep: np.ndarray) -> Curve:
    """Return these rows of the curve; a label moves to the next row that is kept."""

    def at(row: int) -> int:
        return min(int(np.searchsorted(keep, row)), len(keep) - 1)

    labels = [
        replace(label, onset=at(label.onset), breakout=at(label.breakout), end=at(label.end))
        for label in curve.labels
        if label.end >= keep[0]
    ]
    return replace(curve, updates=[curve.updates[i] for i in keep], labels=labels)


def one_in(n: int) -> Trial:
    """Keep one row in n."""
    return Trial(f"one update in {n}", lambda c: _keep_rows(c, np.arange(0, len(c.updates), n)))


def started_late(row: int) -> Trial:
    """Leave out all rows before `row`."""

    def change(curve: Curve) -> Curve | None:
        if len(curve.updates) < row + 200:
            return None
        late = [label for label in curve.labels if label.onset >= row + 20]
        return _keep_rows(replace(curve, labels=late), np.arange(row, len(curve.updates)))

    return Trial(f"from update {row} on", change)


def with_losses(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Trial:
    """Replace the losses by `change(losses)`."""

    def changed(curve: Curve) -> Curve:
        new = change(np.array([update.loss for update in curve.updates]))
        return replace(
            curve,
            updates=[Update(u.step, float(x)) for u, x in zip(curve.updates, new, strict=True)],
        )

    return Trial(name, changed)


def smoothed(factor: float) -> Trial:
    """Average the losses exponentially."""

    def average(loss: np.ndarray) -> np.ndarray:
        out = np.empty_like(loss)
        value = loss[0]
        for i, x in enumerate(loss):
            value = factor * value + (1 - factor) * x
            out[i] = value
        return out

    return with_losses(f"smoothed by {factor:g} before logging", average)


def noisy(sigmas: float) -> Trial:
    """Add normal noise of so many σ."""
    draw = np.random.default_rng(1)
    return with_losses(
        f"{sigmas:g} σ of noise added",
        lambda x: x + draw.normal(size=len(x)) * sigmas * noise_of(x),
    )


def with_nan(share: float) -> Trial:
    """Replace this share of the losses by NaN."""
    draw = np.random.default_rng(2)
    return with_losses(
        f"{100 * share:g} % NaN", lambda x: np.where(draw.random(len(x)) < share, np.nan, x)
    )


def learning_rate_kink(loss: np.ndarray) -> np.ndarray:
    """Let the loss fall faster from 60 % of the curve on, as after a change of learning rate."""
    way = np.arange(len(loss)) / len(loss)
    return loss - np.maximum(way - 0.6, 0) / 0.4 * 0.15 * loss[-1]


def epoch_cliffs(loss: np.ndarray) -> np.ndarray:
    """Lower the loss by 5 % every 1500 updates, as at the start of an epoch."""
    return loss - np.arange(len(loss)) // 1500 * 0.05 * loss[-1]


def planted(name: str, shape: Sequence[float], sigmas: float, spike: bool) -> Trial:
    """Plant events of one shape on the curves of groups C and D that log every step."""

    def change(curve: Curve) -> Curve | None:
        loss = np.array([update.loss for update in curve.updates])
        apart = np.median(np.diff([update.step for update in curve.updates]))
        if curve.group not in "CD" or apart > 1:
            return None
        labels: list[Label] = []
        for at in range(400, len(loss) - 100, _PLANTED_EVERY):
            near = loss[at - 200 : at + len(shape)]
            # Height above the local median: the noise of the update itself does not count.
            event = np.median(near) + sigmas * np.std(near - np.median(near)) * np.array(shape)
            loss[at : at + len(shape)] = np.maximum(loss[at : at + len(shape)], event)
            if spike:
                labels.append(Label("spike", at, at, at + len(shape)))
        updates = [Update(u.step, float(x)) for u, x in zip(curve.updates, loss, strict=True)]
        # The labels of the curve itself are no part of this trial.
        return replace(curve, updates=updates, labels=labels)

    return Trial(name, change)


DECAY = tuple(np.exp(-np.arange(40) / 8).tolist())
TRIALS = (
    *(one_in(2), one_in(5), started_late(500), started_late(2000)),
    with_losses("loss × 0.1", lambda x: 0.1 * x),
    with_losses("loss − 1.5", lambda x: x - 1.5),
    with_losses("printed with 2 digits", lambda x: np.round(x, 2)),
    *(noisy(0.5), noisy(1), with_nan(0.02), smoothed(0.5), smoothed(0.9)),
    with_losses("learning-rate kink", learning_rate_kink),
    with_losses("epoch cliffs", epoch_cliffs),
)
PLANTED = (
    planted("spikes of 8 σ", DECAY, 8, spike=True),
    planted("spikes of 20 σ", DECAY, 20, spike=True),
    planted("outliers of 1 update", (1.0,), 20, spike=False),
    planted("outliers of 2 updates", (1.0, 1.0), 20, spike=False),
)
