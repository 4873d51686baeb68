"""Scores: every series against its own past, trend and all; places and stages from them."""

import numpy as np
import pytest

from geodiag.anomaly.metric_roles import Series
from geodiag.anomaly.stage_scores import StageScorer


def values(steps: int, layers: int = 6, seed: int = 0) -> np.ndarray:
    """A gain that grows by a third over a hundred steps, with 1 % of noise."""
    rng = np.random.default_rng(seed)
    return np.exp(0.003 * np.arange(steps)[:, None] + 0.01 * rng.standard_normal((steps, layers)))


def scored(rows: np.ndarray, name: str = "transport_gain_fwd") -> np.ndarray:
    """The worst score over layers at every step."""
    judge = StageScorer([Series(name, layer, "ffn") for layer in range(rows.shape[1])])
    with np.errstate(all="ignore"):
        each = np.array([judge.update(row) for row in rows])
    return np.array([np.nan if np.isnan(row).all() else np.nanmax(row) for row in each])


def test_a_steady_trend_is_no_news() -> None:
    z = scored(values(400))
    assert np.isnan(z[:12]).all()
    assert np.nanmax(z) < 7
    assert np.nanpercentile(z, 90) < 4


def test_a_jump_in_one_layer_scores_high_at_once() -> None:
    rows = values(200)
    rows[150][3] *= 1.5
    z = scored(rows)
    assert z[150] > 10
    assert z[151] < 6, "what is abnormal must not enter the baseline"


def test_a_lasting_level_becomes_the_new_normal() -> None:
    rows = values(500)
    rows[150:, 3] *= 1.5
    z = scored(rows)
    assert (z[150:180] > 10).all()
    assert np.nanmax(z[300:]) < 6


def test_a_short_outlier_lowers_the_next_score_and_a_lasting_fault_does_not() -> None:
    rows = values(400)
    for t in range(100, 300, 20):
        rows[t, 2] *= 1.2
    rows[350:, 3] *= 1.2
    judge = StageScorer([Series("transport_gain_fwd", layer, "ffn") for layer in range(6)])
    z = np.array([judge.update(row) for row in rows])
    assert z[280, 2] < 0.5 * z[100, 2]
    assert z[350, 3] > 10
    assert z[356, 3] > 0.8 * z[350, 3]


@pytest.mark.parametrize(
    ("name", "stage"), [("clamp_gate_rate", 1), ("max_vio", 2), ("transport_gain_fwd", 3)]
)
def test_evidence_counts_for_its_own_stage_only(name: str, stage: int) -> None:
    rows = np.minimum(values(100), 1.2)
    rows[90][0] *= 3
    judge = StageScorer([Series(name, layer, "ffn") for layer in range(6)])
    last = {}
    for row in rows[:91]:
        last = judge.by_stage(judge.by_place(judge.update(row)))
    assert last[stage] > 8
    assert all(np.isnan(last[s]) for s in (1, 2, 3) if s != stage)


def test_an_infinite_value_scores_the_most_and_blinds_nothing() -> None:
    rows = values(300)
    rows[150][2] = np.inf
    z = scored(rows)
    assert z[150] == 1000
    assert np.nanmax(z[151:]) < 6


def test_an_exact_constant_makes_no_noise_of_its_last_digit() -> None:
    rng = np.random.default_rng(1)
    assert np.nanmax(scored(1 + 1e-7 * rng.standard_normal((300, 6)), "amax_gain_fwd")) < 1


def test_metrics_of_another_cadence_are_judged_by_their_own_past() -> None:
    rng = np.random.default_rng(2)
    rows = np.full((1500, 6), np.nan)
    rows[::10] = 0.1 + 0.005 * rng.standard_normal((150, 6))
    rows[1400, 4] = 0.9
    z = scored(rows, "flip_rate")
    assert z[1400] > 8
    assert np.nanmax(z[:1400]) < 6
    assert np.isnan(z[1401])


def test_a_series_that_comes_later_has_a_past_of_its_own() -> None:
    rows = values(200)
    judge = StageScorer([Series("transport_gain_fwd", 0, "ffn")])
    for t in range(100):
        judge.update(rows[t, :1])
    judge.extend([Series("max_vio", 0, "ffn")])
    z = np.array([judge.update(rows[t, :2]) for t in range(100, 200)])
    assert np.isfinite(z[:, 0]).all()
    assert np.isnan(z[:12, 1]).all()
    assert np.isfinite(z[12:, 1]).all()
