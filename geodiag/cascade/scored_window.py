"""A window of a run with its scores: every series against its own past."""

from dataclasses import dataclass

import numpy as np

from geodiag.anomaly.metric_roles import Series, SeriesPlace
from geodiag.anomaly.series_window import SeriesWindow, read_series
from geodiag.anomaly.stage_scores import StageScorer
from geodiag.run import Run

# S steps, P series, K places

HISTORY = 192
"""Samples before a window from which its baselines are learned."""
PATIENCE = 256
"""Samples out of range after which a level is accepted as normal. Long, because a fault that lasts
must still be out of range when the loss follows.
"""
_LONGEST = 1 << 14
"""Most steps before a window that are read to find enough samples."""


@dataclass(frozen=True)
class ScoredWindow:
    """A window of a run with its scores; the history before the window is included."""

    recorded: SeriesWindow
    places: list[SeriesPlace]
    place_P: np.ndarray
    """Index of the place of each series."""
    score_SP: np.ndarray
    score_SK: np.ndarray
    """Worst score of each place."""
    first: int
    """Row of the first step of the window; the rows before it are history."""

    @property
    def step_S(self) -> np.ndarray:
        return self.recorded.step_S

    @property
    def first_step(self) -> int:
        """The first step of the window."""
        return int(self.step_S[self.first])

    @property
    def series(self) -> list[Series]:
        return self.recorded.series

    def row_of(self, step: int) -> int:
        """Return the first row at or after `step`."""
        return int(np.searchsorted(self.step_S, step))


def score_window(
    run: Run, first: int, last: int, attempt: int | None = None, patience: int = PATIENCE
) -> ScoredWindow:
    """Score the steps `first` to `last`, with enough samples before them to learn from.

    patience: samples out of range after which a level is accepted as normal.
    """
    recorded = _read_with_history(run, first, last, attempt)
    return _score(recorded, first, follow=True, patience=patience)


def score_against_start(window: ScoredWindow) -> ScoredWindow:
    """Score a window against the baselines at its first step.

    Baselines that do not learn in the window find drifts that are too slow for learning ones.
    """
    return _score(window.recorded, window.first_step, follow=False, patience=PATIENCE)


def _read_with_history(run: Run, first: int, last: int, attempt: int | None) -> SeriesWindow:
    """Read the window and at least half of `HISTORY` samples before it, whatever the cadence."""
    reach = HISTORY
    recorded = read_series(run, max(0, first - reach), last, attempt)
    while (
        reach < min(_LONGEST, first)
        and (recorded.sampled_S & (recorded.step_S < first)).sum() < HISTORY // 2
    ):
        reach *= 4
        recorded = read_series(run, max(0, first - reach), last, attempt)
    return recorded


def _score(recorded: SeriesWindow, first: int, follow: bool, patience: int) -> ScoredWindow:
    """Run the scorer over the steps; without `follow` it learns before `first` only."""
    scorer = StageScorer(recorded.series, recorded.hashed, patience)
    score_SP = np.full(recorded.values_SP.shape, np.nan)
    score_SK = np.full((len(recorded.step_S), len(scorer.places)), np.nan)
    begin = int(np.searchsorted(recorded.step_S, first))
    for i, values in enumerate(recorded.values_SP):
        scorer.baseline.learning = follow or i < begin
        score_SP[i] = scorer.update(values)
        score_SK[i] = scorer.by_place(score_SP[i])
    return ScoredWindow(recorded, scorer.places, scorer.place_P, score_SP, score_SK, begin)
