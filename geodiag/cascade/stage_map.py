"""The stage map: the worst score of each stage and layer at each step, as the cascade page draws
it.
"""

from dataclasses import dataclass

import numpy as np

from geodiag.cascade.scored_window import score_window
from geodiag.run import Run

CALM = 64
"""Samples after which the map accepts a lasting change of level as normal, as the training's own
scores do.
"""


@dataclass(frozen=True)
class StageMap:
    """Scores in robust z; NaN where not sampled."""

    steps: np.ndarray
    layers: np.ndarray
    scores: np.ndarray
    """float32[3, L, S]: stages 1, 2, 3 × layers × steps."""


def stage_map(run: Run, first: int, last: int) -> StageMap:
    """Return the worst score of each stage, layer and step from `first` to `last`."""
    window = score_window(run, first, last, patience=CALM)
    layers = np.array(window.recorded.layers, int)
    steps = window.step_S[window.first :]
    scores = np.full((3, len(layers), len(steps)), np.nan, np.float32)
    for k, place in enumerate(window.places):
        if place.stage is not None:
            row = scores[place.stage - 1, np.searchsorted(layers, place.layer)]
            np.fmax(row, window.score_SK[window.first :, k], out=row)
    return StageMap(steps, layers, scores)
