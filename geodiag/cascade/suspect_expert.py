"""The expert behind an origin: the one that stands out among the experts of its layer, if any."""

import numpy as np

from geodiag.cascade.origin import MIN_STRENGTH, Candidate
from geodiag.cascade.scored_window import ScoredWindow

# S steps, E experts

_BEFORE = 32
_AFTER = 5
"""Rows before and after the onset that are compared."""
_LEAD = 2.0
"""Least ratio of an expert's rise to the next largest one."""
_MIN_WEIGHT_RISE = 0.25
"""Least rise of the logarithm of an expert's gate weight per token; less is drift."""
_MIN_LOAD_RISE = 0.08
"""Least rise of an expert's share of the load; less is drift."""


def suspect_expert(window: ScoredWindow, origin: Candidate) -> int | None:
    """Return the expert behind an origin in the experts or the router; None if none stands out."""
    if origin.place.part == "experts":
        return _expert_by_activations(window, origin)
    if origin.place.part == "router":
        return _expert_by_routing(window, origin)
    return None


def _expert_by_activations(window: ScoredWindow, origin: Candidate) -> int | None:
    """Return the expert whose activations are farthest from their own past."""
    scores: dict[int, float] = {}
    for j, s in enumerate(window.series):
        if s.expert is None or window.places[window.place_P[j]] != origin.place:
            continue
        after = window.score_SP[origin.start : origin.start + _AFTER, j]
        if not np.isnan(after).all():
            mean = float(np.nanmean(np.minimum(after, 100)))
            scores[s.expert] = max(scores.get(s.expert, 0.0), mean)

    ranked = sorted(scores.items(), key=lambda item: -item[1])
    if not ranked or ranked[0][1] < MIN_STRENGTH:
        return None
    if len(ranked) > 1 and ranked[1][1] > 0.8 * ranked[0][1]:
        return None
    return ranked[0][0]


def _expert_by_routing(window: ScoredWindow, origin: Candidate) -> int | None:
    """Return the expert that suddenly gets more gate weight per token, or more tokens.

    Experts that get less are not suspects: the shares add up to 1.
    """
    columns = {
        (s.metric, s.expert): window.recorded.values_SP[:, j]
        for j, s in enumerate(window.series)
        if s.expert is not None
        and s.layer == origin.place.layer
        and s.metric in ("load", "gate_mass")
    }
    experts = sorted({e for _, e in columns if e is not None})
    if not experts or any((m, e) not in columns for m in ("load", "gate_mass") for e in experts):
        return None

    load_SE = np.stack([columns["load", e] for e in experts], 1)
    mass_SE = np.stack([columns["gate_mass", e] for e in experts], 1)
    with np.errstate(all="ignore"):
        log_weight_SE = np.log(np.where(load_SE > 0, mass_SE / load_SE, np.nan))
    risers = [
        _sole_riser(log_weight_SE, origin.start, _MIN_WEIGHT_RISE),
        _sole_riser(load_SE, origin.start, _MIN_LOAD_RISE),
    ]
    best = max((r for r in risers if r is not None), default=None)
    return None if best is None else experts[best[1]]


def _sole_riser(values_SE: np.ndarray, start: int, least: float) -> tuple[float, int] | None:
    """Return (rise / `least`, column) of the one column that rose far more than the others."""
    # rise = median(after) − median(before); medians ignore single odd steps.
    before = values_SE[max(0, start - _BEFORE) : start]
    after = values_SE[start : start + _AFTER]
    known = np.isfinite(before).any(0) & np.isfinite(after).any(0)
    rise = np.full(values_SE.shape[1], -np.inf)
    rise[known] = np.nanmedian(after[:, known], 0) - np.nanmedian(before[:, known], 0)

    order = np.argsort(-rise)
    first = float(rise[order[0]])
    second = float(rise[order[1]]) if len(order) > 1 else -np.inf
    if first > least and first > _LEAD * max(second, 0.0):
        return first / least, int(order[0])
    return None
