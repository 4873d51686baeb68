"""The stage map: the worst score of every layer at every step, stage by stage; what the cascade
view draws.
"""

from dataclasses import dataclass

import numpy as np

from geodiag.anomaly.metric_roles import Place, Series
from geodiag.anomaly.series_window import Tracks, read_tracks
from geodiag.anomaly.stage_scores import Scores
from geodiag.run import Run

HISTORY = 192
"""Samples before a window from which its baselines are learned."""
PATIENCE = 256
"""Afterwards nothing need be learned anew: what broke and stayed broken must not look normal when
the loss follows.
"""
CALM = 64
"""Samples after which a picture takes a lasting change of level for the new normal, as a training's
own scores do.
"""
_LONGEST = 1 << 14


@dataclass(frozen=True)
class StageMap:
    """Scores in robust z; NaN where not sampled."""

    steps: np.ndarray
    layers: np.ndarray
    scores: np.ndarray
    """float32[3, L, S]: stages 1, 2, 3 × layers × steps."""


@dataclass(frozen=True)
class Judged:
    """A window of a run with its scores, a series and a place a column; the history before it is in
    it too.
    """

    tracks: Tracks
    places: list[Place]
    place_P: np.ndarray
    score_SP: np.ndarray
    at_place_SK: np.ndarray
    first: int
    """Row at which the window asked for begins."""

    @property
    def step_S(self) -> np.ndarray:
        return self.tracks.step_S

    @property
    def begins(self) -> int:
        """The step with which the window asked for begins."""
        return int(self.step_S[self.first])

    @property
    def series(self) -> list[Series]:
        return self.tracks.series


def judged(run: Run, first: int, last: int, attempt: int | None = None) -> Judged:
    """Scores of steps `first` to `last`, learned from enough samples before them, whatever the
    cadence.
    """
    return _judged(_enough(run, first, last, attempt), first)


def held_against(window: Judged) -> Judged:
    """The same window against what was usual when it began: what moves too slowly for a baseline
    that follows.
    """
    return _judged(window.tracks, window.begins, follow=False)


def _enough(run: Run, first: int, last: int, attempt: int | None) -> Tracks:
    reach = HISTORY
    tracks = read_tracks(run, max(0, first - reach), last, attempt)
    while (
        reach < min(_LONGEST, first)
        and (tracks.sampled_S & (tracks.step_S < first)).sum() < HISTORY // 2
    ):
        reach *= 4
        tracks = read_tracks(run, max(0, first - reach), last, attempt)
    return tracks


def _judged(tracks: Tracks, first: int, follow: bool = True, patience: int = PATIENCE) -> Judged:
    scores = Scores(tracks.series, tracks.hashed, patience)
    score_SP = np.full(tracks.values_SP.shape, np.nan)
    at_place = np.full((len(tracks.step_S), len(scores.places)), np.nan)
    begin = int(np.searchsorted(tracks.step_S, first))
    for i, values in enumerate(tracks.values_SP):
        scores.baseline.learning = follow or i < begin
        score_SP[i] = scores.update(values)
        at_place[i] = scores.by_place(score_SP[i])
    return Judged(tracks, scores.places, scores.place_P, score_SP, at_place, begin)


def stage_map(run: Run, first: int, last: int) -> StageMap:
    """The worst score of each stage, layer and step from `first` to `last`; what lasts is calm
    after `CALM` samples.
    """
    window = _judged(_enough(run, first, last, None), first, patience=CALM)
    layers = np.array(window.tracks.layers, int)
    steps = window.step_S[window.first :]
    scores = np.full((3, len(layers), len(steps)), np.nan, np.float32)
    for k, place in enumerate(window.places):
        if place.stage is not None:
            row = scores[place.stage - 1, np.searchsorted(layers, place.layer)]
            np.fmax(row, window.at_place_SK[window.first :, k], out=row)
    return StageMap(steps, layers, scores)
