"""The cascade behind a spike: which stage, layer, site and expert left its range first, and what
would have helped.

Reads what a run records and nothing else: the tables `steps`, `layers` and `experts`, and of the
events only what the detector said of the loss. Never what was planted.
"""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from geodiag.cascade import external_causes as causes
from geodiag.cascade.caveats import Caveat, caveats
from geodiag.cascade.defence import Stage, defence_for, is_mhc
from geodiag.cascade.evidence import Evidence, rows_of
from geodiag.cascade.origin import Candidate, candidates, drifts, origins
from geodiag.cascade.stage_map import HISTORY, Judged, StageMap, held_against, judged, stage_map
from geodiag.cascade.suspect_expert import expert_of
from geodiag.cascade.types import Alternative, Cascade, Onset
from geodiag.cascade.words import in_words
from geodiag.errors import GeodiagError
from geodiag.jsonable import jsonable
from geodiag.run import Run, open_run
from geodiag.spikes.event import Spike
from geodiag.spikes.recorded import Seen, spikes_of

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
"""Steps before the loss in which an origin is looked for."""
AFTER = 8
"""Steps after it that are looked at, for how far it reached."""


def explain(run: Run | str | Path, spike: int | Spike | Seen | None = None) -> Cascade:
    """The cascade behind a spike of a run, which may still be training.

    spike: its number among the run's spikes (0 is the first, -1 the last), or a step, or a `Spike`,
    or what an attempt has `Seen`; without one, the worst. GeodiagError where there is no such step,
    or no spike and none was named.
    """
    run = run if isinstance(run, Run) else open_run(run)
    known = spikes_of(run)
    return _explained(run, _chosen(run, known, spike), known)


def cascades(run: Run | str | Path) -> list[Cascade]:
    """The cascade behind each spike of a run, in the order in which they began."""
    run = run if isinstance(run, Run) else open_run(run)
    known = spikes_of(run)
    return [_explained(run, seen, known) for seen in known]


def _chosen(run: Run, known: Sequence[Seen], spike: int | Spike | Seen | None) -> Seen:
    if isinstance(spike, Seen):
        return spike
    if isinstance(spike, Spike):
        return next(
            (s for s in known if s.spike == spike),
            Seen(spike=spike, onset=spike.onset, attempt=None),
        )
    if spike is None:
        if not known:
            raise GeodiagError(f"{run.url} has no spike; pass a step to explain, e.g. --spike 120")
        return max(known, key=lambda s: (s.spike is not None and s.spike.score, -s.onset))
    if -len(known) <= spike < len(known):
        return known[spike]
    for seen in known:
        assert seen.spike is not None
        if seen.onset <= spike <= max(seen.spike.detected, seen.spike.end or 0):
            return seen
    last = run.last_step()
    if last is None or not 0 <= spike <= last:
        have = "no step" if last is None else f"steps up to {last}"
        raise GeodiagError(
            f"{run.url} has {len(known)} spikes and {have}; pass --spike with one of them, not {spike}"
        )
    return Seen(spike=None, onset=spike, attempt=None)


def _explained(run: Run, seen: Seen, known: Sequence[Seen]) -> Cascade:
    window = judged(run, max(0, seen.onset - LOOKBACK), seen.onset + AFTER, seen.attempt)
    row = int(np.searchsorted(window.step_S, seen.onset))
    last = row + (1 if seen.spike is not None else AFTER)
    found = candidates(window, row, len(window.step_S) - 1)
    likely = origins([c for c in found if c.start <= last])
    but = caveats(run, window, seen, known)
    if not likely and seen.spike is not None and HISTORY // 2 <= window.first < len(window.step_S):
        slow = held_against(window)
        drifted = drifts(slow, row)
        if drifted:
            window, found, likely = slow, drifted, origins(drifted)
            but.append(
                Caveat(f"it drifted: told against what was usual until step {window.begins}", 0.6)
            )
    told = _told(run, window, seen, found, likely)
    trust = float(np.prod([c.trust for c in but]))
    return replace(
        told, confidence=round(told.confidence * trust, 3), caveats=tuple(c.words for c in but)
    )


def _told(
    run: Run, window: Judged, seen: Seen, found: list[Candidate], likely: list[Candidate]
) -> Cascade:
    spike = None if seen.spike is None else {k: jsonable(v) for k, v in asdict(seen.spike).items()}
    origin = likely[0] if likely else None
    stage, layer, site, expert, cause = _verdict(window, origin)
    rows: list[Evidence] = rows_of(window, origin, stage) if origin else []
    start = origin.start if origin else None
    until = int(np.searchsorted(window.step_S, seen.onset))
    # A learning rate that was raised long before anything moved is not what moved it.
    began = until if start is None else start
    kink = causes.lr_kink(window, max(window.first, began - causes.REACH), until)
    if kink is not None and not (
        origin and origin.start < kink.row and origin.strength > causes.OWN
    ):
        stage, layer, site, expert, cause, start = None, None, None, None, "lr", kink.row
        rows = [_lr_evidence(window, kink), *rows]
    onset = None if start is None else int(window.step_S[start])
    onset_row = len(window.step_S) if start is None else start
    draft = Cascade(
        spike=spike,
        spike_onset=seen.onset,
        stage=stage,
        layer=layer,
        site=site,
        expert=expert,
        domain=causes.domain_of(run, window, onset_row, seen.attempt) if cause == "data" else None,
        onset=onset,
        lead=None if onset is None else seen.onset - onset,
        cause=cause,
        confidence=_confidence(likely, sure=cause == "lr"),
        defence=defence_for(stage, cause, origin.place.part if origin else None, is_mhc(run)),
        evidence=tuple(rows),
        alternatives=_alternatives(window, likely, told=0 if cause == "lr" else 1),
        path=_path(window, origin, found, seen),
        words="",
        caveats=(),
    )
    return replace(draft, words=in_words(draft))


def _verdict(
    window: Judged, origin: Candidate | None
) -> tuple[Stage, int | None, str | None, int | None, Any]:
    if origin is None:
        return None, None, None, None, None
    place = origin.place
    if place.part == "data":
        return "data", None, None, None, "data"
    return place.stage, place.layer, place.site, expert_of(window, origin), "layer"


def _lr_evidence(window: Judged, kink: causes.Kink) -> Evidence:
    return Evidence(
        stage=None,
        layer=None,
        site=None,
        expert=None,
        metric="lr",
        step=int(window.step_S[kink.row]),
        score=min(1e3, 10 * abs(np.log(kink.ratio))),
        value=kink.value,
        usual=kink.usual,
        unit="1",
    )


def _confidence(likely: list[Candidate], sure: bool) -> float:
    """How much the origin stands out, and above the next; a learning rate is known, what it did is
    likely.
    """
    if sure or not likely:
        return 0.9 if sure else 0.0
    best = likely[0]
    rival = next(
        (c for c in likely[1:] if not c.explained and c.place.layer != best.place.layer), None
    )
    margin = 1 - 0.6 * (rival.weight / best.weight if rival else 0.0)
    return round(float(0.99 * margin * (1 - np.exp(-best.weight / 6))), 3)


def _alternatives(
    window: Judged, likely: list[Candidate], told: int, most: int = 4
) -> tuple[Alternative, ...]:
    """What may have been the origin instead; the first `told` of the candidates are the answer
    itself.
    """
    out: list[Alternative] = []
    taken = {(c.place.layer, c.place.stage) for c in likely[:told]}
    for c in likely[told:]:
        stage, layer, site, expert, _ = _verdict(window, c)
        if (c.place.layer, c.place.stage) in taken or len(out) == most:
            continue
        taken.add((c.place.layer, c.place.stage))
        share = c.weight / (c.weight + likely[0].weight) * (0.3 if c.explained else 0.8)
        why = (
            "what came before it explains it"
            if c.explained
            else f"stands out less: {c.strength:.0f} σ"
        )
        out.append(
            Alternative(
                stage=stage,
                layer=layer,
                site=site,
                expert=expert,
                onset=int(window.step_S[c.start]),
                confidence=round(float(share), 3),
                why=why,
            )
        )
    return tuple(out)


def _path(
    window: Judged, origin: Candidate | None, found: list[Candidate], seen: Seen
) -> tuple[Onset, ...]:
    """The first onset of each stage and layer from the origin on, then the loss."""
    knots: dict[tuple[Stage, int | None], Onset] = {}
    if origin is not None:
        until = (
            int(np.searchsorted(window.step_S, seen.onset))
            if seen.spike is not None
            else len(window.step_S)
        )
        for c in [origin, *(c for c in found if origin.before(c) and c.start <= until)]:
            stage, layer, site, _, _ = _verdict(window, c)
            row = rows_of(window, c, stage, most=1)
            if not row or (stage, layer) in knots or (layer is None and c is not origin):
                continue
            knots[stage, layer] = Onset(
                stage=stage,
                layer=layer,
                site=site,
                expert=None if layer is None else row[0].expert,
                step=int(window.step_S[c.start]),
                score=row[0].score,
                metric=row[0].metric,
            )
    score = seen.spike.score if seen.spike is not None else float("nan")
    loss = Onset(
        stage=None, layer=None, site=None, expert=None, step=seen.onset, score=score, metric="loss"
    )
    return (*knots.values(), loss)
