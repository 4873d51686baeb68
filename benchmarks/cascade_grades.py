"""Grades of `geodiag bench cascade`: the planted fault against the explanation by `explain`."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from geodiag.benchmarks.cascade_trials import TRUTHS, Trial
from geodiag.cascade.explain import Cascade, explain
from geodiag.run import Run, open_run

REACH = 30
"""A spike or a warning so many steps after a fault's last step is still that fault's."""
NOISE = 4.0
"""A fault that moves the loss by less than so many σ of batch noise, and is neither spike nor
warning, is excluded.
"""
EXPERTS = ("expert-scale", "bit-flip", "gate-column", "bias-kick")
"""Kinds that change one expert."""
WHOLE = ("spike", "divergence", "nonfinite")


@dataclass(frozen=True, kw_only=True)
class Grade:
    """One planted fault and the grade of its explanation."""

    trial: Trial
    effect: float
    """Largest rise of the loss over its twin's, in σ of batch noise."""
    seen: str | None
    """spike, warning, or None where neither was raised."""
    spiked: int | None = None
    """The onset of the loss spike."""
    spike_kind: str | None = None
    warned: int | None = None
    """Step of the first early warning."""
    cascade: Cascade | None = None
    before: dict[str, int] | None = None
    """Steps before the fault, and the alarms in them."""

    @property
    def excluded(self) -> bool:
        return self.seen is None and self.effect < NOISE

    @property
    def stage(self) -> bool:
        return (
            self.cascade is not None and self.cascade.stage == TRUTHS[self.trial.kind or ""].stage
        )

    def layer(self, among: int) -> bool:
        """Return whether the right layer is among the first `among` layers.

        For a fault without a layer: whether the explanation names no layer.
        """
        if self.cascade is None:
            return False
        if self.trial.layer is None:
            return self.cascade.layer is None
        named = [self.cascade.layer, *(a.layer for a in self.cascade.alternatives)]
        return self.trial.layer in list(dict.fromkeys(n for n in named if n is not None))[:among]

    @property
    def lead(self) -> int | None:
        """Steps from the onset of the origin to the onset of the loss."""
        return self.cascade.lead if self.cascade is not None and self.spiked is not None else None

    @property
    def warning_lead(self) -> int | None:
        """Steps from the warning to the onset of the loss; negative for a late warning."""
        return None if self.spiked is None or self.warned is None else self.spiked - self.warned

    @property
    def expert(self) -> bool | None:
        """Whether the expert of the origin is right; None if the fault has no expert.

        The expert of a fault is its step modulo 8.
        """
        if (self.trial.kind or "").removeprefix("growing ") not in EXPERTS or self.cascade is None:
            return None
        from geodiag.reference_models.config import SIZES

        return self.cascade.expert == (self.trial.step or 0) % SIZES[self.trial.size].experts

    def as_json(self) -> dict[str, Any]:
        found = self.cascade
        return {
            "name": self.trial.name,
            "kind": self.trial.kind,
            "faults": " ".join(self.trial.faults),
            "seed": self.trial.seed,
            "layer": self.trial.layer,
            "effect_sigma": round(self.effect, 2),
            "seen": self.seen,
            "spike_onset": self.spiked,
            "spike_kind": self.spike_kind,
            "warned": self.warned,
            "warning_lead": self.warning_lead,
            "lead": self.lead,
            "excluded": self.excluded,
            "stage_right": self.stage,
            "layer_right": self.layer(1),
            "layer_in_3": self.layer(3),
            "expert_right": self.expert,
            "before": self.before,
            "said": None
            if found is None
            else {
                k: getattr(found, k)
                for k in ("stage", "layer", "site", "expert", "onset", "lead", "confidence")
            },
        }


def line_of(trial: Trial, folder: Path) -> dict[str, Any]:
    """Return one line of the results: a grade, or the alarms of a training without a fault."""
    if trial.kind is not None:
        return grade(trial, folder).as_json()
    run = open_run(folder / trial.name)
    return {"name": trial.name, "kind": None, "seed": trial.seed} | false_alarms(run)


def grade(trial: Trial, folder: Path) -> Grade:
    """Return the grade of a trial's explanation.

    The `fault` events of the run are for this benchmark only; `explain` does not read them.
    """
    run = open_run(folder / trial.name)
    twin = open_run(folder / trial.twin)
    assert trial.step is not None, "only a trial with a fault is graded"
    planted = trial.step
    until = _last_step(run, planted) + REACH
    spiked = [e for e in _events(run, WHOLE) if planted <= e["onset"] <= until]
    warned = [e["step"] for e in _events(run, ("early_warning",)) if planted <= e["step"] <= until]
    found: dict[str, Any] = {"trial": trial, "effect": _effect(run, twin, planted, until)}
    found["before"] = false_alarms(run, planted)
    if spiked:
        onset = spiked[0]["onset"]
        found["spike_kind"] = spiked[0]["kind"]
        return Grade(
            **found,
            seen="spike",
            spiked=onset,
            warned=min(warned, default=None),
            cascade=explain(run, onset),
        )
    if warned:
        return Grade(**found, seen="warning", warned=warned[0], cascade=explain(run, warned[0]))
    return Grade(**found, seen=None)


def false_alarms(run: Run, until: int | None = None) -> dict[str, int]:
    """Count the alarms of a training without a fault, up to a step."""
    steps = _losses(run)[:until].size
    spikes, warnings = (
        [e for e in _events(run, kinds) if e["step"] < steps]
        for kinds in (WHOLE, ("early_warning",))
    )
    return {"steps": steps, "spikes": len(spikes), "warnings": len(warnings)}


def _events(run: Run, kinds: Sequence[str]) -> list[dict[str, Any]]:
    """Return the events of these kinds with their `onset`, in step order."""
    from geodiag.events import details

    rows = run.read_arrow("events", columns=["step", "kind", "data"]).to_pylist()
    found = [
        {"step": r["step"], "kind": r["kind"], "onset": details(r["data"]).get("onset", r["step"])}
        for r in rows
        if r["kind"] in kinds
    ]
    return sorted(found, key=lambda e: e["step"])


def _last_step(run: Run, planted: int) -> int:
    """Return the last disturbed step, as the training recorded it."""
    from geodiag.events import details

    rows = run.read_arrow("events", columns=["step", "kind", "data"]).to_pylist()
    lasts = [details(r["data"]).get("last_step", planted) for r in rows if r["kind"] == "fault"]
    return max(lasts, default=planted)


def _losses(run: Run) -> np.ndarray:
    return run.read_arrow("steps", columns=["step", "loss"]).sort_by("step")["loss"].to_numpy()


def _effect(run: Run, twin: Run, planted: int, until: int) -> float:
    """Return the largest rise of the loss over the twin's, in σ of the twin's own noise."""
    ours = _losses(run)
    theirs = _losses(twin)
    both = min(len(ours), len(theirs), until + 1)
    rise = ours[planted:both] - theirs[planted:both]
    if not np.isfinite(rise).all():
        return math.inf
    steps = np.diff(theirs[planted // 2 :])
    noise = 1.4826 * float(np.median(np.abs(steps - np.median(steps)))) / math.sqrt(2)
    return float(rise.max(initial=0.0)) / noise
