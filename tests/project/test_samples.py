"""The recorded runs: real, readable, and made by the command that stands beside them."""

import json
import re

import pytest

from geodiag.health import health
from geodiag.run import find_runs, open_run
from tests.paths import SAMPLES

ROWS = dict(
    re.findall(
        r"^\| `([a-z-]+)` \|.*\| `geodiag (train .*)` \|$",
        (SAMPLES / "README.md").read_text(),
        re.M,
    )
)


def test_every_sample_is_described_and_every_description_has_its_sample() -> None:
    assert {run.name for run in find_runs(SAMPLES)} == set(ROWS) == {"plain", "hc", "mhc-tear"}


@pytest.mark.parametrize("name", ROWS)
def test_a_sample_was_made_by_the_command_beside_it(name: str) -> None:
    run = open_run(SAMPLES / name)
    assert run.manifest["command"] == ["geodiag", *ROWS[name].split()]
    assert run.status() == "finished"
    assert run.read("steps")["step"].tolist() == list(range(300))
    assert run.problems == {}


def test_unconstrained_maps_amplify_and_constrained_ones_cannot() -> None:
    hc, mhc, plain = (health(open_run(SAMPLES / n)).composite for n in ("hc", "mhc-tear", "plain"))
    assert (hc.verdict, mhc.verdict, plain.verdict) == ("grew", "within", "absent")
    assert hc.worst is not None
    assert hc.worst.value > 2


def test_the_tear_was_found_answered_and_survived() -> None:
    run = open_run(SAMPLES / "mhc-tear")
    events = run.read("events")
    at = events.groupby("kind")["step"].min()
    assert at["fault"] < at["spike"] < at["routing"]
    steps = run.read("steps").set_index("step")
    assert (steps["routing_mode"] == "on").sum() >= 40
    assert steps["routing_mode"].iloc[-1] == "off"
    assert steps["loss"].iloc[-20:].mean() < steps["loss"].loc[at["spike"]] - 1


def test_the_samples_stay_small() -> None:
    assert sum(p.stat().st_size for p in SAMPLES.rglob("*") if p.is_file()) < 8 << 20


def test_status_says_the_policy_that_the_training_began_with(cli) -> None:
    said = json.loads(cli("routing", SAMPLES / "mhc-tear", "status", "--json").output)
    assert (said["policy"], said["mode"]) == ("auto", "off")
    assert "period of 40 steps is over" in said["last_decision"]["reason"]
    assert json.loads(cli("routing", SAMPLES / "hc", "status", "--json").output)["policy"] == "off"
