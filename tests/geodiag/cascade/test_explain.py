"""Cascades on made-up runs: the origin is what moved first in the order of causes, and nothing
else.
"""

import json
from pathlib import Path

import numpy as np
import pytest

import geodiag
from geodiag.anomaly.excursions import excursions
from geodiag.cascade.explain import cascades, explain, stage_map
from geodiag.cascade.stage_map import CALM
from geodiag.errors import GeodiagError
from geodiag.events import Event
from tests.geodiag.cascade.planted import Planted

KEYS = {
    "spike_onset",
    "stage",
    "layer",
    "site",
    "expert",
    "onset",
    "lead",
    "confidence",
    "defence",
    "evidence",
}


def expert_fault(at: int = 230, layer: int = 2, **options: object) -> Planted:
    """Expert 3 blows up; in the same step the streams from there on follow, and the gradients
    before it.
    """
    planted = Planted(**options)  # type: ignore[arg-type]
    for name in ("act_rms", "act_amax"):
        planted.shift(name, layer, "ffn", at, 2.0, expert=3)
    planted.shift("gate_amax", layer, "ffn", at, 1.5).shift(
        "transport_gain_fwd", layer, "ffn", at, 3.0
    )
    for later in range(layer, planted.layers):
        planted.shift("stream_rms", later, "ffn", at, 4.0)
    for earlier in range(layer):
        planted.shift("grad_norm", earlier, "ffn", at, 3.0)
    return planted


def test_an_expert_that_blows_up_is_the_origin_and_not_what_it_reaches_in_the_same_step(
    tmp_path: Path,
) -> None:
    found = explain(expert_fault().write(tmp_path / "run"))
    assert (found.stage, found.layer, found.site, found.expert) == (1, 2, "ffn", 3)
    assert (found.onset, found.lead, found.spike_onset) == (230, 20, 250)
    assert found.defence == "SwiGLU clamping"
    assert found.confidence > 0.8
    assert {e.metric for e in found.evidence} >= {"act_rms", "act_amax", "gate_amax"}
    assert "20 steps before the loss" in found.words
    assert "layer 2, ffn, expert 3" in found.words


def test_the_path_goes_from_the_origin_to_the_loss_in_time(tmp_path: Path) -> None:
    path = explain(expert_fault().write(tmp_path / "run")).path
    assert (path[0].stage, path[0].layer, path[0].step) == (1, 2, 230)
    assert (path[-1].metric, path[-1].step) == ("loss", 250)
    assert [o.step for o in path] == sorted(o.step for o in path)
    assert {o.layer for o in path if o.stage == 3} >= {2, 3}


@pytest.mark.parametrize(
    ("metric", "site", "stage", "defence"),
    [
        ("act_amax", "ffn", 1, "SwiGLU clamping"),
        ("flip_rate_router", "ffn", 2, "anticipatory routing"),
        ("spectral_norm_router", "ffn", 2, "anticipatory routing"),
        ("amax_gain_fwd", "attn", 3, "mHC"),
        ("transport_gain_fwd", "ffn", 3, "mHC"),
        ("grad_norm", "ffn", 3, "gradient"),
    ],
)
def test_a_stage_is_the_part_of_the_layer_that_moved(
    tmp_path: Path, metric: str, site: str, stage: int, defence: str
) -> None:
    found = explain(Planted().shift(metric, 1, site, 240, 2.0).write(tmp_path / "run"))
    assert (found.stage, found.layer, found.site, found.onset) == (stage, 1, site, 240)
    assert defence in (found.defence or "")


def test_of_two_layers_the_earlier_in_time_is_the_origin_and_the_other_an_alternative(
    tmp_path: Path,
) -> None:
    planted = Planted().shift("gate_amax", 3, "ffn", 230, 2.0).shift("max_vio", 1, "ffn", 236, 3.0)
    found = explain(planted.write(tmp_path / "run"))
    assert (found.stage, found.layer) == (1, 3)
    assert [(a.stage, a.layer, a.onset) for a in found.alternatives] == [(2, 1, 236)]
    assert found.alternatives[0].confidence < found.confidence


def test_in_one_step_the_forward_goes_before_the_gradients_and_the_router_before_its_experts(
    tmp_path: Path,
) -> None:
    planted = Planted().shift("grad_norm", 3, "ffn", 240, 4.0).shift("act_amax", 2, "ffn", 240, 4.0)
    found = explain(planted.shift("router_entropy", 2, "ffn", 240, 2.0).write(tmp_path / "run"))
    assert (found.stage, found.layer) == (2, 2)


def test_what_gathers_over_layers_is_never_an_origin(tmp_path: Path) -> None:
    planted = Planted()
    for layer in (2, 3):
        planted.shift("stream_rms", layer, "ffn", 240, 3.0).shift(
            "composite_gain_fwd", layer, "ffn", 240, 3.0
        )
    found = explain(planted.write(tmp_path / "run"))
    assert found.onset is None


def test_loads_of_a_hash_router_blame_the_batch(tmp_path: Path) -> None:
    planted = Planted()
    for name in ("max_vio", "load_cv"):
        planted.shift(name, 0, "ffn", 249, -2.0)
    planted.shift("grad_norm", 2, "ffn", 249, 3.0)
    found = explain(planted.write(tmp_path / "run"))
    assert (found.stage, found.layer, found.expert, found.onset) == ("data", None, None, 249)
    assert found.cause == "data"
    assert "batch" in found.words


def test_the_same_loads_of_a_learned_router_blame_the_router(tmp_path: Path) -> None:
    planted = Planted()
    for name in ("max_vio", "load_cv"):
        planted.shift(name, 1, "ffn", 249, 2.0)
    found = explain(planted.write(tmp_path / "run"))
    assert (found.stage, found.layer) == (2, 1)


def test_a_learning_rate_off_its_schedule_is_named_and_no_layer_is_blamed(tmp_path: Path) -> None:
    lr = np.linspace(1e-3, 5e-4, 300)
    lr[238:248] *= 20
    planted = Planted(lr=lr)
    for layer in range(4):
        planted.shift("transport_gain_fwd", layer, "ffn", 239, 2.0)
    found = explain(planted.write(tmp_path / "run"))
    assert (found.cause, found.stage, found.layer, found.onset) == ("lr", None, None, 238)
    assert found.evidence[0].metric == "lr"
    assert found.evidence[0].value / found.evidence[0].usual == pytest.approx(20, rel=0.02)
    assert "learning rate" in found.words


def test_where_the_learning_rate_is_the_answer_the_likeliest_layer_is_the_first_alternative(
    tmp_path: Path,
) -> None:
    lr = np.full(300, 1e-3)
    lr[226:] *= 20
    found = explain(expert_fault(lr=lr).write(tmp_path / "run"))
    assert found.cause == "lr"
    assert (
        found.alternatives[0].stage,
        found.alternatives[0].layer,
        found.alternatives[0].expert,
    ) == (1, 2, 3)


def test_a_learning_rate_that_was_raised_long_before_is_not_blamed(tmp_path: Path) -> None:
    lr = np.where(np.arange(300) < 150, 1e-3, 1.5e-3)
    found = explain(expert_fault(lr=lr).write(tmp_path / "run"))
    assert (found.cause, found.stage, found.layer, found.onset) == ("layer", 1, 2, 230)


def test_a_rising_schedule_is_continued_in_the_usual_value(tmp_path: Path) -> None:
    lr = np.linspace(1e-4, 3e-2, 300)
    lr[240:] = 0.2
    found = explain(Planted(lr=lr).write(tmp_path / "run"))
    assert found.evidence[0].usual == pytest.approx(2 * lr[239] - lr[238])


def test_a_learning_rate_that_creeps_away_is_named_from_where_it_began(tmp_path: Path) -> None:
    lr = 1e-3 * 1.06 ** np.maximum(np.arange(300) - 219, 0)
    found = explain(expert_fault(lr=lr).write(tmp_path / "run"))
    assert (found.cause, found.layer, found.onset) == ("lr", None, 220)
    assert found.evidence[0].usual == pytest.approx(1e-3)


def test_a_learning_rate_that_crept_up_long_before_is_not_blamed(tmp_path: Path) -> None:
    lr = 1e-3 * 1.06 ** np.clip(np.arange(300) - 150, 0, 40)
    found = explain(expert_fault(lr=lr).write(tmp_path / "run"))
    assert (found.cause, found.layer) == ("layer", 2)


def test_a_warm_up_is_no_kink(tmp_path: Path) -> None:
    lr = np.minimum(np.arange(1, 301) / 290, 1.0) * 1e-3
    found = explain(expert_fault(lr=lr).write(tmp_path / "run"))
    assert found.cause == "layer"


def test_where_nothing_moved_before_the_loss_that_is_the_answer(tmp_path: Path) -> None:
    found = explain(Planted().write(tmp_path / "run"))
    assert (found.stage, found.layer, found.onset, found.lead, found.defence) == (None,) * 5
    assert found.confidence == 0
    assert "No internal precursor found" in found.words
    assert found.path[-1].step == 250


def test_what_moves_after_the_loss_did_is_no_origin(tmp_path: Path) -> None:
    found = explain(expert_fault(at=254).write(tmp_path / "run"))
    assert found.onset is None


def test_one_odd_batch_long_before_is_no_origin(tmp_path: Path) -> None:
    planted = expert_fault()
    planted.shift("transport_gain_bwd", 0, "attn", 200, 1.5, last=200).shift(
        "up_amax", 1, "ffn", 215, 1.0, last=216
    )
    found = explain(planted.write(tmp_path / "run"))
    assert (found.layer, found.onset) == (2, 230)


def test_a_fault_that_stays_is_the_origin_of_a_loss_that_follows_late(tmp_path: Path) -> None:
    found = explain(expert_fault(at=150).write(tmp_path / "run"))
    assert (found.layer, found.onset, found.lead) == (2, 150, 100)


def test_a_fault_that_grows_slowly_is_dated_to_where_it_left_its_range(tmp_path: Path) -> None:
    planted = Planted()
    for t in range(200, 250):
        planted.shift("gate_amax", 1, "ffn", t, 0.03)
    found = explain(planted.write(tmp_path / "run"))
    assert (found.stage, found.layer) == (1, 1)
    assert found.onset is not None
    assert 203 < found.onset < 225


def test_a_fault_event_is_not_read_and_a_lie_in_it_changes_nothing(tmp_path: Path) -> None:
    honest = expert_fault().write(tmp_path / "honest")
    lying = expert_fault().write(tmp_path / "lying", close=False)
    details = {"kind": "router-shift", "magnitude": 3.0, "last_step": 245}
    lying.event(
        Event(
            step=244, kind="fault", message="planted router-shift", layer=0, expert=1, data=details
        )
    )
    lying.event(
        Event(
            step=200,
            kind="early_warning",
            message="layer 0",
            layer=0,
            site="attn",
            data={"stage": 3},
        )
    )
    lying.close()
    assert explain(lying).as_json() == explain(honest).as_json()
    other = expert_fault(layer=1).write(tmp_path / "other")
    assert explain(other).as_json() != explain(honest).as_json()


def test_a_spike_is_asked_for_by_number_by_step_or_as_it_is(tmp_path: Path) -> None:
    run = expert_fault().write(tmp_path / "run", close=False)
    expert_fault().record_spike(run, 120)
    run.close()
    assert [c.spike_onset for c in cascades(run)] == [120, 250]
    assert explain(run, 0).spike_onset == 120
    assert explain(run, -1).spike_onset == 250
    assert explain(run, 253).spike_onset == 250
    spikes = [c.spike for c in cascades(run)]
    assert geodiag.explain(tmp_path / "run", 1).spike == spikes[1]


def test_a_step_without_a_spike_can_be_asked_about(tmp_path: Path) -> None:
    found = explain(expert_fault(spike=None).write(tmp_path / "run"), 235)
    assert found.spike is None
    assert (found.layer, found.onset, found.lead) == (2, 230, 5)
    with pytest.raises(GeodiagError, match="--spike"):
        explain(tmp_path / "run", 400)
    with pytest.raises(GeodiagError, match="no spike"):
        explain(tmp_path / "run")


def test_as_json_every_key_is_there_and_unknowns_are_null(tmp_path: Path) -> None:
    found = explain(expert_fault().write(tmp_path / "a")).as_json()
    nothing = explain(Planted().write(tmp_path / "b")).as_json()
    for data in (found, nothing):
        assert set(data) >= KEYS | {"alternatives", "path", "words", "caveats"}
        json.dumps(data, allow_nan=False)
    assert nothing["stage"] is None
    assert nothing["layer"] is None
    assert found["evidence"][0]["unit"]


def test_metrics_that_are_not_numbers_any_more_point_at_where_they_began(tmp_path: Path) -> None:
    planted = (
        Planted()
        .shift("act_amax", 2, "ffn", 245, np.inf)
        .shift("stream_amax", 2, "ffn", 245, np.inf)
    )
    found = explain(
        planted.shift("transport_gain_fwd", 3, "ffn", 245, np.inf).write(tmp_path / "run")
    )
    assert (found.stage, found.layer, found.onset) == (1, 2, 245)


# -- the stage map ---------------------------------------------------------------------------


def test_the_stage_map_shows_the_fault_in_its_stage_layer_and_steps(tmp_path: Path) -> None:
    run = Planted().shift("max_vio", 2, "ffn", 240, 3.0, last=248).write(tmp_path / "run")
    picture = stage_map(run, 200, 260)
    assert picture.scores.shape == (3, 4, 61)
    assert picture.scores.dtype == np.float32
    hot = np.argwhere(picture.scores > 6)
    assert {(s + 1, picture.layers[i]) for s, i, _ in hot} == {(2, 2)}
    assert set(picture.steps[hot[:, 2]]) == set(range(240, 249))


def test_a_picture_is_calm_again_after_a_lasting_change_and_the_origin_is_found_all_the_same(
    tmp_path: Path,
) -> None:
    run = expert_fault(at=170).write(tmp_path / "run")
    picture = stage_map(run, 160, 299)
    row = picture.scores[0, list(picture.layers).index(2)]
    since = picture.steps - 170
    assert row[(since >= 0) & (since < CALM)].min() > 20
    assert row[since > CALM].max() < 8
    found = explain(run)
    assert (found.stage, found.layer, found.expert, found.onset, found.lead) == (1, 2, 3, 170, 80)


def test_what_was_not_sampled_is_nan_in_the_stage_map(tmp_path: Path) -> None:
    picture = stage_map(Planted(every=5).write(tmp_path / "run"), 200, 260)
    sampled = np.isfinite(picture.scores).any((0, 1))
    assert set(picture.steps[sampled]) == set(range(200, 261, 5))


# -- onsets ----------------------------------------------------------------------------------


def test_an_excursion_begins_with_its_first_sample_out_of_range_and_not_with_earlier_noise() -> (
    None
):
    score = np.ones(60)
    score[20] = 6.0
    score[30:40] = 8.0
    (found,) = excursions(score)
    assert (found.start, found.alarm) == (30, 32)
    assert 40 <= found.end <= 50
    assert found.strength == 8.0


def test_noise_and_single_odd_samples_make_no_excursion() -> None:
    rng = np.random.default_rng(0)
    score = np.abs(rng.standard_normal(5000))
    score[::100] = 10.0
    assert excursions(score) == []


def test_unsampled_steps_decide_nothing() -> None:
    score = np.full(100, np.nan)
    score[::10] = 1.0
    score[50::10] = 9.0
    (found,) = excursions(score)
    assert found.start == 50


@pytest.mark.slow
def test_a_real_training_with_a_broken_expert_is_explained_while_it_goes_on(tmp_path: Path) -> None:
    from geodiag.hooks.faults import plant
    from tests.hooks.small import one_step, tokens, trainer, watch

    t = trainer()
    with watch(t, tmp_path / "run") as monitor:
        faults = plant(t.model, "expert-scale@101:1=30")
        for step in range(106):
            faults.before_step(step)
            one_step(t, tokens(step), monitor)
        live = explain(tmp_path / "run", 104)
    after = explain(tmp_path / "run", 104)
    for found in (live, after):
        assert (found.stage, found.layer, found.site, found.expert, found.onset) == (
            1,
            1,
            "ffn",
            101 % 4,
            101,
        )


def test_what_grows_too_slowly_to_be_noticed_is_found_against_what_was_usual_long_ago(
    tmp_path: Path,
) -> None:
    planted = Planted()
    for t in range(200, 250):
        planted.shift("gate_amax", 1, "ffn", t, 0.015)
    found = explain(planted.write(tmp_path / "run"))
    assert (found.stage, found.layer) == (1, 1)
    assert any("slow drift" in c for c in found.caveats)
    assert found.confidence < 0.6
    steady = Planted().shift("gate_amax", 1, "ffn", 150, 0.1)  # elsewhere, and settled there
    assert explain(steady.write(tmp_path / "steady")).onset is None


def test_a_learning_rate_off_its_schedule_is_named_even_where_no_layer_moved(
    tmp_path: Path,
) -> None:
    lr = np.full(300, 1e-3)
    lr[248:] *= 10
    found = explain(Planted(lr=lr).write(tmp_path / "run"))
    assert (found.cause, found.layer, found.onset) == ("lr", None, 248)


def test_a_spike_that_training_went_back_from_is_over(tmp_path: Path, cli) -> None:
    run = Planted(spike=None).write(tmp_path / "run", close=False)
    data = {"kind": "spike", "detected": 254, "onset": 250, "peak": 252, "end": None, "score": 9.0}
    run.event(Event(step=254, kind="spike", message="", data=data))
    assert "still on" in cli("cascade", tmp_path / "run").output
    run.next_attempt()
    run.event(Event(step=240, kind="recovered", message="", data=data | {"end": 240}))
    run.close()
    assert "rolled back to step 240" in cli("cascade", tmp_path / "run").output
    for step in (250, 254):
        assert explain(tmp_path / "run", step).spike == data | {"end": 240}
