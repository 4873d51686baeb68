"""Build a cascade from the candidates of a scored window."""

from dataclasses import asdict, replace
from typing import NamedTuple

import numpy as np

from geodiag.cascade.defence import Stage, defence_for, is_mhc
from geodiag.cascade.evidence import Evidence, origin_evidence
from geodiag.cascade.external_causes import (
    LR_REACH,
    OWN_STRENGTH,
    LearningRateJump,
    find_lr_jump,
    suspect_domain,
)
from geodiag.cascade.origin import Candidate
from geodiag.cascade.scored_window import ScoredWindow
from geodiag.cascade.suspect_expert import suspect_expert
from geodiag.cascade.types import Alternative, Cascade, Cause, Onset
from geodiag.cascade.verdict_text import describe
from geodiag.jsonable import jsonable
from geodiag.run import Run
from geodiag.spikes.recorded import RecordedSpike

_MOST_ALTERNATIVES = 4


class Blame(NamedTuple):
    """The part of the model that a candidate blames; all None for an external cause."""

    stage: Stage = None
    layer: int | None = None
    site: str | None = None
    expert: int | None = None
    cause: Cause | None = None


def build_cascade(
    run: Run,
    window: ScoredWindow,
    spike: RecordedSpike,
    candidates: list[Candidate],
    likely: list[Candidate],
) -> Cascade:
    """Return the cascade of a spike, without caveats.

    likely: the candidates that can be the origin, ranked.
    """
    origin = likely[0] if likely else None
    blame = _blame(window, origin)
    evidence = origin_evidence(window, origin, blame.stage) if origin else []
    start = origin.start if origin else None

    jump = _blamed_lr_jump(window, origin, window.row_of(spike.onset))
    if jump is not None:
        blame = Blame(cause="lr")
        evidence = [_lr_evidence(window, jump), *evidence]
        start = jump.row

    onset = None if start is None else int(window.step_S[start])
    onset_row = len(window.step_S) if start is None else start
    is_batch = blame.cause == "data"
    draft = Cascade(
        spike=_spike_fields(spike),
        spike_onset=spike.onset,
        stage=blame.stage,
        layer=blame.layer,
        site=blame.site,
        expert=blame.expert,
        domain=suspect_domain(run, window, onset_row, spike.attempt) if is_batch else None,
        onset=onset,
        lead=None if onset is None else spike.onset - onset,
        cause=blame.cause,
        confidence=_confidence(likely, jump is not None),
        defence=defence_for(
            blame.stage, blame.cause, origin.place.part if origin else None, is_mhc(run)
        ),
        evidence=tuple(evidence),
        alternatives=_alternatives(window, likely, skip=1 if jump is None else 0),
        path=_path(window, origin, candidates, spike),
        words="",
        caveats=(),
    )
    return replace(draft, words=describe(draft))


def _spike_fields(spike: RecordedSpike) -> dict[str, object] | None:
    if spike.spike is None:
        return None
    return {k: jsonable(v) for k, v in asdict(spike.spike).items()}


def _blame(window: ScoredWindow, origin: Candidate | None) -> Blame:
    if origin is None:
        return Blame()
    place = origin.place
    if place.part == "data":
        return Blame(stage="data", cause="data")
    expert = suspect_expert(window, origin)
    return Blame(place.stage, place.layer, place.site, expert, "layer")


def _blamed_lr_jump(
    window: ScoredWindow, origin: Candidate | None, until: int
) -> LearningRateJump | None:
    """Return the jump of the learning rate that explains the origin, or the loss if there is none.

    until: the row at which the loss left its trend.
    """
    # A learning rate that was raised long before the first excursion did not cause it.
    began = origin.start if origin else until
    jump = find_lr_jump(window, max(window.first, began - LR_REACH), until)
    if jump is None:
        return None
    if origin and origin.start < jump.row and origin.strength > OWN_STRENGTH:
        return None
    return jump


def _lr_evidence(window: ScoredWindow, jump: LearningRateJump) -> Evidence:
    return Evidence(
        stage=None,
        layer=None,
        site=None,
        expert=None,
        metric="lr",
        step=int(window.step_S[jump.row]),
        score=min(1e3, 10 * abs(np.log(jump.ratio))),
        value=jump.value,
        usual=jump.usual,
        unit="1",
    )


def _confidence(likely: list[Candidate], is_lr: bool) -> float:
    """Return the confidence before caveats: 0.9 for a learning rate, else from the weights."""
    # confidence = 0.99 (1 − 0.6 w₂ / w₁) (1 − exp(−w₁ / 6)): an origin must stand out from its
    # noise (w₁) and from its best rival in another layer (w₂). The constants were set by hand.
    if is_lr:
        return 0.9
    if not likely:
        return 0.0
    best = likely[0]
    rival = next(
        (c for c in likely[1:] if not c.explained and c.place.layer != best.place.layer), None
    )
    margin = 1 - 0.6 * (rival.weight / best.weight if rival else 0.0)
    return round(float(0.99 * margin * (1 - np.exp(-best.weight / 6))), 3)


def _alternatives(
    window: ScoredWindow, likely: list[Candidate], skip: int
) -> tuple[Alternative, ...]:
    """Return other possible origins, one for each layer and stage.

    skip: number of leading candidates that are the answer itself.
    """
    found: list[Alternative] = []
    taken = {(c.place.layer, c.place.stage) for c in likely[:skip]}
    for c in likely[skip:]:
        key = (c.place.layer, c.place.stage)
        if key in taken or len(found) == _MOST_ALTERNATIVES:
            continue
        taken.add(key)
        found.append(_alternative(window, c, likely[0]))
    return tuple(found)


def _alternative(window: ScoredWindow, c: Candidate, best: Candidate) -> Alternative:
    blame = _blame(window, c)
    # confidence = w / (w + w_best), times 0.8, or times 0.3 for a candidate that others explain
    share = c.weight / (c.weight + best.weight) * (0.3 if c.explained else 0.8)
    why = "explained by an earlier onset" if c.explained else f"smaller excess, {c.strength:.0f} σ"
    return Alternative(
        stage=blame.stage,
        layer=blame.layer,
        site=blame.site,
        expert=blame.expert,
        onset=int(window.step_S[c.start]),
        confidence=round(float(share), 3),
        why=why,
    )


def _path(
    window: ScoredWindow,
    origin: Candidate | None,
    candidates: list[Candidate],
    spike: RecordedSpike,
) -> tuple[Onset, ...]:
    """Return the first onset of each stage and layer from the origin on, then the loss."""
    onsets: dict[tuple[Stage, int | None], Onset] = {}
    if origin is not None:
        until = len(window.step_S) if spike.spike is None else window.row_of(spike.onset)
        later = [c for c in candidates if origin.before(c) and c.start <= until]
        for c in [origin, *later]:
            onset = _onset(window, c)
            if onset is None or (onset.layer is None and c is not origin):
                continue
            onsets.setdefault((onset.stage, onset.layer), onset)

    loss = Onset(
        stage=None,
        layer=None,
        site=None,
        expert=None,
        step=spike.onset,
        score=float("nan") if spike.spike is None else spike.spike.score,
        metric="loss",
    )
    return (*onsets.values(), loss)


def _onset(window: ScoredWindow, c: Candidate) -> Onset | None:
    """Return the onset of a candidate, with its strongest metric; None without evidence."""
    blame = _blame(window, c)
    strongest = origin_evidence(window, c, blame.stage, most=1)
    if not strongest:
        return None
    return Onset(
        stage=blame.stage,
        layer=blame.layer,
        site=blame.site,
        expert=None if blame.layer is None else strongest[0].expert,
        step=int(window.step_S[c.start]),
        score=strongest[0].score,
        metric=strongest[0].metric,
    )
