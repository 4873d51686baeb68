"""Data of a comparison of runs: status, losses, key metrics, spikes, differing settings."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from geodiag.cascade.explain import explain
from geodiag.dashboard.data.run_cache import RunCache
from geodiag.dashboard.reports.run_labels import labels_of
from geodiag.dashboard.reports.tables import flatten, metric_of, value
from geodiag.errors import GeodiagError
from geodiag.health import Health, health
from geodiag.jsonable import jsonable
from geodiag.metrics.registry import headlines
from geodiag.run import Run
from geodiag.spikes.recorded import RecordedSpike, spikes_of

MOST_RUNS = 12
"""Lines that can be distinguished: four colours times three kinds of dashes."""
_EXPLAINED = 4
"""Spikes per run whose cascade is explained, the worst ones."""
_MEAN_OF = 50
"""Steps over which a loss is averaged, because the loss of one batch is noisy."""
_NAMES = [name for names in headlines().values() for name in names]


@dataclass(frozen=True, kw_only=True)
class ComparedRun:
    """One run of a comparison."""

    label: str
    cache: RunCache
    health: Health
    last: dict[str, float]
    """Newest value of each key metric; for layers the value of the worst layer."""
    spikes: tuple[tuple[RecordedSpike, str | None], ...]
    """Each spike, with its cascade in words if it was explained."""

    def tokens(self) -> np.ndarray | None:
        """Return the tokens trained on up to each step, None if some step lacks the number."""
        token_S = self.cache.steps()["tokens"].astype(np.float64)
        return np.cumsum(token_S) if len(token_S) and np.isfinite(token_S).all() else None

    def as_json(self) -> dict[str, Any]:
        """Return the entry of this run in the output of `geodiag compare --json`."""
        h = self.health
        tokens = self.tokens()
        spikes = [
            {
                "kind": s.spike.kind,
                "onset": s.onset,
                "detected": s.spike.detected,
                "peak": s.spike.peak,
                "end": s.spike.end,
                "score": jsonable(s.spike.score),
                "attempt": s.attempt,
                "words": words,
            }
            for s, words in self.spikes
            if s.spike is not None
        ]
        return {
            "label": self.label,
            "run": h.run,
            "status": h.status,
            "last_step": h.last_step,
            "loss": jsonable(h.last_loss),
            "tokens": None if tokens is None else float(tokens[-1]),
            "spikes": spikes,
            "problems": self.cache.problems(),
        }


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Runs side by side."""

    runs: tuple[ComparedRun, ...]

    def differences(self) -> dict[str, list[Any]]:
        """Return each setting that differs: name → value of each run, None if unknown."""
        settings_per_run = [_settings(s.cache) for s in self.runs]
        names = list(dict.fromkeys(name for settings in settings_per_run for name in settings))
        values = {name: [settings.get(name) for settings in settings_per_run] for name in names}
        return {name: v for name, v in values.items() if any(x != v[0] for x in v)}

    def shared(self) -> dict[str, Any]:
        """Return the newest common step of all runs with a loss, and the mean losses before it.

        The mean is over the newest common steps, at most 50.
        """
        common: np.ndarray | None = None
        for s in self.runs:
            steps = s.cache.steps()
            known = steps["step"][np.isfinite(steps["loss"])]
            if not len(known):
                continue
            common = known if common is None else np.intersect1d(common, known)
        if common is None or not len(common):
            return {"last_step": None, "steps": 0, "loss": [None] * len(self.runs)}
        last = common[-_MEAN_OF:]
        return {
            "last_step": int(last[-1]),
            "steps": len(last),
            "loss": [_mean(s.cache, last) for s in self.runs],
        }

    def metrics(self) -> dict[str, dict[str, Any]]:
        """Return for each key metric its unit, its worst and newest values, and the better runs."""
        out = {}
        for name in _NAMES:
            metric = metric_of(name)
            worst = [s.health.worst.get(name) for s in self.runs]
            if all(w is None for w in worst):
                continue
            values = [None if w is None else w.value for w in worst]
            last = [s.last.get(name) for s in self.runs]
            # The worst loss is the loss of the first step, which does not rate a run.
            better_worst = [] if name == "loss" else better(name, values)
            out[name] = {
                "unit": metric.unit,
                "worse": metric.worse,
                "worst": [None if w is None else w.as_json() for w in worst],
                "last": jsonable(last),
                "better": {"worst": better_worst, "last": better(name, last)},
            }
        return out

    def as_json(self) -> dict[str, Any]:
        """Return the object that `geodiag compare --json` prints."""
        return {
            "runs": [s.as_json() for s in self.runs],
            "shared": jsonable(self.shared()),
            "metrics": self.metrics(),
            "differences": jsonable(self.differences()),
        }


def compare(runs: Sequence[Run]) -> Comparison:
    """Compare the newest attempts of runs.

    GeodiagError for fewer than two runs, more than MOST_RUNS, or the same run twice.
    """
    if len(runs) < 2:
        raise GeodiagError("compare needs two runs or more; for one run: geodiag report RUN")
    if len(runs) > MOST_RUNS:
        raise GeodiagError(
            f"{len(runs)} lines cannot be distinguished; pass at most {MOST_RUNS} runs"
        )
    return Comparison(
        runs=tuple(_side(r, label) for r, label in zip(runs, labels_of(runs), strict=True))
    )


def better(name: str, values: Sequence[float | None]) -> list[int]:
    """Return the indices of the runs with the best value; none if all values look the same."""
    metric = metric_of(name)
    known = {i: v for i, v in enumerate(values) if v is not None}
    finite = {i: v for i, v in known.items() if math.isfinite(v)}
    if len(known) < 2 or not finite:
        return []
    texts = {i: value(v, metric) for i, v in known.items()}
    best = (max if metric.worse == "low" else min)(finite, key=lambda i: finite[i])
    return [i for i in known if texts[i] == texts[best]] if len(set(texts.values())) > 1 else []


def _side(run: Run, label: str) -> ComparedRun:
    cache = RunCache(run)
    known = [s for s in spikes_of(run) if s.spike is not None]
    worst = sorted(known, key=lambda s: -(s.spike.score if s.spike else 0.0))[:_EXPLAINED]
    spikes = tuple((s, explain(run, s).words if s in worst else None) for s in known)
    return ComparedRun(
        label=label, cache=cache, health=health(run, _NAMES), last=_last(cache), spikes=spikes
    )


def _last(cache: RunCache) -> dict[str, float]:
    """Return the newest value of each key metric; for layers the value of the worst layer."""
    steps = cache.steps()
    out: dict[str, float] = {}
    for name in _NAMES:
        metric = metric_of(name)
        if metric.table == "steps":
            known = steps[name][~np.isnan(steps[name])]
            if len(known):
                out[name] = float(known[-1])
    names = [n for n in _NAMES if metric_of(n).table == "layers"]
    for grid in cache.recent("layers", *names):
        value_R = grid.at(int(grid.steps_S[-1])) if len(grid.steps_S) else np.array([])
        if not np.isnan(value_R).all():
            out[grid.metric.name] = float(
                (np.nanmin if grid.metric.worse == "low" else np.nanmax)(value_R)
            )
    return out


def _settings(cache: RunCache) -> dict[str, Any]:
    """Return the configuration, the model summary and the versions of a run."""
    found = {f"found.{k}": v for k, v in cache.manifest_section("found").items() if k != "missing"}
    versions = {f"versions.{k}": v for k, v in cache.manifest_section("versions").items()}
    return flatten(cache.manifest_section("config")) | found | versions


def _mean(cache: RunCache, at: np.ndarray) -> float | None:
    steps = cache.steps()
    loss_S = steps["loss"][np.isin(steps["step"], at) & np.isfinite(steps["loss"])]
    return float(loss_S.astype(np.float64).mean()) if len(loss_S) else None
