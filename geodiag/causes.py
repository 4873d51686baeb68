"""Causes that lie in no layer: the batch, and the learning rate."""

from dataclasses import dataclass

import numpy as np

from geodiag.run import Run
from geodiag.stage_map import Judged
from geodiag.tracks import rows_of_attempt

KINK = 1.3
"""A learning rate this many times what its schedule leads to is a kink."""
_FULL = 0.3
"""Rise of a domain's share of the tokens that is no chance."""
REACH = 24
"""Steps that a learning rate may have been too high before the first layer, or else the loss, leaves its range."""
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
            return Kink(row=i, value=float(now), usual=float(led_to))
    return None


def domain_of(run: Run, window: Judged, row: int, attempt: int | None, after: int = 5) -> str | None:
    """The domain that the batches from row `row` on are suddenly full of; None where none is, or none were named."""
    if row >= len(window.step_S):
        return None
    at, last = int(window.step_S[row]), int(window.step_S[min(row + after, len(window.step_S) - 1)])
    rows = rows_of_attempt(run, "domains", ["domain", "tokens"], max(0, at - 64), last, attempt)
    step, tokens = rows["step"].to_numpy(), rows["tokens"].to_numpy()
    names = np.array(rows["domain"].to_pylist(), object)
    now, before = step >= at, step < at
    if not now.any() or not before.any():
        return None

    def share(of: np.ndarray, name: str) -> float:
        return float(np.nansum(tokens[of & (names == name)]) / max(np.nansum(tokens[of]), 1.0))

    rise = {n: share(now, n) - share(before, n) for n in set(names[now])}
    most = max(rise, key=lambda n: rise[n])
    return str(most) if rise[most] > _FULL else None
