"""Early warning: rare, before the loss, and reported once."""

from pathlib import Path

import numpy as np
import pytest

from geodiag.anomaly.metric_roles import SeriesPlace
from geodiag.cascade.early_warning import (
    SETTLING,
    EarlyWarning,
    EarlyWarningDetector,
    PendingWarning,
)
from geodiag.events import details
from geodiag.run import open_run
from geodiag.spikes.detector import Verdict

PLACES = [
    SeriesPlace(0, "ffn", "data"),
    SeriesPlace(1, "ffn", "router"),
    SeriesPlace(2, "ffn", "experts"),
    SeriesPlace(2, "ffn", "write"),
    SeriesPlace(3, "ffn", "gradient"),
]


def warnings_of(scores_SK: np.ndarray) -> list[EarlyWarning]:
    """Return every warning over the steps."""
    early = EarlyWarningDetector()
    found = [early.update(t, PLACES, row) for t, row in enumerate(scores_SK)]
    return [w for w in found if w is not None]


def calm(steps: int = 400, seed: int = 0) -> np.ndarray:
    return np.abs(np.random.default_rng(seed).standard_normal((steps, len(PLACES))))


def test_noise_and_odd_batches_warn_of_nothing() -> None:
    rows = calm(20_000)
    rows[::50] += 12  # one odd batch out of fifty moves everything
    rows[1::50, 3] += 12  # and one place a step longer
    assert warnings_of(rows) == []


def test_what_stays_out_of_range_warns_at_its_third_sample_with_its_place_and_its_onset() -> None:
    rows = calm()
    rows[200:, 2] = 40
    (found,) = warnings_of(rows)
    assert (found.step, found.since) == (202, 200)
    assert (found.stage, found.layer, found.site, found.part) == (1, 2, "ffn", "experts")
    assert found.score == 40
    assert "layer 2, ffn" in str(found)


def test_a_warning_is_reported_once_and_later_alarms_belong_to_it() -> None:
    rows = calm()
    rows[200:, 2] = 40
    rows[210:, 3] = 40
    rows[225:, 4] = 40
    assert len(warnings_of(rows)) == 1


def test_after_a_calm_the_next_warning_is_reported() -> None:
    rows = calm()
    rows[150:170, 2] = 40
    rows[300:, 1] = 40
    assert [(w.since, w.stage) for w in warnings_of(rows)] == [(150, 1), (300, 2)]


def test_of_places_that_move_together_the_first_in_the_order_of_the_step_is_named() -> None:
    rows = calm()
    rows[200:, 1:] = 30
    (found,) = warnings_of(rows)
    assert (found.stage, found.layer) == (2, 1)
    rows[200:, 0] = 30
    (found,) = warnings_of(rows)
    assert (found.stage, found.layer) == ("data", None)


def reported_steps(news: int, scores: dict[int, float], active: range = range(0)) -> list[int]:
    """Return the steps at which the warning of step `news` is reported."""
    waiting, found = PendingWarning(normal=3.0, wait=5), []
    warning = EarlyWarning(
        step=news, since=news - 2, stage=1, layer=2, site="ffn", part="experts", score=9.0
    )
    for t in range(news, news + 20):
        verdict = Verdict(scores.get(t, 1.0), None, None, t in active)
        out = waiting.update(t, warning if t == news else None, verdict)
        found += [out.step] if out else []
        assert out is None or out.since == news - 2
    return found


def test_while_the_loss_is_out_of_range_too_a_warning_waits_for_the_detector() -> None:
    odd = dict.fromkeys(range(100, 120), 4.0)
    assert reported_steps(100, {}) == [100]
    assert reported_steps(100, odd, active=range(102, 120)) == []
    assert reported_steps(100, odd) == [105], "what the detector leaves open is warned of"
    assert reported_steps(100, {100: 4.0, 101: 4.0}) == [102]
    assert reported_steps(100, {}, active=range(90, 120)) == []


def test_a_training_that_settles_raises_no_warning() -> None:
    rows = calm()
    rows[20:SETTLING, 2] = 40
    assert warnings_of(rows) == []


def test_unsampled_steps_neither_add_nor_calm() -> None:
    rows = np.full((4000, len(PLACES)), np.nan)
    rows[::10] = calm(400)
    rows[2000::10, 2] = 40
    (found,) = warnings_of(rows)
    assert (found.step, found.since) == (2020, 2000)


def test_places_that_come_later_keep_what_is_known_of_the_others() -> None:
    early = EarlyWarningDetector()
    rows = calm()
    rows[150:, 2] = 40
    for t in range(151):
        assert early.update(t, PLACES[:3], rows[t, :3]) is None
    later = [early.update(t, PLACES, rows[t]) for t in range(151, 160)]
    assert [w.since for w in later if w] == [150]


def test_an_alarm_that_two_samples_reach_is_refused() -> None:
    with pytest.raises(ValueError, match="two samples"):
        EarlyWarningDetector(alarm=10, allowed=5, most=11)


@pytest.mark.slow
def test_a_broken_expert_warns_in_a_real_training_before_anything_else_is_raised(
    tmp_path: Path,
) -> None:
    from geodiag.hooks.faults import plant
    from tests.hooks.small import one_step, tokens, trainer, watch

    t, warned = trainer(), []
    with watch(t, tmp_path / "run") as monitor:
        faults = plant(t.model, "expert-scale@90:1=30")
        for step in range(100):
            faults.before_step(step)
            one_step(t, tokens(step), monitor)
            assert monitor.last is not None
            warned += [monitor.last.warning] if monitor.last.warning else []
    (found,) = warned
    assert (found.stage, found.layer, found.since) == (1, 1, 90)
    rows = open_run(tmp_path / "run").read_arrow("events").to_pylist()
    (event,) = [e for e in rows if e["kind"] == "early_warning"]
    assert (event["step"], event["layer"], event["site"]) == (found.step, 1, "ffn")
    assert details(event["data"])["since"] == 90
    assert event["message"] == str(found)


@pytest.mark.slow
def test_the_scores_of_a_training_are_those_that_its_record_gives_afterwards(
    tmp_path: Path,
) -> None:
    from geodiag.anomaly.series_window import read_series
    from geodiag.anomaly.stage_scores import StageScorer
    from tests.hooks.small import train, trainer, watch

    t = trainer()
    with watch(t, tmp_path / "run", probe_every=5) as monitor:
        train(t, 60, monitor)
    run = open_run(tmp_path / "run")
    tracks = read_series(run, 0, 59)
    scores = StageScorer(tracks.series, tracks.hashed)
    again = [scores.by_stage(scores.by_place(scores.update(v))) for v in tracks.values_SP]
    steps = run.read("steps").sort_values("step")
    for stage in (1, 2, 3):
        recorded = steps[f"stage{stage}_score"].to_numpy(float)
        np.testing.assert_allclose(recorded, [z[stage] for z in again], rtol=1e-3, atol=1e-3)
        assert np.isfinite(recorded).sum() > 40
