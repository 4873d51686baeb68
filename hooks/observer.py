"""What one step means, told from its host values alone: spike verdict, stage scores, worst places."""

import math
from dataclasses import dataclass, field

import numpy as np

from geodiag.hooks.rows import Host, Places, series_of
from geodiag.scores import Scores
from geodiag.spikes import SpikeDetector, Verdict

WATCHED = ("composite_gain_fwd", "composite_gain_bwd", "flip_rate", "flip_rate_router", "clamp_gate_rate")


@dataclass(frozen=True, kw_only=True)
class Observation:
    """One completed step, as the controller and the progress line see it."""

    step: int
    loss: float
    grad_norm: float | None
    verdict: Verdict
    stages: dict[int, float]
    worst: dict[str, float] = field(default_factory=dict)
    """Largest value over places of the metrics people watch while training."""


class Observer:
    """Feeds the spike detector and the stage scores, in step order."""

    def __init__(self, places: Places) -> None:
        self.detector, self.scores = SpikeDetector(), Scores()
        self._places = places
        self._keys: dict[str, int] = {}
        """Group of host values → how many series it is; in the order of the scores."""

    def observe(self, step: int, host: Host) -> Observation:
        loss, grad_norm = float(host["loss"][0]), _number(host.get("grad_norm"))
        verdict = self.detector.update(step, loss, grad_norm)
        self._meet(host)
        at_place = self.scores.by_place(self.scores.update(self._values(host)))
        layers = {k.partition("/")[2]: v for k, v in host.items() if k.partition("/")[0] in ("site", "router", "act")}
        worst = {n: float(np.nanmax(layers[n])) for n in WATCHED if n in layers and not np.isnan(layers[n]).all()}
        return Observation(
            step=step,
            loss=loss,
            grad_norm=grad_norm,
            verdict=verdict,
            stages=self.scores.by_stage(at_place),
            worst=worst,
        )

    def _meet(self, host: Host) -> None:
        """Takes up what is seen for the first time: a probe's values come later than the rest."""
        for key, value in host.items():
            if key not in self._keys:
                series = series_of(key, value.shape, self._places)
                self.scores.extend(series)
                self._keys[key] = len(series)

    def _values(self, host: Host) -> np.ndarray:
        """Every series' value of this step, NaN where it has none."""
        parts = [
            host[key].ravel() if key in host else np.full(size, np.nan) for key, size in self._keys.items() if size
        ]
        return np.concatenate(parts).astype(np.float64) if parts else np.zeros(0)


def _number(value: np.ndarray | None) -> float | None:
    return None if value is None or math.isnan(float(value[0])) else float(value[0])
