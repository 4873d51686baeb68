"""Which expert an origin is about: the one that stands out among its siblings, if one does."""

import numpy as np

from geodiag.cascade.origin import LEAST, Candidate
from geodiag.cascade.stage_map import Judged

_BEFORE, _AFTER = 32, 5
_TWICE = 2.0
"""Times the next sibling's change that an expert's own must be."""
_HEAVIER = 0.25
"""Rise of the logarithm of an expert's weight per token that is no drift."""
_BUSIER = 0.08
"""Rise of an expert's share of the load that is no drift."""


def expert_of(window: Judged, origin: Candidate) -> int | None:
    """The expert behind an origin in the experts or in the router; None where none stands out."""
    if origin.place.part == "experts":
        return _loudest(window, origin)
    if origin.place.part == "router":
        return _favoured(window, origin)
    return None


def _loudest(window: Judged, origin: Candidate) -> int | None:
    """By its activations, against their own past."""
    scores: dict[int, float] = {}
    for j, s in enumerate(window.series):
        mine = window.score_SP[origin.start : origin.start + _AFTER, j]
        if (
            s.expert is not None
            and window.places[window.place_P[j]] == origin.place
            and not np.isnan(mine).all()
        ):
            scores[s.expert] = max(
                scores.get(s.expert, 0.0), float(np.nanmean(np.minimum(mine, 100)))
            )
    ranked = sorted(scores.items(), key=lambda item: -item[1])
    if (
        not ranked
        or ranked[0][1] < LEAST
        or (len(ranked) > 1 and ranked[1][1] > 0.8 * ranked[0][1])
    ):
        return None
    return ranked[0][0]


def _favoured(window: Judged, origin: Candidate) -> int | None:
    """By what the router gives it: more weight per token, or more tokens, than it did. The rest
    only lose by it.
    """
    columns = {
        (s.metric, s.expert): window.tracks.values_SP[:, j]
        for j, s in enumerate(window.series)
        if s.expert is not None
        and s.layer == origin.place.layer
        and s.metric in ("load", "gate_mass")
    }
    experts = sorted({e for _, e in columns if e is not None})
    if not experts or any((m, e) not in columns for m in ("load", "gate_mass") for e in experts):
        return None
    load = np.stack([columns["load", e] for e in experts], 1)
    mass = np.stack([columns["gate_mass", e] for e in experts], 1)
    with np.errstate(all="ignore"):
        weight = np.log(np.where(load > 0, mass / load, np.nan))
    risers = [_sole_riser(weight, origin.start, _HEAVIER), _sole_riser(load, origin.start, _BUSIER)]
    best = max((r for r in risers if r is not None), default=None)
    return None if best is None else experts[best[1]]


def _sole_riser(values_SE: np.ndarray, start: int, least: float) -> tuple[float, int] | None:
    """The one column that rose by more than `least` and far more than the others: by how much more,
    and which.
    """
    before, after = values_SE[max(0, start - _BEFORE) : start], values_SE[start : start + _AFTER]
    known = np.isfinite(before).any(0) & np.isfinite(after).any(0)
    rise = np.full(values_SE.shape[1], -np.inf)
    rise[known] = np.nanmedian(after[:, known], 0) - np.nanmedian(before[:, known], 0)
    order = np.argsort(-rise)
    first, second = float(rise[order[0]]), float(rise[order[1]]) if len(order) > 1 else -np.inf
    return (
        (first / least, int(order[0]))
        if first > least and first > _TWICE * max(second, 0.0)
        else None
    )
