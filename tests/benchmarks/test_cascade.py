"""The attribution experiment: what is planned, what counts, and how an answer is graded."""

import json
from pathlib import Path

import numpy as np
import pytest

from geodiag.benchmarks import cascade_grades as grades
from geodiag.benchmarks.cascade import main
from geodiag.benchmarks.cascade_table import judged, page, summary
from geodiag.benchmarks.cascade_trials import (
    CLEAN_STEPS,
    EARLIEST,
    GROWN_STEPS,
    LATEST,
    STEPS,
    TRUTHS,
    Trial,
    plan,
)
from geodiag.benchmarks.cascade_workers import in_order
from geodiag.errors import GeodiagError
from geodiag.hooks.faults import KINDS, Fault
from geodiag.reference_models.config import TINY


def test_every_kind_of_fault_has_a_truth_and_is_planted_once_a_seed_and_residual() -> None:
    assert {k for k in TRUTHS if not k.startswith("growing")} == set(KINDS)
    assert {k.removeprefix("growing ") for k in TRUTHS if k.startswith("growing")} <= {
        k for k, v in KINDS.items() if v.grows
    }
    trials = plan([3, 4], ["hc", "mhc"], "tiny", list(TRUTHS), clean=3)
    faults = [t for t in trials if t.kind]
    assert len(faults) == 2 * 2 * len(TRUTHS)
    assert len({t.name for t in trials}) == len(trials)
    assert {t.twin for t in faults} == {
        t.name for t in trials if not t.kind and t.steps != CLEAN_STEPS
    }
    assert sum(t.steps == CLEAN_STEPS for t in trials) == 3


def test_faults_are_drawn_from_the_seed_alone_and_can_be_planted() -> None:
    first, again = (plan(range(20), ["mhc"], "tiny", list(TRUTHS), 0) for _ in range(2))
    assert first == again
    faults = [t for t in first if t.faults]
    for t in faults:
        fault = Fault.parse(t.faults[0])
        assert EARLIEST <= fault.step <= LATEST
        assert fault.step < STEPS - 10
        assert fault.layer is None or fault.layer < TINY.layers
        assert TRUTHS[t.kind].stage != 2 or (fault.layer or 0) >= TINY.hash_layers
    for kind, truth in TRUTHS.items():
        drawn = [t.magnitude for t in faults if t.kind == kind]
        if truth.weakest is not None and truth.weakest != truth.strongest:
            assert len(set(drawn)) > 10
            assert all(truth.weakest <= (m or 0) <= (truth.strongest or 0) for m in drawn)
        assert len({t.layer for t in faults if t.kind == kind}) > 3 or not truth.layered


def test_a_fault_that_grows_does_so_to_the_end() -> None:
    grown = [
        t
        for t in plan(range(20), ["mhc"], "tiny", list(TRUTHS), 0)
        if (t.kind or "").startswith("growing")
    ]
    for t in grown:
        fault = Fault.parse(t.faults[0])
        assert len(fault.planted) >= GROWN_STEPS - LATEST
        assert fault.planted[-1] == t.steps - 1


def test_what_others_need_is_trained_first_and_then_what_takes_long() -> None:
    trials = in_order(plan([7, 8], ["mhc", "hc"], "tiny", ["lr-shock", "far-batch"], clean=2))
    assert [t.kind for t in trials[:6]] == [None] * 6
    assert [t.steps > STEPS for t in trials[:6]] == [False] * 4 + [True] * 2
    assert [t.seed for t in trials[6:]] == [7] * 4 + [8] * 4


def test_a_seed_that_is_held_out_has_other_faults() -> None:
    seen, held_out = (
        plan(seeds, ["mhc"], "tiny", ["expert-scale"], 0)
        for seeds in (range(10), range(1000, 1010))
    )
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


def trial(kind: str | None = "expert-scale", layer: int | None = 2) -> Trial:
    return Trial(
        seed=0,
        residual="mhc",
        size="tiny",
        steps=170,
        kind=kind,
        step=100,
        layer=layer,
        magnitude=30.0,
    )


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
def test_what_counts_as_seen_and_what_is_excluded(
    tmp_path, losses, rise, events, seen, excluded
) -> None:
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
    assert (found.spiked, found.spike_kind, found.warned, found.warning_lead) == (
        108,
        "spike",
        103,
        5,
    )


def test_a_loss_that_is_no_number_is_an_effect_without_bound(tmp_path, losses) -> None:
    record(tmp_path, trial().name, np.where(np.arange(170) > 105, np.nan, losses))
    record(tmp_path, trial().twin, losses)
    assert grades.grade(trial(), tmp_path).effect == np.inf


def said(**changes):
    from dataclasses import replace

    from geodiag.cascade.explain import Alternative, Cascade

    second = Alternative(
        stage=3, layer=4, site="ffn", expert=None, onset=101, confidence=0.2, why=""
    )
    found = Cascade(
        spike=None,
        spike_onset=103,
        stage=1,
        layer=2,
        site="ffn",
        expert=4,
        domain=None,
        onset=100,
        lead=3,
        cause="layer",
        confidence=0.9,
        defence=None,
        evidence=(),
        alternatives=(second,),
        path=(),
        words="",
        caveats=(),
    )
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
def test_an_answer_is_held_against_what_was_planted(
    kind, layer, answer, stage, first, three
) -> None:
    found = grades.Grade(
        trial=trial(kind, layer), effect=9.0, seen="spike", spiked=103, cascade=said(**answer)
    )
    assert (found.stage, found.layer(1), found.layer(3)) == (stage, first, three)


def test_the_table_counts_excluded_missed_and_read_faults_apart() -> None:
    right = grades.Grade(
        trial=trial(), effect=9.0, seen="spike", spiked=103, warned=101, cascade=said()
    )
    wrong = grades.Grade(
        trial=trial(), effect=9.0, seen="warning", warned=101, cascade=said(stage=2, layer=5)
    )
    missed = grades.Grade(trial=trial(), effect=9.0, seen=None)
    absorbed = grades.Grade(trial=trial(), effect=1.0, seen=None)
    found = summary([g.as_json() for g in (right, wrong, missed, absorbed)])
    counts = {k: found[k] for k in ("trials", "excluded", "missed", "spikes", "warnings_alone")}
    assert counts == {"trials": 4, "excluded": 1, "missed": 1, "spikes": 1, "warnings_alone": 1}
    assert (found["stage_top1"], found["layer_top1"], found["layer_top3"]) == (0.5, 0.5, 0.5)
    assert (found["expert_top1"], found["lead"]) == (1.0, 3)
    assert (found["warned"], found["warning_lead"]) == (1.0, 2)


def test_a_warning_that_came_with_the_loss_or_after_it_is_none_before_it() -> None:
    warned = [
        grades.Grade(trial=trial(), effect=9.0, seen="spike", spiked=103, warned=w)
        for w in (95, 103, 105, None)
    ]
    found = summary([g.as_json() for g in warned])
    assert (found["warned"], found["warning_lead"], found["nonfinite"]) == (0.25, 8, 0)


def test_a_loss_that_is_no_number_is_told_from_other_spikes() -> None:
    seen = grades.Grade(trial=trial(), effect=9.0, seen="spike", spiked=103, spike_kind="nonfinite")
    assert summary([seen.as_json()])["nonfinite"] == 1


def test_alarms_before_a_fault_are_false_and_counted_apart(tmp_path, losses) -> None:
    events = [("early_warning", 80, {}), ("spike", 99, {"onset": 97}), ("early_warning", 100, {})]
    record(tmp_path, trial().name, losses, *events)
    record(tmp_path, trial().twin, losses, ("early_warning", 120, {}))
    lines = [grades.line_of(t, tmp_path) | {"place": "here"} for t in (trial(), trial(kind=None))]
    found = judged(lines)
    assert found["before"] == {"runs": 1, "steps": 100, "spikes": 1, "warnings": 1}
    assert found["clean"] == {"runs": 1, "steps": 170, "spikes": 0, "warnings": 1}


def test_what_was_not_trained_is_said_and_the_rest_is_graded(tmp_path, losses, capsys) -> None:
    planned = plan([5], ["mhc"], "tiny", ["far-batch"], 0)
    for t in planned:
        record(tmp_path / "runs", t.name, losses)
    arguments = [
        "--seeds",
        "5-6",
        "--residuals",
        "mhc",
        "--kinds",
        "far-batch",
        "--clean",
        "0",
        "--grade-only",
    ]
    main([*arguments, "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")])
    assert "2 trials were not trained" in capsys.readouterr().out
    result = json.loads((tmp_path / "out/cascade.json").read_text())
    lines = tmp_path / "out/cascade.jsonl"
    names = {json.loads(t)["name"] for t in lines.read_text().splitlines()}
    assert names == {"mhc-5-clean-170", "mhc-5-far-batch"}, "in any order: two processes grade them"
    assert result["trials"] == 2
    assert result["all"]["excluded"] == 1
    with lines.open("a") as file:
        file.write('{"name": "mhc-6-cle')  # the machine was taken away
    main([*arguments[:-1], "--minutes", "0", "--add", str(lines), "--out", str(tmp_path / "again")])
    again = json.loads((tmp_path / "again/cascade.json").read_text())
    assert {k: again[k] for k in ("trials", "all", "missing")} == {
        k: result[k] for k in ("trials", "all", "missing")
    }


def test_a_range_of_seeds_that_is_none_is_said() -> None:
    with pytest.raises(GeodiagError, match="--seeds is FIRST-LAST"):
        main(["--seeds", "7"])


def test_the_page_has_a_row_for_each_kind_and_says_what_is_missing() -> None:
    seen = grades.Grade(
        trial=trial(),
        effect=9.0,
        seen="spike",
        spiked=103,
        cascade=said(),
        before={"steps": 100, "spikes": 0, "warnings": 0},
    )
    calm = {"name": "long", "kind": None, "seed": 3, "steps": 2000, "spikes": 1, "warnings": 0}
    result = {
        "settings": {"size": "tiny", "residuals": ["mhc"], "seeds": "1-2"},
        "missing": ["mhc-1-lr-shock"],
        "command": "geodiag bench cascade",
        **judged([line | {"place": "two cores"} for line in (seen.as_json(), calm)]),
    }
    text = page(result)
    assert "| expert-scale | 1 | 0 | 0 | 1 | 0 | 100 % | 100 % | 100 % | 100 % | 3 |" in text
    assert "| **growing** | 0 |" in text
    assert "1 runs, 2000 steps, 1 spikes and 0 warnings raised: 5.00 in 10,000 steps" in text
    assert "1 runs, 100 steps, 0 spikes and 0 warnings raised: 0.00 in 10,000 steps" in text
    assert "mhc-1-lr-shock" in text
    assert "two cores" in text
