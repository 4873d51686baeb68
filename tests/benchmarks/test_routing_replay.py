"""Replays: nothing changed gives the same losses, any change others; each change does what its name
says.
"""

import json
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from geodiag.benchmarks import routing_replay
from geodiag.benchmarks.routing_plan import NATURAL
from geodiag.benchmarks.routing_replay import CHANGES, Moment, replay
from geodiag.benchmarks.routing_replay_page import page, summarise
from geodiag.benchmarks.routing_trial import setup
from geodiag.spikes.detector import Spike, SpikeDetector

SCENARIO = replace(NATURAL, sequences=1, steps=20)


@pytest.mark.slow
def test_an_exact_replay_repeats_every_loss_and_every_change_is_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(routing_replay, "AFTER", 4)
    trainer, loader = setup(SCENARIO, 0)
    detector, losses, moment = SpikeDetector(), [], None
    for step in range(20):
        if step == 4:
            moment = Moment(step, trainer, detector, 3.0)
        losses.append(round(routing_replay._step(trainer, loader.batch(step)), 4))
        detector.update(step, losses[-1])
    assert moment is not None
    spike = Spike(kind="spike", detected=17, onset=16, peak=17, end=None, score=9.0)
    found = {name: replay(name, moment, spike, trainer, loader)["losses"] for name in CHANGES}
    assert found["exact replay"] == losses[4:]
    for name, seen in found.items():
        assert len(seen) == 16
        assert (seen == losses[4:]) == (name == "exact replay"), name
    routed = [n for n in CHANGES if "Δ = 8" in n]
    assert len(routed) == 2
    assert found[routed[0]][:8] == losses[4:12], "until the warm-up is over"
    assert found["skip-batch"][:11] == losses[4:15]
    assert not any(m._forward_hooks for m in trainer.model.modules()), (
        "the routing is off the model again"
    )


def rows(spikes: int, again: dict[str, bool]) -> list[dict[str, Any]]:
    return [
        {
            "seed": s,
            "change": c,
            "onset": 5,
            "again": a,
            "peak": 1.0 + a,
            "excess": 10.0 * a + s,
            "last": 2.0,
        }
        for s in range(spikes)
        for c, a in again.items()
    ]


def test_changes_are_compared_with_noise_over_the_spikes_that_all_were_tried_on() -> None:
    changes = {
        "exact replay": True,
        "noise 1e-6, draw 1": True,
        "noise 1e-6, draw 2": False,
        "lower-lr 0.5": False,
    }
    cut_off = [
        r for r in rows(5, changes) if not (r["seed"] == 4 and r["change"] == "lower-lr 0.5")
    ]
    found = {
        r["change"]: r for r in summarise([*cut_off, {"change": None, "seed": 0}], list(changes))
    }
    assert {r["spikes"] for r in found.values()} == {4}
    assert found["exact replay"]["again"]["mean"] == 1
    assert found["lower-lr 0.5"]["again"]["mean"] == 0
    assert found["lower-lr 0.5"]["excess_less_noise"]["mean"] == -5
    assert found["lower-lr 0.5"]["excess_less_noise"]["high"] == -5, (
        "paired by spike, whose seeds differ"
    )


def test_the_page_says_a_row_a_change(tmp_path: Path) -> None:
    changes = {"exact replay": True, "noise 1e-6, draw 1": False}
    result = {
        "rows": summarise(rows(3, changes), list(changes)),
        "scenario": "s",
        "after": 4,
        "command": "c",
    }
    said = page(
        json.loads(json.dumps(result))
        | {"versions": {}, "machine": {"cpu": "a", "cores": 1, "system": "s"}}
    )
    assert "| exact replay | 3 | 1.00 (1.00 – 1.00) |" in said
    assert list(islice(CHANGES, 1)) == ["exact replay"]
