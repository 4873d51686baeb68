"""Step observer: spike verdict, stage scores and early warning of each recorded step."""

import math
import pickle
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from geodiag import __version__
from geodiag.anomaly.stage_scores import StageScorer
from geodiag.cascade.early_warning import EarlyWarning, EarlyWarningDetector, PendingWarning
from geodiag.hooks.distributed.rank_messages import RankMessages
from geodiag.hooks.measure.step_values import GRADIENT_TOTAL
from geodiag.hooks.record.table_rows import Host, Places, series_of, without_idle_experts
from geodiag.metrics.registry import live
from geodiag.spikes.detector import SpikeDetector, Verdict


@dataclass(frozen=True, kw_only=True)
class Observation:
    """One recorded step, for the controller and the progress line."""

    step: int
    loss: float
    grad_norm: float | None
    verdict: Verdict
    stages: dict[int, float]
    warning: EarlyWarning | None = None
    """Raised at this step: some place is out of its range, and the loss is not yet."""
    worst: dict[str, float] = field(default_factory=dict)
    """Largest value over places of the metrics on the progress line, on this rank."""
    messages: RankMessages | None = None
    """The messages of all ranks about this step."""


class Observer:
    """Feeds the spike detector, the stage scores and the early warning, in step order."""

    def __init__(self, places: Places, hashed: frozenset[int] = frozenset()) -> None:
        """hashed: layers whose router is a hash."""
        self.detector, self.scores, self.early = (
            SpikeDetector(),
            StageScorer(hashed=hashed),
            EarlyWarningDetector(),
        )
        self._pending = PendingWarning(self.detector.normal)
        self._places = places
        self._keys: dict[str, int] = {}
        """Key of the values → number of series, in the order of the scores."""

    def score(
        self, step: int, host: Host, absent: Collection[str] = ()
    ) -> tuple[dict[str, float], dict[str, Any]]:
        """Return this rank's part of the message about a step: numbers, and an early warning.

        absent: keys of metrics that this step could not measure.
        """
        self._add_new_series(host)
        at_place = self.scores.by_place(self.scores.update(self._values(host, absent)))
        numbers = {f"stage{s}": z for s, z in self.scores.by_stage(at_place).items()}
        numbers |= {"here": 1.0} if "steps.loss" in host else {}
        names = {"loss": "steps.loss", "tokens": "steps.tokens", "grad_norm": GRADIENT_TOTAL}
        numbers |= {name: float(host[key][0]) for name, key in names.items() if key in host}
        warning = self.early.update(step, self.scores.places, at_place)
        return numbers, {"warning": asdict(warning)} if warning else {}

    def observe(self, step: int, host: Host, messages: RankMessages) -> Observation | None:
        """Return what all ranks together measured, alike on every rank but for `worst`.

        None if no rank measured anything.
        """
        if not messages.present.any():
            return None
        grad_norm = _number(messages.largest("grad_norm"))
        if grad_norm is None and "steps.grad_norm" in host:
            # A sum over ranks, and so the same on all of them.
            grad_norm = _number(float(host["steps.grad_norm"][0]))
        verdict = self.detector.update(step, messages.loss, grad_norm)
        news = messages.note.get("warning")
        worst = {
            m.name: float(np.nanmax(host[m.key]))
            for m in live()
            if m.key in host and not np.isnan(host[m.key]).all()
        }
        return Observation(
            step=step,
            loss=messages.loss,
            grad_norm=grad_norm,
            verdict=verdict,
            stages={s: messages.largest(f"stage{s}") for s in (1, 2, 3)},
            warning=self._pending.update(step, EarlyWarning(**news) if news else None, verdict),
            worst=worst,
            messages=messages,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return what was learned so far. Only the same version of geodiag can read the scores."""
        return {
            "detector": self.detector.state_dict(),
            "scores": pickle.dumps(
                (__version__, self.scores, self.early, self._keys, self._pending)
            ),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`. Scores of another version are learned again."""
        self.detector.load_state_dict(state["detector"])
        try:
            version, *learned = pickle.loads(state["scores"])
        except (AttributeError, ImportError, TypeError):  # its classes have changed
            return
        if version == __version__:
            self.scores, self.early, self._keys, self._pending = learned

    def _add_new_series(self, host: Host) -> None:
        """Start the scores of keys that appear for the first time, as those of a first probe."""
        for key, value in host.items():
            if key not in self._keys:
                series = series_of(key, value.shape, self._places)
                self.scores.extend(series)
                self._keys[key] = len(series)

    def _values(self, host: Host, absent: Collection[str]) -> np.ndarray:
        """Return the value of every series at this step, NaN where there is none."""
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
