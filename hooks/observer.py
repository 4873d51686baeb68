"""What one step means, told from its host values alone: spike verdict, stage scores, worst places."""

import math
from dataclasses import dataclass, field

import numpy as np

from geodiag.hooks.rows import Host
from geodiag.scores import StageScores
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

    def __init__(self) -> None:
        self.detector, self.scores = SpikeDetector(), StageScores()

    def observe(self, step: int, host: Host) -> Observation:
        loss, grad_norm = float(host["loss"][0]), _number(host.get("grad_norm"))
        verdict = self.detector.update(step, loss, grad_norm)
        layers = {k.partition("/")[2]: v for k, v in host.items() if k.partition("/")[0] in ("site", "router", "act")}
        worst = {n: float(np.nanmax(layers[n])) for n in WATCHED if n in layers and not np.isnan(layers[n]).all()}
        return Observation(
            step=step,
            loss=loss,
            grad_norm=grad_norm,
            verdict=verdict,
            stages=self.scores.update(layers),
            worst=worst,
        )


def _number(value: np.ndarray | None) -> float | None:
    return None if value is None or math.isnan(float(value[0])) else float(value[0])
