"""The routing bench: what a spike cost is counted by hand here, and one small plan is really
trained.
"""

import gzip
import json
import math
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from geodiag.benchmarks import routing, routing_cost, routing_workers
from geodiag.benchmarks.routing_measures import (
    CAP,
    WINDOW,
    Mean,
    against_twin,
    by_itself,
    common,
    pooled,
    summarise,
)
from geodiag.benchmarks.routing_page import page
from geodiag.benchmarks.routing_plan import NATURAL, PILOT_SEED, Job, jobs, pilot, plans
from geodiag.benchmarks.routing_trial import perturb


def trial(
    losses: list[float | None],
    steps: list[int] | None = None,
    arm: str = "none",
    seed: int = 0,
    **more: Any,
):
    return {
        "scenario": {
            "name": "s",
            "fault": more.get("fault", "lr-shock@5"),
            "steps": len(losses),
            "size": "tiny",
        },
        "arm": {"name": arm, "mode": "off" if arm == "none" else "auto", "actions": arm},
        "seed": seed,
        "twin": "healthy",
        "onset": 5,
        "steps": steps or list(range(len(losses))),
        "losses": losses,
        "events": more.get("events", []),
        "flips": {"flip_rate_anticipatory": None, "flip_rate_router": 0.25},
    }


def twin(steps: int = 30, seed: int = 0) -> dict[str, Any]:
    return trial([2.0] * steps, seed=seed, fault=None) | {
        "scenario": {"name": "healthy", "fault": None, "steps": steps, "size": "tiny"}
    }


def test_a_spike_costs_its_area_above_the_twin_until_it_is_back() -> None:
    seen = trial([2.0] * 5 + [5.0, 4.0, 3.0] + [2.0] * 22)
    found = against_twin(seen, twin(), onset=5)
    assert (found["peak"], found["excess"]) == (3.0, 6.0)
    assert found["recovery_steps"] == WINDOW, "only the first window's median is out"
    assert (found["never_recovered"], found["steps_lost"], found["final_loss"]) == (0, 0, 0)


def test_what_was_rolled_back_counts_and_is_lost() -> None:
    steps = [*range(8), *range(4, 30)]
    seen = trial([2.0] * 5 + [5.0, 5.0, 5.0] + [2.0] * 26, steps)
    found = against_twin(seen, twin(), onset=5)
    assert (found["excess"], found["steps_lost"], found["final_loss"]) == (9.0, 4, 0)


def test_a_loss_that_stays_up_never_recovers() -> None:
    found = against_twin(trial([2.0] * 5 + [3.0] * 25), twin(), onset=5)
    assert (found["never_recovered"], found["recovery_steps"]) == (1, 25)
    assert found["final_loss"] == 1.0


def test_a_loss_that_is_not_finite_counts_as_the_cap() -> None:
    found = against_twin(trial([2.0] * 5 + [None, 1e30] + [2.0] * 23), twin(), onset=5)
    assert (found["peak"], found["excess"]) == (CAP - 2, 2 * (CAP - 2))


def test_without_a_twin_the_trend_is_its_own() -> None:
    falling = [3 - 0.01 * i for i in range(100)]
    calm = by_itself(trial(falling), 100)
    spiky = by_itself(trial([x + 2 * (50 <= i < 55) for i, x in enumerate(falling)]), 100)
    assert calm["excess"] == 0
    assert spiky["excess"] == pytest.approx(5 * (2 - 0.3), abs=1)
    assert spiky["final_loss"] == pytest.approx(calm["final_loss"])


def test_arms_are_compared_seed_by_seed() -> None:
    trials = []
    for seed in range(4):
        high = 3.0 + seed  # seeds differ far more than arms do
        trials += [twin(seed=seed), trial([2.0] * 5 + [high] + [2.0] * 24, seed=seed)]
        trials += [trial([2.0] * 5 + [high - 0.5] + [2.0] * 24, arm="rollback", seed=seed)]
    row = next(r for r in summarise(trials) if r["arm"] == "rollback")
    assert row["seeds"] == [0, 1, 2, 3]
    assert row["against_none"]["excess"]["mean"] == -0.5
    assert row["against_none"]["excess"]["high"] == -0.5
    assert (
        row["measures"]["excess"]["low"]
        < row["measures"]["excess"]["mean"]
        < row["measures"]["excess"]["high"]
    )


def test_natural_spikes_are_pooled_in_pairs_and_healthy_twins_are_left_out() -> None:
    trials = [
        twin(),
        trial([9.0] * 30, arm="always", fault=None) | {"scenario": twin()["scenario"]},
    ]
    for seed, better in ((0, 0.25), (1, 0.75)):
        trials += [trial([2.0] * 30, fault=None, seed=seed)]
        trials += [trial([2.0] * 25 + [2.0 - better] * 5, arm="always", fault=None, seed=seed)]
    (row,) = pooled(trials)
    assert (row["arm"], row["final_loss"]["n"]) == ("always", 2)
    assert row["final_loss"]["mean"] == -0.5 * 5 / 20


def test_an_interval_narrows_with_seeds_and_leaves_out_what_is_unknown() -> None:
    few, many = Mean.of([0.0, 1.0] * 3), Mean.of([0.0, 1.0] * 50)
    assert few.high - few.low > 2 * (many.high - many.low) > 0
    assert Mean.of([1.0, None, math.nan]).n == 1  # type: ignore[list-item]
    assert Mean.of([]).n == 0


def test_spikes_are_counted_by_executed_steps() -> None:
    events = [
        {"kind": k, "step": 1, "data": {}} for k in ("spike", "outlier", "divergence", "decision")
    ]
    row = next(
        r for r in summarise([trial([2.0] * 100, fault=None, events=events)]) if r["arm"] == "none"
    )
    assert row["measures"]["spikes_per_10k"]["mean"] == 200


@pytest.mark.parametrize(
    ("arm", "onsets", "expected"),
    [
        ("rollback", [50, 60], 1.0),
        ("rollback", [50, 200], 0.0),
        ("rollback", [], None),
        ("route", [50, 60], None),
    ],
)
def test_a_spike_comes_again_where_another_is_raised_near_its_onset(
    arm: str, onsets: list[int], expected: float | None
) -> None:
    events = [{"kind": "spike", "step": o, "data": {"onset": o}} for o in onsets]
    assert common(trial([2.0] * 300, arm=arm, events=events))["again"] == expected


def test_a_change_has_the_steps_from_the_first_snapshot_gone_back_to() -> None:
    def decision(restore: int | None, acted: bool = True) -> dict[str, Any]:
        return {"kind": "decision", "step": 60, "data": {"restore": restore, "acted": acted}}

    spike = {"kind": "spike", "step": 55, "data": {"onset": 50}}
    back = trial(
        [2.0] * 90,
        arm="rollback",
        events=[spike, decision(None), decision(40), spike, decision(20)],
    )
    assert common(back)["steps_before"] == 10
    assert (
        common(trial([2.0] * 90, events=[spike, decision(40, acted=False)]))["steps_before"] is None
    )


def test_without_a_twin_recovery_is_the_steps_above_the_trend_but_for_single_ones() -> None:
    def recovery(high: list[int]) -> float:
        return by_itself(trial([2.0 + (i in high) for i in range(100)]), 100)["recovery_steps"]

    assert recovery([50]) == 0
    assert recovery(list(range(50, 60))) == 10


def test_trials_are_read_again_whole_lines_only(tmp_path: Path) -> None:
    one = json.dumps({"seed": 1})
    (tmp_path / "a.jsonl").write_text(f"{one}\n{one[:-3]}")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(f"{one}\n".encode()))
    assert routing.read([tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz"]) == [{"seed": 1}] * 2


def test_every_scenario_has_its_healthy_twin_and_no_job_comes_twice() -> None:
    planned = [
        (s, a.name, seed)
        for size in ("tiny", "small")
        for s, a, seed in jobs(plans(size), range(4))
    ]
    assert len(planned) == len(set(planned))
    for scenario, _, seed in planned:
        if scenario.fault:
            assert (scenario.twin, "none", seed) in planned


def test_a_scenario_is_not_measured_on_the_seed_that_it_was_chosen_by() -> None:
    assert {seed for _, _, seed in pilot()} == {PILOT_SEED}
    assert PILOT_SEED not in {seed for _, _, seed in jobs(plans("small"), range(100))}


def test_no_trial_begins_once_the_time_is_up(tmp_path: Path) -> None:
    assert routing_workers.run(jobs(plans("tiny"), [0]), 1, 0.0, tmp_path) == []


def test_what_answers_a_spike_is_trained_only_where_there_was_one() -> None:
    arms = ("none", "always anticipatory", "rollback", "rollback + noise")
    plan = routing_workers.Schedule(jobs([[(NATURAL, arms)]], [0, 1], together=1), "cpu")

    def ended(job: Job, *kinds: str) -> dict[str, Any]:
        scenario, arm, seed = job
        events = [{"kind": kind} for kind in kinds]
        return {
            "scenario": asdict(scenario),
            "arm": asdict(arm),
            "seed": seed,
            "losses": [1.0],
            "events": events,
        }

    first = [job for _ in range(4) if (job := plan.next())]
    assert [(j[1].name, j[2]) for j in first] == [(a, seed) for seed in (0, 1) for a in arms[:2]]
    assert plan.next() is None
    calm = plan.ended(first[0], ended(first[0], "attempt", "outlier"))
    assert [t["arm"]["name"] for t in calm] == ["none", "rollback", "rollback + noise"]
    assert [t.get("same", False) for t in calm] == [False, True, True]
    assert plan.next() is None
    assert len(plan.ended(first[1], ended(first[1], "spike"))) == 1, (
        "what is always on answers nothing"
    )
    assert len(plan.ended(first[2], ended(first[2], "spike"))) == 1
    assert [plan.next(late=True)[1].name for _ in range(2)] == ["rollback", "rollback + noise"]  # type: ignore[index]
    assert plan.next() is None


def test_answers_are_trained_where_the_training_without_them_failed() -> None:
    job, *_ = planned = list(jobs([[(NATURAL, ("none", "rollback"))]], [0]))
    plan = routing_workers.Schedule(planned * 2, "cpu")
    assert plan.next(late=True) is None
    assert plan.next() == job
    assert plan.ended(job, None) == []
    assert [j[1].name for j in iter(plan.next, None)] == ["rollback"], (
        "once, although it was asked for twice"
    )


def test_on_a_gpu_that_adds_up_otherwise_every_time_all_are_trained() -> None:
    plan = routing_workers.Schedule(jobs([[(NATURAL, ("none", "rollback"))]], [0]), "cuda")
    assert [j[1].name for j in iter(plan.next, None)] == ["none", "rollback"]


def test_workers_share_the_gpus_out_among_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str | None] = []
    monkeypatch.setattr(routing_workers, "visible", lambda: ["2", "5"])
    monkeypatch.setattr(routing_workers, "Worker", lambda gpu: made.append(gpu) or mock.Mock())
    routing_workers.run([], 3, 1.0, tmp_path, "cuda")
    assert made == ["2", "5", "2"]


@pytest.mark.slow
def test_a_trial_that_fails_or_whose_process_dies_leaves_the_others_theirs(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    calm = replace(NATURAL, lr=1e-3, steps=4, sequences=1)
    dies, fails = (
        replace(calm, name="dies", residual=Killer()),
        replace(calm, name="fails", residual="no such thing"),
    )
    planned = jobs(
        [[(dies, ("none", "always router-lag")), (fails, ("none",)), (calm, ("none",))]], [0]
    )
    found = routing_workers.run(planned, 1, 5.0, tmp_path)
    assert [t["scenario"]["name"] for t in found] == [calm.name]
    said = capsys.readouterr().out
    assert "dies, none, seed 0: its process ended with exit code 7" in said
    assert "fails, none, seed 0: " in said
    assert (tmp_path / "trials.jsonl").read_text().count("\n") == 1


class Killer(str):
    """A residual that ends the process which unpacks it."""

    def __reduce__(self) -> Any:
        return os._exit, (7,)


def test_noise_is_small_the_same_for_a_draw_and_another_for_the_next() -> None:
    models = [torch.nn.Linear(30, 30) for _ in range(4)]
    for model, draw in zip(models[:3], (1, 1, 2), strict=True):
        model.load_state_dict(models[3].state_dict())
        perturb(model, 1e-6, draw)
    first, same, other, before = (m.weight.detach() for m in models)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert 0 < float(((first - before) / before).abs().max()) < 1e-5


@pytest.mark.slow
def test_a_small_plan_is_trained_measured_and_written() -> None:
    calm = replace(NATURAL, lr=1e-3, steps=12, sequences=1)
    faulty = replace(calm, name="far", fault="far-batch@4", steps=12)
    planned = jobs(
        [[(calm, ("none", "always router-lag", "rollback + noise")), (faulty, ("none",))]], [0]
    )
    trials = [routing_workers.train(job, "cpu") for job in planned]
    assert [t.get("failed") for t in trials] == [None] * 5
    assert all(t["steps"] == list(range(12)) for t in trials)
    lagged = next(t for t in trials if t["arm"]["name"] == "always router-lag")
    plain = next(
        t for t in trials if t["arm"]["name"] == "none" and t["scenario"]["name"] == calm.name
    )
    assert lagged["losses"][:8] == plain["losses"][:8], (
        "the same seed and data; until the warm-up is over"
    )
    assert lagged["losses"][9:] != plain["losses"][9:]
    noise = next(t for t in trials if t["arm"]["name"] == "rollback + noise")
    assert noise["losses"] == plain["losses"], "noise comes with going back and not before"
    rows = summarise(trials)
    far = next(r for r in rows if r["scenario"] == "far")
    assert far["measures"]["excess"]["mean"] > 0
    result = {
        "rows": rows,
        "pooled": pooled(trials),
        "trials": 5,
        "steps": 60,
        "command": "c",
        "versions": {},
    }
    said = page(result | {"places": ["here"]})
    assert "| always router-lag | 1 |" in said


@pytest.mark.slow
def test_the_cost_bench_times_every_arm_and_writes_its_page(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    routing_cost.main(
        [
            "--sequences",
            "1",
            "--seconds",
            "0",
            "--steps",
            "1",
            "--but",
            "pinned",
            "--out",
            str(tmp_path),
        ]
    )
    found = json.loads((tmp_path / "routing_cost.json").read_text())["runs"][0]
    assert set(found["arms"]) == {a for a in routing_cost.ARMS if "pinned" not in a}
    assert found["arms"]["bare"]["median"] == 1
    assert found["alone"]["capture"] > 0
    assert "router-lag, on" in capsys.readouterr().out
