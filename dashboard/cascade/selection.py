"""The selected cascade: spikes and warnings to choose from, the chosen one, its window and cell."""

from typing import NamedTuple

import numpy as np

from geodiag.cascade.explain import Cascade, StageMap, explain, stage_map
from geodiag.dashboard.data.run_cache import RunCache
from geodiag.dashboard.data.step_table import SupersededSteps
from geodiag.dashboard.data.timeline_marks import routing_spans
from geodiag.dashboard.figures.cascade import STAGES, CascadeScene
from geodiag.dashboard.url.live_figures import event_marks
from geodiag.dashboard.url.url_state import View
from geodiag.errors import GeodiagError
from geodiag.spikes.recorded import RecordedSpike, spikes_of

LONGEST = 1500
"""Most steps of a stage map. Each column is compared with the steps before it, which takes time."""
_QUIET = 240
"""Steps shown of a run without a cascade."""
_PAD = 24
"""Fewest steps shown before and after a cascade."""
_AFTER = 8
"""Steps after a spike that can still change its cascade."""
_STEPS_A_REFRESH = 60
"""The stage map of a live run is recomputed after each 1/60 of the window."""


class SpikeOrWarning(NamedTuple):
    """A spike or an early warning whose cascade can be shown."""

    step: int
    kind: str
    attempt: int | None = None
    """The attempt in which it happened; None for the newest."""


class StageCell(NamedTuple):
    """One cell of the stage map."""

    stage: int
    layer: int
    step: int


def spikes_and_warnings(cache: RunCache) -> list[SpikeOrWarning]:
    """Return spikes and early warnings in order of steps."""
    found = [
        SpikeOrWarning(s.onset, s.spike.kind, s.attempt)
        for s in _spikes(cache)
        if s.spike is not None
    ]
    warned = [
        SpikeOrWarning(m.step, m.kind) for m in event_marks(cache) if m.kind == "early_warning"
    ]
    return sorted([*found, *warned], key=lambda c: (c.step, c.kind))


def chosen_step(cache: RunCache, view: View) -> int | None:
    """Return the step whose cascade is shown.

    Without a choice of the reader: the newest spike, or else the newest early warning.
    """
    if view.spike is not None:
        return view.spike
    candidates = spikes_and_warnings(cache)
    return next(
        (c.step for c in reversed(candidates) if c.kind != "early_warning"),
        candidates[-1].step if candidates else None,
    )


def cache_of_spike(cache: RunCache, step: int | None) -> RunCache:
    """Return the run as it was in the attempt whose loss spiked at `step`."""
    attempts = [s.attempt for s in _spikes(cache) if s.onset == step]
    return cache.as_of_attempt(attempts[-1] if attempts else None)


def _spikes(cache: RunCache) -> list[RecordedSpike]:
    return cache.memo("known spikes", lambda: spikes_of(cache.run))


def most_unusual_step(cache: RunCache) -> tuple[int, int, float] | None:
    """Return (step, stage, score) of the highest stage score of the run, or None."""
    steps = cache.steps()
    best: tuple[int, int, float] | None = None
    for stage in STAGES:
        score_S = steps[f"stage{stage}_score"]
        if len(score_S) and not np.isnan(score_S).all():
            at = int(np.nanargmax(score_S))
            if best is None or score_S[at] > best[2]:
                best = int(steps["step"][at]), stage, float(score_S[at])
    return best


def cascade_of(cache: RunCache, step: int | None) -> Cascade | str | None:
    """Return the cascade behind a step, or one line with the reason why there is none."""
    if step is None or not len(cache.steps()["step"]):
        return None
    known = _spikes(cache)
    indices = [i for i, seen in enumerate(known) if seen.onset == step]
    newest = int(cache.steps()["step"][-1])
    subject = known[indices[-1]] if indices else step
    key = ("cascade", subject, min(newest, step + _AFTER), len(cache.attempt_starts()))
    try:
        return cache.cached(key, lambda: explain(cache.run, indices[-1] if indices else step))
    except GeodiagError as e:
        return str(e)


def window_of(cache: RunCache, view: View, cascade: Cascade | None) -> tuple[int, int]:
    """Return the first and last step to show: the choice of the reader, or all of the cascade."""
    step_S = cache.steps()["step"]
    first, last = (int(step_S[0]), int(step_S[-1])) if len(step_S) else (0, 0)
    if view.steps is not None:
        low, high = _at_most_longest(view.steps, cascade)
    elif cascade is not None:
        low, high = _around(cascade)
    else:
        low, high = last - _QUIET, last
    return max(first, low), max(first + 1, min(last, high))


def _at_most_longest(steps: tuple[int, int], cascade: Cascade | None) -> tuple[int, int]:
    """Cut a range to LONGEST steps: around the cascade, or else at its end."""
    low, high = steps
    if high - low <= LONGEST:
        return steps
    inside = cascade is not None and low <= cascade.spike_onset <= high
    middle = cascade.spike_onset if cascade is not None and inside else high
    low = max(low, min(middle - LONGEST // 2, high - LONGEST))
    return low, low + LONGEST


def _around(cascade: Cascade) -> tuple[int, int]:
    """From well before the origin to the step at which the loss has recovered."""
    spike = cascade.spike_onset
    start = spike if cascade.onset is None else min(spike, cascade.onset)
    pad = max(_PAD, round(1.2 * (spike - start)))
    end = (cascade.spike or {}).get("end") or spike
    return start - pad, spike + max(pad, min(end + _AFTER - spike, 2 * pad))


def scene_in(cache: RunCache, window: tuple[int, int], newest: RunCache) -> CascadeScene:
    """Return the data of a window in the attempt `cache`; `newest` is the newest attempt."""
    steps = cache.steps()
    stages = stages_of(cache, window)
    now = newest.steps()
    later = [
        SupersededSteps(
            max(newest.attempt_starts(), default=0), now["step"], now["loss"], now["grad_norm"]
        )
    ]
    return CascadeScene(
        window=window,
        steps=steps,
        stages=stages,
        marks=event_marks(cache),
        spans=routing_spans(steps["step"], steps["routing_mode"]),
        superseded=cache.superseded() if cache is newest else later,
        missing=_missing(cache, stages),
    )


def stages_of(cache: RunCache, window: tuple[int, int]) -> StageMap:
    """Return the stage map of a window; a window that still grows is recomputed rarely."""
    newest = int(cache.steps()["step"][-1])
    stride = max(1, (window[1] - window[0]) // _STEPS_A_REFRESH)
    first = window[0] - window[0] % stride
    reached = window[1] if newest > window[1] else newest - newest % stride
    key = ("stages", first, reached, len(cache.attempt_starts()))
    return cache.cached(key, lambda: stage_map(cache.run, first, window[1]))


def cell_of(view: View, cascade: Cascade | None, stages: StageMap) -> StageCell | None:
    """Return the cell of the reader, else the origin, else the cell with the highest score."""
    if view.stage is not None and view.layer is not None and view.step is not None:
        return StageCell(view.stage, view.layer, view.step)
    if cascade is not None and cascade.onset is not None:
        for knot in cascade.path:
            if (
                knot.stage in STAGES
                and knot.layer is not None
                and cascade.stage in (None, "data", knot.stage)
            ):
                return StageCell(int(knot.stage), knot.layer, knot.step)
    if np.isfinite(stages.scores).any():
        stage, layer, step = np.unravel_index(int(np.nanargmax(stages.scores)), stages.scores.shape)
        return StageCell(int(stage) + 1, int(stages.layers[layer]), int(stages.steps[step]))
    return None


def _missing(cache: RunCache, stages: StageMap) -> dict[int, str]:
    if not len(stages.layers):
        no_rows = "Table layers has no rows here: call geodiag.attach before the first step."
        return dict.fromkeys(STAGES, no_rows)
    if not np.isfinite(stages.scores).any():
        return dict.fromkeys(STAGES, "Too few samples so far to estimate the usual range.")
    found = cache.manifest_section("found")
    out = {}
    if "experts" in found and not found["experts"]:
        out[1] = "This model has no experts, so nothing is measured here."
    if "routers" in found and not found["routers"]:
        out[2] = "This model has no router, so no choice of experts can change."
    return out
