"""Which cascade the reader looks at: the spikes and warnings there are, the one that is chosen, its
window and cell.
"""

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
from geodiag.spikes.recorded import Seen, spikes_of

LONGEST = 1500
"""Steps that a stage map shows at most: each of its columns is judged against the steps before it.
"""
_QUIET, _PAD, _AFTER = 240, 24, 8
_STEPS_A_REFRESH = 60
"""A living run's map is worked out anew when it has grown by one so-many-th of the window."""


class SpikeOrWarning(NamedTuple):
    """Something whose cascade can be shown."""

    step: int
    kind: str
    attempt: int | None = None
    """The attempt that lived it; None for the newest."""


class StageCell(NamedTuple):
    """One place of the stage map."""

    stage: int
    layer: int
    step: int


def spikes_and_warnings(cache: RunCache) -> list[SpikeOrWarning]:
    """Spikes and early warnings, in time."""
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
    """The step whose cascade is shown: the reader's, else the newest spike's, else the newest
    warning's.
    """
    if view.spike is not None:
        return view.spike
    there = spikes_and_warnings(cache)
    return next(
        (c.step for c in reversed(there) if c.kind != "early_warning"),
        there[-1].step if there else None,
    )


def cache_of_spike(cache: RunCache, step: int | None) -> RunCache:
    """The run as the attempt lived it in which the loss spiked at `step`."""
    attempts = [s.attempt for s in _spikes(cache) if s.onset == step]
    return cache.as_of_attempt(attempts[-1] if attempts else None)


def _spikes(cache: RunCache) -> list[Seen]:
    return cache.memo("known spikes", lambda: spikes_of(cache.run))


def most_unusual_step(cache: RunCache) -> tuple[int, int, float] | None:
    """(step, stage, score) of the highest stage score on record: where to look in a run without a
    spike.
    """
    steps, best = cache.steps(), None
    for stage in STAGES:
        score_S = steps[f"stage{stage}_score"]
        if len(score_S) and not np.isnan(score_S).all():
            at = int(np.nanargmax(score_S))
            if best is None or score_S[at] > best[2]:
                best = int(steps["step"][at]), stage, float(score_S[at])
    return best


def cascade_of(cache: RunCache, step: int | None) -> Cascade | str | None:
    """The cascade behind a step, or one line that says why there is none."""
    if step is None or not len(cache.steps()["step"]):
        return None
    known = _spikes(cache)
    mine = [i for i, seen in enumerate(known) if seen.onset == step]
    newest = int(cache.steps()["step"][-1])
    said = known[mine[-1]] if mine else step
    key = ("cascade", said, min(newest, step + _AFTER), len(cache.attempt_starts()))
    try:
        return cache.cached(key, lambda: explain(cache.run, mine[-1] if mine else step))
    except GeodiagError as e:
        return str(e)


def window_of(cache: RunCache, view: View, cascade: Cascade | None) -> tuple[int, int]:
    """The steps to show: the reader's, else from well before the origin to where the loss is back."""
    step_S = cache.steps()["step"]
    first, last = (int(step_S[0]), int(step_S[-1])) if len(step_S) else (0, 0)
    if view.steps is not None:
        low, high = view.steps
        if high - low > LONGEST:
            middle = (
                cascade.spike_onset
                if cascade is not None and low <= cascade.spike_onset <= high
                else high
            )
            low = max(low, min(middle - LONGEST // 2, high - LONGEST))
            high = low + LONGEST
    elif cascade is not None:
        start = min(
            cascade.spike_onset, cascade.spike_onset if cascade.onset is None else cascade.onset
        )
        pad = max(_PAD, round(1.2 * (cascade.spike_onset - start)))
        end = (cascade.spike or {}).get("end") or cascade.spike_onset
        low, high = (
            start - pad,
            cascade.spike_onset + max(pad, min(end + _AFTER - cascade.spike_onset, 2 * pad)),
        )
    else:
        low, high = last - _QUIET, last
    return max(first, low), max(first + 1, min(last, high))


def scene_in(cache: RunCache, window: tuple[int, int], newest: RunCache) -> CascadeScene:
    """What was recorded in the window, as `record` lived it; `newest` is the run as it stands now."""
    steps, stages, now = cache.steps(), stages_of(cache, window), newest.steps()
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
    """The stage map of a window; of a window that still grows, not more often than can be seen."""
    newest = int(cache.steps()["step"][-1])
    stride = max(1, (window[1] - window[0]) // _STEPS_A_REFRESH)
    first = window[0] - window[0] % stride
    reached = window[1] if newest > window[1] else newest - newest % stride
    key = ("stages", first, reached, len(cache.attempt_starts()))
    return cache.cached(key, lambda: stage_map(cache.run, first, window[1]))


def cell_of(view: View, cascade: Cascade | None, stages: StageMap) -> StageCell | None:
    """The reader's cell, else the origin, else the worst there is in the map."""
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
        nothing = "The table layers has no rows here: call geodiag.attach before the first step."
        return dict.fromkeys(STAGES, nothing)
    if not np.isfinite(stages.scores).any():
        return dict.fromkeys(STAGES, "Too few samples so far to know what is usual.")
    found = cache.manifest_section("found")
    out = {}
    if "experts" in found and not found["experts"]:
        out[1] = "This model has no experts: nothing is measured here."
    if "routers" in found and not found["routers"]:
        out[2] = "This model has no router: there is nothing to flip."
    return out
