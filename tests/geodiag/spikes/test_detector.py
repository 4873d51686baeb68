"""The spike detector: what it must raise, what it must not raise, and its state."""

import json
import math
from collections import Counter

import numpy as np
import pytest

from geodiag.spikes.detector import Spike, SpikeDetector
from geodiag.spikes.loss_curves import Update, find_spikes


def flat(n: int = 600, level: float = 3.0, sigma: float = 0.03, seed: int = 0) -> np.ndarray:
    return level + sigma * np.random.default_rng(seed).standard_normal(n)


def detect(losses, every: int = 1, grads=None, **options) -> list[Spike]:
    """Return the spikes raised on losses that are logged every `every` steps."""
    updates = [
        Update(i * every, float(x), None if grads is None else grads[i])
        for i, x in enumerate(losses)
    ]
    return find_spikes(updates, SpikeDetector(**options))


def kinds(spikes: list[Spike]) -> Counter:
    return Counter(spike.kind for spike in spikes)


# -- spikes and outliers ---------------------------------------------------------------------


def test_a_jump_that_lasts_is_one_spike_with_onset_peak_and_end() -> None:
    losses = flat()
    losses[300:320] += [0.5] * 5 + [1.0] + [0.5] * 14
    (spike,) = detect(losses)
    assert (spike.kind, spike.detected, spike.onset, spike.peak, spike.end) == (
        "spike",
        302,
        300,
        305,
        320,
    )
    assert 20 < spike.score < 50


def test_a_jump_from_2_to_6_is_flagged_once() -> None:
    losses = np.full(600, 2.0)
    losses[300:340] = 6.0
    (spike,) = detect(losses)
    assert (spike.kind, spike.detected, spike.end) == ("spike", 302, 340)


@pytest.mark.parametrize("length", [1, 2])
def test_one_or_two_bad_updates_are_an_outlier_known_when_they_are_over(length: int) -> None:
    losses = flat()
    losses[300 : 300 + length] = 6.0
    (spike,) = detect(losses)
    assert (spike.kind, spike.onset, spike.detected, spike.end) == (
        "outlier",
        300,
        300 + length,
        300 + length,
    )


def test_three_bad_updates_are_a_spike() -> None:
    losses = flat()
    losses[300:303] = 6.0
    (spike,) = detect(losses)
    assert (spike.kind, spike.onset, spike.detected, spike.end) == ("spike", 300, 302, 303)


def test_one_row_is_a_spike_where_rows_are_five_steps_apart() -> None:
    losses = flat()
    losses[300] = 4.0
    (sparse,), (dense,) = detect(losses, every=5), detect(losses)
    assert (sparse.kind, sparse.detected, sparse.onset) == ("spike", 1500, 1500)
    assert dense.kind == "outlier"


def test_one_row_of_a_sparse_log_is_no_spike_where_near_misses_are_common() -> None:
    heavy = 3 + 0.03 * np.random.default_rng(0).standard_t(3, 4000)
    heavy[3000:] = np.minimum(heavy[3000:], 3.1)
    heavy[3500] = 4.0
    assert not [s for s in detect(heavy, every=5) if s.kind == "spike" and s.onset == 17500]
    assert [s.kind for s in detect(heavy, every=5, tails=1.0) if s.onset == 17500] == ["spike"]


def test_a_second_spike_soon_after_the_first_is_detected() -> None:
    losses = flat()
    losses[300:310] += 1.0
    losses[316:326] += 1.0
    assert [(s.onset, s.end) for s in detect(losses)] == [(300, 310), (316, 326)]


def test_a_slow_onset_is_walked_back_from_the_detection() -> None:
    losses = flat()
    losses[300:330] += np.linspace(0.05, 0.5, 30)
    spike = detect(losses)[0]
    assert spike.kind == "spike"
    assert 300 <= spike.onset < spike.detected - 3 <= 312


def test_a_clear_gradient_norm_confirms_an_unclear_loss_but_alone_raises_nothing() -> None:
    losses, grads = flat(), np.exp(0.1 * np.random.default_rng(1).standard_normal(600))
    grads[300:310] *= 20
    assert not detect(losses, grads=grads)
    losses[300:310] = 3 + 4 * 0.03
    with_grads, without = detect(losses, grads=grads), detect(losses)
    assert with_grads[0].kind == "spike"
    assert with_grads[0].detected == 302
    assert not without or without[0].detected > 305


def test_a_spike_that_is_not_over_has_no_end_yet() -> None:
    losses = flat(320)
    losses[300:] += np.linspace(1, 2, 20)
    (spike,) = detect(losses)
    assert (spike.end, spike.peak) == (None, 319)


# -- abnormal losses do not affect later verdicts --------------------------------------------


def test_nan_is_a_spike_and_does_not_blind_the_detector() -> None:
    losses = flat()
    losses[300:303] = [math.nan, math.inf, -math.inf]
    losses[305:310] += 1.0
    first, second = detect(losses)
    assert (first.kind, first.detected, first.onset, first.end, first.score) == (
        "nonfinite",
        300,
        300,
        303,
        math.inf,
    )
    assert (second.kind, second.onset, second.detected) == ("spike", 305, 307)


def test_a_non_finite_loss_from_the_very_first_update_is_reported_once() -> None:
    (spike,) = detect([math.nan] * 50)
    assert (spike.kind, spike.detected, spike.end) == ("nonfinite", 0, None)


def test_a_nan_ends_a_spike_and_is_its_own_event() -> None:
    losses = flat()
    losses[300:306] += 1.0
    losses[306] = math.nan
    assert [(s.kind, s.onset, s.end) for s in detect(losses)] == [
        ("spike", 300, 306),
        ("nonfinite", 306, 307),
    ]


@pytest.mark.parametrize("bad", [6.0, math.nan, math.inf, 1e308])
@pytest.mark.parametrize("length", [1, 2, 100])
def test_nothing_abnormal_enters_the_window_that_judges_the_next_value(
    bad: float, length: int
) -> None:
    clean, hit = SpikeDetector(), SpikeDetector()
    for step, loss in enumerate(flat(300)):
        clean.update(step, loss)
        hit.update(step, loss)
    for step in range(300, 300 + length):
        hit.update(step, bad)
    after = 300 + length
    assert hit.update(after, 3.2).score == clean.update(after, 3.2).score


def test_what_is_in_its_range_does_enter_the_window() -> None:
    still, moved = SpikeDetector(), SpikeDetector()
    for step, loss in enumerate(flat(300)):
        still.update(step, loss)
        moved.update(step, loss)
    for step in range(300, 350):
        moved.update(step, 3.05)
    assert moved.update(350, 3.2).score < still.update(350, 3.2).score - 0.5


def test_a_lasting_shift_becomes_a_divergence_and_then_the_new_normal() -> None:
    losses = flat(1500)
    losses[300:] += 1.0
    losses[1000:1010] += 1.0
    first, second, third = detect(losses)
    assert (first.kind, first.onset, first.detected) == ("spike", 300, 302)
    assert (second.kind, second.onset, second.detected) == ("divergence", 300, first.end)
    assert second.end < 1000
    assert (third.kind, third.onset, third.end) == ("spike", 1000, 1010)


# -- slow divergence -------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_a_slow_climb_is_a_divergence_and_no_spike(seed: int) -> None:
    losses = flat(1500, seed=seed)
    losses[500:] += 0.03 * 0.03 * np.arange(1000)  # 0.03 σ an update
    first = detect(losses)[0]
    assert first.kind == "divergence"
    assert 480 <= first.onset < first.detected < 900


@pytest.mark.parametrize("seed", range(5))
def test_a_plateau_is_no_divergence(seed: int) -> None:
    assert not detect(flat(5000, seed=seed))


def test_a_divergence_ends_when_the_loss_is_back() -> None:
    losses = flat(2000)
    losses[500:1000] += np.linspace(0, 0.4, 500)
    losses[1000:1400] += np.linspace(0.4, 0, 400)
    (spike,) = detect(losses)
    assert spike.kind == "divergence"
    assert spike.peak is not None
    assert spike.end is not None
    assert 900 < spike.peak < 1050 < spike.end < 1500


# -- no false alarms -------------------------------------------------------------------------


def curve(shape: str, n: int = 3000) -> np.ndarray:
    t = np.arange(n)
    return {
        "power law": 2 + 9 * (1 + t / 20) ** -0.5,
        "warm-up bump": np.interp(t, [0, 20, 100, n], [11, 11.2, 7, 2]),
        "learning-rate kinks": np.interp(
            t, [0, 50, 300, 800, 1500, 2200, n], [11, 7, 4, 3.9, 3.2, 3.2, 2.5]
        ),
        "epoch cliffs": np.select([t < 1000, t < 2000], [0.6, 0.3], 0.1),
        "steep exponential": 2 + 9 * np.exp(-t / 30),
    }[shape]


def noise(kind: str, n: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    white, heavy = rng.standard_normal(n), rng.standard_t(3, n)
    if kind.startswith("EMA"):
        return smoothed(heavy if "heavy" in kind else white, 0.9)
    if kind == "AR":
        return smoothed(white, 0.5) * 3**0.5
    return {
        "white": white,
        "heavy": heavy,
        "moving average": np.convolve(rng.standard_normal(n + 9), np.ones(10) / 3)[9:-9],
    }[kind]


def smoothed(values, decay: float) -> np.ndarray:
    out = np.empty(len(values))
    last = values[0]
    for i, value in enumerate(values):
        out[i] = last = decay * last + (1 - decay) * value
    return out


SHAPES = ["power law", "warm-up bump", "learning-rate kinks", "epoch cliffs", "steep exponential"]
NOISES = ["white", "heavy", "AR", "EMA", "EMA heavy", "moving average"]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", NOISES)
def test_healthy_curves_do_not_fire(shape: str, kind: str) -> None:
    raised = Counter()
    for seed in range(2):
        raised += kinds(detect(curve(shape) * (1 + 0.012 * noise(kind, 3000, seed))))
    assert raised["spike"] == raised["divergence"] == raised["nonfinite"] == 0


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", NOISES)
def test_the_same_curves_with_a_planted_spike_fire_there(shape: str, kind: str) -> None:
    planted = np.zeros(3000)
    planted[1700:1730] = 0.35
    if kind.startswith("EMA"):
        planted = smoothed(planted, 0.9)
    elif kind == "moving average":
        planted = np.convolve(planted, np.ones(10) / 10)[:3000]
    losses = curve(shape) * (1 + 0.012 * noise(kind, 3000, 0) + planted)
    found = [s for s in detect(losses) if s.kind == "spike"]
    assert len(found) == 1
    assert 1695 <= found[0].onset <= 1703
    assert found[0].detected <= 1705


@pytest.mark.parametrize("decay", [0.9, 0.98])
def test_in_a_smoothed_log_a_blip_is_an_outlier_and_a_spike_is_a_spike(decay: float) -> None:
    blip, spike = flat(1000, sigma=0.3), flat(1000, sigma=0.3)
    blip[500] += 5
    spike[500:520] += 3
    assert kinds(detect(smoothed(blip, decay)))["spike"] == 0
    found = [s for s in detect(smoothed(spike, decay)) if s.kind == "spike"]
    assert [498 <= s.onset <= 500 for s in found] == [True]


def test_a_loss_logged_with_one_digit_does_not_fire() -> None:
    assert kinds(detect(np.round(flat(4000, 2.5, 0.02), 1)))["spike"] == 0


def test_a_gap_in_the_log_does_not_make_one_row_a_spike() -> None:
    losses = flat(600)
    losses[300] = 6.0
    steps = [i if i < 299 else i + 500 for i in range(600)]
    found = find_spikes(Update(s, float(x)) for s, x in zip(steps, losses, strict=True))
    assert [s.kind for s in found] == ["outlier"]


def test_a_loss_that_explodes_before_there_is_a_trend_is_detected() -> None:
    (spike,) = detect([*np.linspace(11, 8, 8), *[40.0] * 20])
    assert (spike.kind, spike.onset, spike.detected) == ("spike", 8, 10)


# -- going back, saving, resuming ------------------------------------------------------------


def beginning(seed: int, n: int = 150) -> np.ndarray:
    """Return the first losses of a training: a fall of more than 20 σ, then noise of 0.15."""
    return (
        2.2
        + 3.4 * np.exp(-np.arange(n) / 12)
        + 0.15 * np.random.default_rng(seed).standard_normal(n)
    )


@pytest.mark.parametrize("seed", range(10))
def test_soon_after_a_steep_descent_its_lag_is_not_taken_for_noise(seed: int) -> None:
    for at in range(45, 125, 20):
        losses = beginning(seed)
        losses[at : at + 10] += 1.8
        (spike,) = (s for s in detect(losses) if s.kind == "spike")
        assert at <= spike.detected <= at + 4


@pytest.mark.parametrize("seed", range(30))
def test_a_steep_descent_that_ends_is_no_spike(seed: int) -> None:
    assert kinds(detect(beginning(seed)))["spike"] == 0
    corner = np.concatenate([np.linspace(5.6, 2.2, 40), np.full(110, 2.2)])
    assert (
        kinds(detect(corner + 0.15 * np.random.default_rng(seed).standard_normal(150)))["spike"]
        == 0
    )


def test_a_rollback_ends_the_spike_and_is_not_one() -> None:
    losses = flat()
    detector = SpikeDetector()
    for step in range(300):
        detector.update(step, losses[step])
    for step in range(300, 310):
        detector.update(step, 6.0)
    verdict = detector.update(280, 3.0)
    assert (verdict.ended and verdict.ended.end, verdict.active) == (280, False)
    assert not math.isnan(verdict.score)
    assert not any(detector.update(step, losses[step]).raised for step in range(281, 600))


def test_a_rollback_far_back_forgets_the_lower_losses_and_stays_awake() -> None:
    losses = np.linspace(8, 2, 3000) + flat(3000, 0)
    again = losses[500:1000].copy()
    again[300:310] += 3
    updates = [Update(i, float(x)) for i, x in enumerate(losses)]
    updates += [Update(500 + i, float(x)) for i, x in enumerate(again)]
    (spike,) = find_spikes(updates)
    assert (spike.kind, spike.onset, spike.end) == ("spike", 800, 810)
    detector = SpikeDetector()
    for update in updates[:3000]:
        detector.update(*update)
    assert detector.update(3000, 7.0).score > 50  # and without going back, that loss is far out


@pytest.mark.parametrize("cut", [0, 7, 100, 299, 300, 301, 305, 312, 321, 410, 421, 500, 799, 1100])
def test_a_resumed_detector_gives_the_verdicts_of_an_uninterrupted_one(cut: int) -> None:
    losses, grads = smoothed(flat(1200, sigma=0.3), 0.8), np.exp(flat(1200))
    losses[300:310] += 1.0
    losses[320] += 2.0
    losses[400:420] = math.nan
    losses[700:] += 2.0
    whole, before, after = SpikeDetector(), SpikeDetector(), SpikeDetector()
    for step in range(cut):
        whole.update(step, losses[step], grads[step])
        before.update(step, losses[step], grads[step])
    after.load_state_dict(json.loads(json.dumps(before.state_dict(), allow_nan=False)))
    for step in range(cut, 1200):
        one, other = (
            whole.update(step, losses[step], grads[step]),
            after.update(step, losses[step], grads[step]),
        )
        assert repr(one) == repr(other)
    assert after.state_dict() == whole.state_dict()


def test_a_detector_resumed_after_a_steep_descent_gives_the_same_verdicts() -> None:
    losses = 2.0 + 11.0 * np.exp(-np.arange(140) / 15) + 0.02 * flat(140)
    whole, before, after = SpikeDetector(), SpikeDetector(), SpikeDetector()
    for step in range(70):
        whole.update(step, losses[step])
        before.update(step, losses[step])
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    for step in range(70, 140):
        assert repr(whole.update(step, losses[step])) == repr(after.update(step, losses[step]))


def test_the_state_does_not_grow() -> None:
    detector, sizes = SpikeDetector(), []
    for step, loss in enumerate(flat(3000)):
        detector.update(step, loss, 1.0)
        if step in (999, 2999):
            sizes.append(
                sum(
                    len(v)
                    for part in detector.state_dict().values()
                    if isinstance(part, dict)
                    for v in part.values()
                    if isinstance(v, list)
                )
            )
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize(
    "options",
    [{"normal": 6.0}, {"normal": 0.0}, {"hold": 0}, {"warmup": 2}, {"short": 100}, {"noise": 3}],
)
def test_options_that_make_no_sense_are_refused(options: dict) -> None:
    with pytest.raises(ValueError, match="need 0 < normal < threshold"):
        SpikeDetector(**options)
