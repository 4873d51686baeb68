"""Stage scores: a layer against its own past, trend and all."""

import numpy as np
import pytest

from geodiag.scores import StageScores


def series(steps: int, layers: int = 6, seed: int = 0) -> list[np.ndarray]:
    """A gain that grows by a third over a hundred steps, with 1 % of noise."""
    rng = np.random.default_rng(seed)
    return [np.exp(0.003 * t + 0.01 * rng.standard_normal(layers)) for t in range(steps)]


def scores(values: list[np.ndarray], name: str = "transport_gain_fwd", stage: int = 3) -> np.ndarray:
    judge = StageScores()
    return np.array([judge.update({name: v})[stage] for v in values])


def test_a_steady_trend_is_no_news() -> None:
    z = scores(series(400))
    assert np.isnan(z[:64]).all()
    assert np.nanmax(z) < 6


def test_a_jump_in_one_layer_scores_high_at_once() -> None:
    values = series(200)
    values[150][3] *= 1.5
    z = scores(values)
    assert z[150] > 10
    assert z[151] < 6, "what is abnormal must not enter the window"


def test_a_lasting_level_becomes_the_new_normal() -> None:
    values = series(500)
    for v in values[150:]:
        v[3] *= 1.5
    z = scores(values)
    assert (z[150:210] > 10).all()
    assert np.nanmax(z[216:]) < 6


@pytest.mark.parametrize(("name", "stage"), [("clamp_gate_rate", 1), ("max_vio", 2), ("composite_gain_fwd", 3)])
def test_evidence_counts_for_its_own_stage_only(name: str, stage: int) -> None:
    values = series(100)
    values[90][0] *= 3
    judge = StageScores()
    last = {}
    for v in values[:91]:
        last = judge.update({name: v})
    assert last[stage] > 8
    assert all(np.isnan(last[s]) for s in (1, 2, 3) if s != stage)


def test_an_infinite_value_scores_the_most_and_blinds_nothing() -> None:
    values = series(300)
    values[150][2] = np.inf
    z = scores(values)
    assert z[150] == 1000
    assert np.nanmax(z[151:]) < 6


def test_an_exact_constant_makes_no_noise_of_its_last_digit() -> None:
    rng = np.random.default_rng(1)
    assert np.nanmax(scores([1 + 1e-7 * rng.standard_normal(6) for _ in range(300)], "amax_gain_fwd")) < 1


def test_metrics_of_another_cadence_are_judged_by_their_own_past() -> None:
    judge, values = StageScores(), series(1500)
    jump = []
    for t, v in enumerate(values):
        probe = {"flip_rate": np.full(6, 0.1 if t != 1400 else 0.9)} if t % 10 == 0 else {}
        jump.append(judge.update({"transport_gain_fwd": v, **probe})[2])
    assert jump[1400] > 8
    assert np.nanmax(jump[:1400]) < 6
