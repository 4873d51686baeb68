"""Causes that lie in no layer: the batch, and the learning rate."""

from dataclasses import dataclass

import numpy as np

from geodiag.stage_map import Judged

KINK = 1.3
"""A learning rate this many times what its schedule leads to is a kink."""
OWN = 20.0
"""Strength from which a layer that moved before the learning rate did is the origin all the same."""


@dataclass(frozen=True, kw_only=True)
class Kink:
    """A learning rate that left its own schedule."""

    row: int
    value: float
    usual: float

    @property
    def ratio(self) -> float:
        return self.value / self.usual if self.usual > 0 else np.inf


def lr_kink(window: Judged, first: int, last: int) -> Kink | None:
    """The first step from row `first` to `last` whose learning rate lies well above where the last two point."""
    lr = window.tracks.outcome.get("lr", np.full(len(window.step_S), np.nan))
    for i in range(max(first, 2), min(last, len(lr) - 1) + 1):
        before, last_lr, now = lr[i - 2], lr[i - 1], lr[i]
        if not (np.isfinite([before, last_lr, now]).all() and last_lr > 0):
            continue
        led_to = max(last_lr + max(last_lr - before, 0.0), last_lr)
        if now > KINK * led_to:
            return Kink(row=i, value=float(now), usual=float(last_lr))
    return None
