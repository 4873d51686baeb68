"""What a spike cost, from the executed steps alone; and intervals over seeds."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from geodiag.hooks.control.controller import TROUBLE

CAP = 12.0
"""Nats that a loss counts at most, infinite ones too: about twice what guessing bytes costs."""
SLACK = 0.3
"""Nats above its own lowest trend that a training without a twin has free."""
AFTER = 40
"""Steps behind the first spike's onset in which another is the same one again."""
NEAR = 0.05
"""Nats within which the loss is back at its twin's, as the median of `WINDOW` steps."""
WINDOW = 5
LAST = 20


@dataclass(frozen=True)
class Mean:
    """A mean over seeds and its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float], draws: int = 4000) -> "Mean":
        known = np.array([v for v in values if v is not None and np.isfinite(v)])
        if not len(known):
            return cls(np.nan, np.nan, np.nan, 0)
        picks = np.random.default_rng(0).integers(0, len(known), (draws, len(known)))
        low, high = np.quantile(known[picks].mean(1), [0.025, 0.975])
        return cls(float(known.mean()), float(low), float(high), len(known))


def losses(trial: Mapping[str, Any]) -> np.ndarray:
    """Return the executed losses; a loss that is not finite counts as `CAP`."""
    return np.array([CAP if x is None else min(x, CAP) for x in trial["losses"]])


def kept(trial: Mapping[str, Any]) -> dict[int, float]:
    """Return step → loss of its last execution, without the steps that were rolled back."""
    return dict(zip(trial["steps"], losses(trial).tolist(), strict=True))


def against_twin(trial: Mapping[str, Any], twin: Mapping[str, Any], onset: int) -> dict[str, float]:
    """Return the cost of a planted fault against the training of the same seed without it."""
    healthy = kept(twin)
    seen = losses(trial)
    steps = trial["steps"]
    excess = np.array([x - healthy[s] for s, x in zip(steps, seen, strict=True)])
    first = next((i for i, s in enumerate(steps) if s >= onset), len(steps))
    after = excess[first:]
    back = _back(after)
    end = [s for s in sorted(healthy) if s >= max(healthy) - LAST + 1]
    left = kept(trial)
    return {
        "peak": float(after.max(initial=0.0)),
        "excess": float(np.maximum(after, 0).sum()),
        "recovery_steps": float(len(after) if back is None else back),
        "never_recovered": float(back is None),
        "final_loss": statistics.fmean(left[s] - healthy[s] for s in end if s in left),
        "steps_lost": float(len(steps) - len(set(steps))),
    }


def _back(excess: np.ndarray) -> int | None:
    """Return the executed steps until the loss stays near the twin's; None if it never does."""
    medians = _medians(excess)
    if not len(medians):
        return None
    out = np.flatnonzero(medians > NEAR)
    if not len(out):
        return 0
    back = int(out[-1]) + WINDOW
    return back if back < len(excess) else None


def _medians(values: np.ndarray) -> np.ndarray:
    """Return the median of every `WINDOW` consecutive values."""
    if len(values) < WINDOW:
        return np.zeros(0)
    return np.median(np.lib.stride_tricks.sliding_window_view(values, WINDOW), axis=1)


def by_itself(trial: Mapping[str, Any], steps: int) -> dict[str, float]:
    """Return the damage in a training without a healthy twin, against its own lowest trend."""
    seen = losses(trial)
    trend = np.array([np.median(seen[max(0, i - 8) : i + 1]) for i in range(len(seen))])
    above = np.maximum(seen - np.minimum.accumulate(trend), 0)
    left = kept(trial)
    end = [s for s in sorted(left) if s >= steps - LAST]
    return {
        "peak": float(above[20:].max(initial=0.0)),
        "excess": float(np.maximum(above[20:] - SLACK, 0).sum()),
        "recovery_steps": float((_medians(above[20:]) > SLACK).sum()),
        "final_loss": statistics.fmean(left[s] for s in end) if end else float("nan"),
        "steps_lost": float(len(seen) - len(set(trial["steps"]))),
        "reached": float(max(left) + 1 >= steps),
    }


def common(trial: Mapping[str, Any]) -> dict[str, float | None]:
    """Return the measures of every trial: spikes per 10 000 executed steps, flips, routed steps."""
    spikes = [e for e in trial["events"] if e["kind"] in TROUBLE]
    flips = trial["flips"]
    return {
        "spikes_per_10k": 1e4 * len(spikes) / len(trial["steps"]),
        "again": _again(trial["arm"], spikes),
        "steps_before": _steps_before(trial["events"], spikes),
        "flips": flips.get("flip_rate"),
        "flips_anticipatory": flips["flip_rate_anticipatory"],
        "flips_router": flips["flip_rate_router"],
    }


def _again(arm: Mapping[str, Any], spikes: Sequence[Mapping[str, Any]]) -> float | None:
    """Return whether the first spike was raised again after a rollback; None without a rollback."""
    if not spikes or arm["mode"] != "auto" or "rollback" not in arm["actions"]:
        return None
    first, *later = (e["data"]["onset"] for e in spikes)
    return float(any(onset <= first + AFTER for onset in later))


def _steps_before(
    events: Sequence[Mapping[str, Any]], spikes: Sequence[Mapping[str, Any]]
) -> float | None:
    """Return the steps from the rollback target to the onset; None without a rollback."""
    restored = (
        e["data"]["restore"] for e in events if e["kind"] == "decision" and e["data"].get("acted")
    )
    first = next((step for step in restored if step is not None), None)
    return None if first is None else float(spikes[0]["data"]["onset"] - first)


def summarise(trials: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return one row per scenario and arm: means, and differences from no intervention."""
    by_key = {(t["scenario"]["name"], t["arm"]["name"], t["seed"]): t for t in trials}
    measured = {key: measure(t, by_key) for key, t in by_key.items()}
    rows = []
    for scenario, arm in dict.fromkeys((s, a) for s, a, _ in by_key):
        found = {seed: m for (s, a, seed), m in measured.items() if (s, a) == (scenario, arm) and m}
        if not found:
            continue
        names = list(next(iter(found.values())))
        plain = {seed: measured.get((scenario, "none", seed)) for seed in found}
        rows.append(
            {
                "scenario": scenario,
                "arm": arm,
                "seeds": sorted(found),
                "measures": {n: vars(Mean.of([m[n] for m in found.values()])) for n in names},
                "against_none": {
                    n: vars(
                        Mean.of(
                            [
                                m[n] - p[n]
                                for seed, m in found.items()
                                if (p := plain[seed]) and _both(m, p, n)
                            ]
                        )
                    )
                    for n in names
                },
            }
        )
    return rows


def pooled(trials: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Compare every arm with no intervention over all scenarios without a planted fault.

    Paired by scenario and seed, each size of model separately; the healthy twins of planted faults
    are left out.
    """
    by_key = {(t["scenario"]["name"], t["arm"]["name"], t["seed"]): t for t in trials}
    wild = {
        k: measure(t, by_key)
        for k, t in by_key.items()
        if not t["scenario"]["fault"] and k[0] != t["twin"]
    }
    size = {k[0]: t["scenario"]["size"] for k, t in by_key.items()}
    rows = []
    for model, arm in dict.fromkeys((size[s], a) for s, a, _ in wild if a != "none"):
        pairs = [
            (m, wild[s, "none", seed])
            for (s, a, seed), m in wild.items()
            if (size[s], a) == (model, arm) and (s, "none", seed) in wild
        ]
        names = ("peak", "excess", "recovery_steps", "final_loss", "spikes_per_10k", "steps_lost")
        means = {n: vars(Mean.of([m[n] - p[n] for m, p in pairs])) for n in names}
        again = [m["again"] for m, _ in pairs if m["again"] is not None]
        spiked = sum(p["spikes_per_10k"] > 0 for _, p in pairs)
        rows.append(
            {"size": model, "arm": arm, "spiked": spiked, "again": vars(Mean.of(again))} | means
        )
    return rows


def _both(one: Mapping[str, Any], other: Mapping[str, Any], name: str) -> bool:
    return one.get(name) is not None and other.get(name) is not None


def measure(
    trial: Mapping[str, Any], by_key: Mapping[tuple[str, str, int], Mapping[str, Any]]
) -> dict[str, Any]:
    """Return the measures of a trial; none if its healthy twin is missing."""
    scenario = trial["scenario"]
    if not scenario["fault"]:
        return by_itself(trial, scenario["steps"]) | common(trial)
    twin = by_key.get((trial["twin"], "none", trial["seed"]))
    return against_twin(trial, twin, trial["onset"]) | common(trial) if twin else {}
