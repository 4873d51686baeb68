"""What one step means, told from its host values and what all ranks say: spike verdict, stage
scores, worst.
"""

import math
import pickle
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from geodiag import __version__
from geodiag.anomaly.stage_scores import Scores
from geodiag.cascade.early_warning import EarlyWarning, Held, Warning
from geodiag.hooks.distributed.rank_messages import RankMessages
from geodiag.hooks.measure.values import GRADIENT_TOTAL
from geodiag.hooks.record.table_rows import Host, Places, series_of, without_idle_experts
from geodiag.metrics.registry import live
from geodiag.spikes.detector import SpikeDetector, Verdict


@dataclass(frozen=True, kw_only=True)
class Observation:
    """One completed step, as the controller and the progress line see it."""

    step: int
    loss: float
    grad_norm: float | None
    verdict: Verdict
    stages: dict[int, float]
    warning: Warning | None = None
    """RankMessage at this step: a place is out of range and the loss not yet."""
    worst: dict[str, float] = field(default_factory=dict)
    """Largest value over places of the metrics people watch while training, on this rank."""
    heard: RankMessages | None = None
    """What all ranks said of the step."""


class Observer:
    """Feeds the spike detector, the stage scores and the early warning, in step order."""

    def __init__(self, places: Places, hashed: frozenset[int] = frozenset()) -> None:
        """hashed: layers whose router is a hash."""
        self.detector, self.scores, self.early = (
            SpikeDetector(),
            Scores(hashed=hashed),
            EarlyWarning(),
        )
        self._held = Held(self.detector.normal)
        self._places = places
        self._keys: dict[str, int] = {}
        """Group of host values → how many series it is; in the order of the scores."""

    def say(
        self, step: int, host: Host, absent: Collection[str] = ()
    ) -> tuple[dict[str, float], dict[str, Any]]:
        """This rank's numbers of a step, and the early warning it would give, for all ranks.

        absent: metrics that this step could not measure.
        """
        self._meet(host)
        at_place = self.scores.by_place(self.scores.update(self._values(host, absent)))
        said = {f"stage{s}": z for s, z in self.scores.by_stage(at_place).items()}
        said |= {"here": 1.0} if "steps.loss" in host else {}
        names = {"loss": "steps.loss", "tokens": "steps.tokens", "grad_norm": GRADIENT_TOTAL}
        said |= {name: float(host[key][0]) for name, key in names.items() if key in host}
        warning = self.early.update(step, self.scores.places, at_place)
        return said, {"warning": asdict(warning)} if warning else {}

    def observe(self, step: int, host: Host, heard: RankMessages) -> Observation | None:
        """What all ranks together saw; the same on every rank, but for `worst`. None where none saw
        anything.
        """
        if not heard.present.any():
            return None
        grad_norm = _number(heard.largest("grad_norm"))
        if (
            grad_norm is None and "steps.grad_norm" in host
        ):  # a sum over ranks, so the same on all of them
            grad_norm = _number(float(host["steps.grad_norm"][0]))
        verdict = self.detector.update(step, heard.loss, grad_norm)
        news = heard.note.get("warning")
        worst = {
            m.name: float(np.nanmax(host[m.key]))
            for m in live()
            if m.key in host and not np.isnan(host[m.key]).all()
        }
        return Observation(
            step=step,
            loss=heard.loss,
            grad_norm=grad_norm,
            verdict=verdict,
            stages={s: heard.largest(f"stage{s}") for s in (1, 2, 3)},
            warning=self._held.update(step, Warning(**news) if news else None, verdict),
            worst=worst,
            heard=heard,
        )

    def state_dict(self) -> dict[str, Any]:
        """What was learned so far; the scores as bytes, which the same version of geodiag reads."""
        return {
            "detector": self.detector.state_dict(),
            "scores": pickle.dumps((__version__, self.scores, self.early, self._keys, self._held)),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from `state`. The scores of another version are learned anew."""
        self.detector.load_state_dict(state["detector"])
        try:
            version, *learned = pickle.loads(state["scores"])
        except (AttributeError, ImportError, TypeError):  # its classes have changed
            return
        if version == __version__:
            self.scores, self.early, self._keys, self._held = learned

    def _meet(self, host: Host) -> None:
        """Takes up what is seen for the first time: a probe's values come later than the rest."""
        for key, value in host.items():
            if key not in self._keys:
                series = series_of(key, value.shape, self._places)
                self.scores.extend(series)
                self._keys[key] = len(series)

    def _values(self, host: Host, absent: Collection[str]) -> np.ndarray:
        """Every series' value of this step, NaN where it has none."""
        seen = {
            key: without_idle_experts(key, host[key], host)
            for key in self._keys
            if key in host and key not in absent
        }
        parts = [
            seen[key].ravel() if key in seen else np.full(n, np.nan)
            for key, n in self._keys.items()
            if n
        ]
        return np.concatenate(parts).astype(np.float64) if parts else np.zeros(0)


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value
