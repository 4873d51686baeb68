"""The cascade behind a spike: the stage, layer, site and expert that left its range first.

Input are the tables `steps`, `layers` and `experts` of a run, and the detector's spikes among its
events. Events about planted faults are never read.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from geodiag.cascade.build import build_cascade
from geodiag.cascade.caveats import Caveat, caveats
from geodiag.cascade.evidence import Evidence
from geodiag.cascade.origin import find_candidates, find_slow_drifts, rank_origins
from geodiag.cascade.scored_window import HISTORY, score_against_start, score_window
from geodiag.cascade.stage_map import StageMap, stage_map
from geodiag.cascade.types import Alternative, Cascade, Onset
from geodiag.errors import GeodiagError
from geodiag.run import Run, open_run
from geodiag.spikes.event import Spike
from geodiag.spikes.recorded import RecordedSpike, spikes_of

__all__ = [
    "Alternative",
    "Cascade",
    "Evidence",
    "Onset",
    "StageMap",
    "cascades",
    "explain",
    "stage_map",
]

LOOKBACK = 128
"""Steps before the loss in which an origin is searched."""
AFTER = 8
"""Steps after the onset of the loss that are read, to see how far the cascade spread."""


def explain(run: Run | str | Path, spike: int | Spike | RecordedSpike | None = None) -> Cascade:
    """Return the cascade behind a spike of a run, which may still be training.

    spike: the number of the spike (0 the first, -1 the last), or a step, or a `Spike`, or a
    `RecordedSpike`; by default the worst spike.

    Raises GeodiagError if the run has no such step, or no spike and none was given.
    """
    run = run if isinstance(run, Run) else open_run(run)
    known = spikes_of(run)
    return _explain_spike(run, _select_spike(run, known, spike), known)


def cascades(run: Run | str | Path) -> list[Cascade]:
    """Return the cascade behind each spike of a run, in order of onset."""
    run = run if isinstance(run, Run) else open_run(run)
    known = spikes_of(run)
    return [_explain_spike(run, spike, known) for spike in known]


def _select_spike(
    run: Run, known: Sequence[RecordedSpike], spike: int | Spike | RecordedSpike | None
) -> RecordedSpike:
    """Return the recorded spike that the argument of `explain` means."""
    if isinstance(spike, RecordedSpike):
        return spike
    if isinstance(spike, Spike):
        unrecorded = RecordedSpike(spike=spike, onset=spike.onset, attempt=None)
        return next((s for s in known if s.spike == spike), unrecorded)
    if spike is None:
        if not known:
            raise GeodiagError(f"{run.url} has no spike; pass a step to explain, e.g. --spike 120")
        return max(known, key=lambda s: (s.spike is not None and s.spike.score, -s.onset))
    if -len(known) <= spike < len(known):
        return known[spike]
    return _spike_at_step(run, known, spike)


def _spike_at_step(run: Run, known: Sequence[RecordedSpike], step: int) -> RecordedSpike:
    """Return the spike that includes `step`, or the step itself without a spike."""
    for recorded in known:
        assert recorded.spike is not None
        if recorded.onset <= step <= max(recorded.spike.detected, recorded.spike.end or 0):
            return recorded
    last = run.last_step()
    if last is None or not 0 <= step <= last:
        steps = "no step" if last is None else f"steps up to {last}"
        raise GeodiagError(
            f"{run.url} has {len(known)} spikes and {steps}; "
            f"pass --spike with one of them, not {step}"
        )
    return RecordedSpike(spike=None, onset=step, attempt=None)


def _explain_spike(run: Run, spike: RecordedSpike, known: Sequence[RecordedSpike]) -> Cascade:
    """Score the window around the spike, find the origin, and lower its confidence by caveats."""
    window = score_window(run, max(0, spike.onset - LOOKBACK), spike.onset + AFTER, spike.attempt)
    row = window.row_of(spike.onset)
    last = row + (1 if spike.spike is not None else AFTER)
    candidates = find_candidates(window, row, len(window.step_S) - 1)
    likely = rank_origins([c for c in candidates if c.start <= last])
    found = caveats(run, window, spike, known)

    # Baselines follow a slow drift, so that it never leaves its range. If nothing else did, compare
    # with the baselines at the start of the window.
    if not likely and spike.spike is not None and HISTORY // 2 <= window.first < len(window.step_S):
        against_start = score_against_start(window)
        drifts = find_slow_drifts(against_start, row)
        if drifts:
            window = against_start
            candidates = drifts
            likely = rank_origins(drifts)
            words = f"slow drift: compared with the normal range until step {window.first_step}"
            found.append(Caveat(words, 0.6))

    cascade = build_cascade(run, window, spike, candidates, likely)
    trust = float(np.prod([c.trust for c in found]))
    return replace(
        cascade,
        confidence=round(cascade.confidence * trust, 3),
        caveats=tuple(c.words for c in found),
    )
