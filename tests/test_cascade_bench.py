"""The attribution experiment: what is planned, what counts, and how an answer is graded."""

import json
from pathlib import Path

import numpy as np
import pytest

from geodiag.benchmarks import cascade_grades as grades
from geodiag.benchmarks.cascade import main, page
from geodiag.benchmarks.cascade_trials import EARLIEST, LATEST, STEPS, TRUTHS, Trial, plan
from geodiag.errors import GeodiagError
from geodiag.hooks.faults import KINDS, Fault
from geodiag.reference_models.config import TINY


def test_every_kind_of_fault_has_a_truth_and_is_planted_once_a_seed_and_residual() -> None:
    assert {k for k in TRUTHS if not k.startswith("creeping")} == set(KINDS)
    trials = plan([3, 4], ["hc", "mhc"], "tiny", list(TRUTHS), clean=3)
    faults = [t for t in trials if t.kind]
    assert len(faults) == 2 * 2 * len(TRUTHS)
    assert len({t.name for t in trials}) == len(trials)
    assert {t.twin for t in faults} <= {t.name for t in trials}
    assert sum(t.steps > STEPS for t in trials) == 3


def test_faults_are_drawn_from_the_seed_alone_and_can_be_planted() -> None:
    first, again = (plan(range(20), ["mhc"], "tiny", list(TRUTHS), 0) for _ in range(2))
    assert first == again
    faults = [t for t in first if t.faults]
    for t in faults:
        fault = Fault.parse(t.faults[0])
        assert EARLIEST <= fault.step <= LATEST
        assert Fault.parse(t.faults[-1]).step < STEPS - 10
        assert fault.layer is None or fault.layer < TINY.layers
        assert TRUTHS[t.kind].stage != 2 or (fault.layer or 0) >= TINY.hash_layers
    for kind, truth in TRUTHS.items():
        drawn = [t.magnitude for t in faults if t.kind == kind]
        if truth.weakest is not None and truth.weakest != truth.strongest:
            assert len(set(drawn)) > 15
            assert all(truth.weakest <= (m or 0) <= (truth.strongest or 0) for m in drawn)
        assert len({t.layer for t in faults if t.kind == kind}) > 3 or not truth.layered


def test_a_fault_that_creeps_is_planted_again_in_the_same_place() -> None:
    (t,) = [t for t in plan([1], ["mhc"], "tiny", ["creeping expert-scale"], 0) if t.kind]
    parsed = [Fault.parse(f) for f in t.faults]
    assert len(parsed) == 5
    assert len({(f.layer, f.magnitude, f.step % TINY.experts) for f in parsed}) == 1


def test_a_seed_that_is_held_out_has_other_faults() -> None:
    seen, held_out = (plan(seeds, ["mhc"], "tiny", ["expert-scale"], 0) for seeds in (range(10), range(1000, 1010)))
    assert not {t.faults for t in seen} & {t.faults for t in held_out} - {()}


# -- grading ---------------------------------------------------------------------------------


def record(folder: Path, name: str, losses: np.ndarray, *events: tuple[str, int, dict]) -> None:
    from geodiag.events import Event
    from geodiag.run import Run

    run = Run.create(folder / name)
    run.append("steps", {"step": np.arange(len(losses)), "loss": losses})
    for kind, step, data in events:
        run.event(Event(step=step, kind=kind, message=kind, data=data))
    run.close()


def trial(kind: str = "expert-scale", layer: int | None = 2) -> Trial:
    return Trial(seed=0, residual="mhc", size="tiny", steps=170, kind=kind, step=100, layer=layer, magnitude=30.0)


@pytest.fixture
def losses() -> np.ndarray:
    return 2.0 + 0.1 * np.random.default_rng(0).standard_normal(170)


@pytest.mark.parametrize(
    ("rise", "events", "seen", "excluded"),
    [
        (0.2, [], None, True),
        (1.0, [], None, False),  # the loss moved and nothing was said: missed, not excluded
        (0.2, [("early_warning", 103, {})], "warning", False),
        (0.2, [("early_warning", 99, {})], None, True),  # before anything was planted
        (1.0, [("spike", 104, {"onset": 102}), ("early_warning", 101, {})], "spike", False),
        (0.2, [("outlier", 104, {"onset": 102})], None, True),  # over before anybody can act
        (0.2, [("spike", 160, {"onset": 151})], None, True),  # long after
    ],
)
def test_what_counts_as_seen_and_what_is_excluded(tmp_path, losses, rise, events, seen, excluded) -> None:
    ours = losses.copy()
    ours[104] += rise
    record(tmp_path, trial().name, ours, ("fault", 100, {"last_step": 109}), *events)
    record(tmp_path, trial().twin, losses)
    found = grades.grade(trial(), tmp_path)
    assert (found.seen, found.excluded) == (seen, excluded)
    assert found.effect == pytest.approx(rise / 0.1, rel=0.35)


def test_the_warnings_lead_is_counted_to_the_onset_of_the_loss(tmp_path, losses) -> None:
    events = [("early_warning", 103, {}), ("spike", 110, {"onset": 108})]
    record(tmp_path, trial().name, losses, *events)
    record(tmp_path, trial().twin, losses)
    found = grades.grade(trial(), tmp_path)
    assert (found.spiked, found.warned, found.warning_lead) == (108, 103, 5)


def test_a_loss_that_is_no_number_is_an_effect_without_bound(tmp_path, losses) -> None:
    record(tmp_path, trial().name, np.where(np.arange(170) > 105, np.nan, losses))
    record(tmp_path, trial().twin, losses)
    assert grades.grade(trial(), tmp_path).effect == np.inf


def said(**changes):
    from dataclasses import replace

    from geodiag.cascade import Alternative, Cascade

    second = Alternative(stage=3, layer=4, site="ffn", expert=None, onset=101, confidence=0.2, why="")
    found = Cascade(
        spike=None, spike_onset=103, stage=1, layer=2, site="ffn", expert=4, domain=None, onset=100, lead=3,
        cause="layer", confidence=0.9, defence=None, evidence=(), alternatives=(second,), path=(), words="", caveats=(),
    )  # fmt: skip
    return replace(found, **changes)


@pytest.mark.parametrize(
    ("kind", "layer", "answer", "stage", "first", "three"),
    [
        ("expert-scale", 2, {}, True, True, True),
        ("expert-scale", 4, {}, True, False, True),
        ("expert-scale", 5, {}, True, False, False),
        ("gate-column", 2, {}, False, True, True),
        ("far-batch", None, {"stage": "data", "layer": None}, True, True, True),
        ("far-batch", None, {"stage": "data", "layer": 3}, True, False, False),
        ("lr-shock", None, {"stage": None, "layer": None}, True, True, True),
    ],
)
def test_an_answer_is_held_against_what_was_planted(kind, layer, answer, stage, first, three) -> None:
    found = grades.Grade(trial=trial(kind, layer), effect=9.0, seen="spike", spiked=103, cascade=said(**answer))
    assert (found.stage, found.layer(1), found.layer(3)) == (stage, first, three)


def test_the_table_counts_excluded_missed_and_read_faults_apart() -> None:
    right = grades.Grade(trial=trial(), effect=9.0, seen="spike", spiked=103, warned=101, cascade=said())
    wrong = grades.Grade(trial=trial(), effect=9.0, seen="warning", warned=101, cascade=said(stage=2, layer=5))
    missed = grades.Grade(trial=trial(), effect=9.0, seen=None)
    absorbed = grades.Grade(trial=trial(), effect=1.0, seen=None)
    found = grades.summary([right, wrong, missed, absorbed])
    counts = {k: found[k] for k in ("trials", "excluded", "missed", "spikes", "warnings_alone")}
    assert counts == {"trials": 4, "excluded": 1, "missed": 1, "spikes": 1, "warnings_alone": 1}
    assert (found["stage_top1"], found["layer_top1"], found["layer_top3"]) == (0.5, 0.5, 0.5)
    assert (found["expert_top1"], found["lead"]) == (1.0, 3)
    assert (found["warned_before_the_loss"], found["warning_lead"]) == (1.0, 2)


def test_what_was_not_trained_is_said_and_the_rest_is_graded(tmp_path, losses, capsys) -> None:
    planned = plan([5], ["mhc"], "tiny", ["far-batch"], 0)
    for t in planned:
        record(tmp_path / "runs", t.name, losses)
    arguments = ["--seeds", "5-6", "--residuals", "mhc", "--kinds", "far-batch", "--clean", "0", "--grade-only"]
    main([*arguments, "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")])
    assert "2 trials were not trained" in capsys.readouterr().out
    result = json.loads((tmp_path / "out/cascade.json").read_text())
    assert [t["name"] for t in result["trials"]] == ["mhc-5-far-batch"]
    assert result["all"]["excluded"] == 1


def test_a_range_of_seeds_that_is_none_is_said() -> None:
    with pytest.raises(GeodiagError, match="--seeds is FIRST-LAST"):
        main(["--seeds", "7"])


def test_the_page_has_a_row_for_each_kind_and_says_what_is_missing() -> None:
    row = grades.summary([grades.Grade(trial=trial(), effect=9.0, seen="spike", spiked=103, cascade=said())])
    result = {
        "settings": {"size": "tiny", "residuals": ["mhc"], "seeds": "1-2"},
        "kinds": {"expert-scale": row},
        "all": row,
        "clean": {"runs": 2, "steps": 2000, "spikes": 1, "warnings": 0},
        "missing": ["mhc-1-lr-shock"],
        "machine": {"cpu": "x", "cores": 2, "system": "y"},
        "versions": {"torch": "2"},
        "command": "geodiag bench cascade",
    }
    text = page(result)
    assert "| expert-scale | 1 | 0 | 0 | 1 | 0 | 100 % | 100 % | 100 % | 100 % | 3 |" in text
    assert "5.00 in 10,000 steps" in text
    assert "mhc-1-lr-shock" in text
