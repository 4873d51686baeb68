"""Steering a live training: requests are obeyed at the next step or refused with the reason, and
all is on record.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import geodiag
from geodiag.control import Request, write_request
from geodiag.hooks.control.policy import Policy
from geodiag.hooks.monitor import Monitor
from geodiag.hooks.routing.anticipatory import AnticipatoryRouting
from geodiag.store.files import Folder
from tests.hooks import small


class Live:
    """A training of the smallest model that can be asked things between its steps."""

    def __init__(self, path: Path, delay: int | None = 2, **options: Any) -> None:
        self.path, self.t = path, small.trainer("plain")
        self.routing = None
        if delay is not None:
            self.routing = AnticipatoryRouting(
                self.t.model, delay, forward=lambda m, ids: m(ids[:, :-1])
            )
        self.monitor: Monitor = small.watch(self.t, path, routing=self.routing, **options)
        data = (small.tokens(step) for step in range(1000))
        self.batches = self.routing.batches(data) if self.routing else data

    def steps(self, n: int, loss: Callable[[int], float] | None = None) -> None:
        for _ in range(n):
            if loss is None:
                small.one_step(self.t, next(self.batches), self.monitor)
            else:
                next(self.batches)
                self.monitor.step(loss(self.monitor.next_step))

    def ask(self, routing: str, delay: int | None = None) -> Request:
        return geodiag.open_run(self.path).request(routing, delay, by="test")

    def modes(self) -> list[str]:
        return geodiag.open_run(self.path).read("steps")["routing_mode"].tolist()

    def events(self, *kinds: str) -> list[dict[str, Any]]:
        rows = geodiag.open_run(self.path).read_arrow("events").to_pylist()
        return [r | {"data": json.loads(r["data"])} for r in rows if r["kind"] in kinds]


def test_a_request_is_obeyed_at_the_next_step_and_acknowledged_by_id(tmp_path: Path) -> None:
    live = Live(tmp_path / "run")
    live.steps(3)
    asked = live.ask("on")
    assert geodiag.open_run(live.path).pending() == asked
    live.steps(4)
    assert geodiag.open_run(live.path).pending() is None
    live.ask("off")
    live.steps(4)
    live.monitor.close()
    # The request arrived during step 3 and was read at its end.
    assert live.modes() == ["off"] * 4 + ["warmup"] * 2 + ["on"] * 2 + ["drain"] * 2 + ["off"]
    request, acknowledge = live.events("request", "acknowledge")[:2]
    assert acknowledge["data"] == {"request": asked.id, "routing": "on", "obeyed": True}
    assert request["data"]["request"] == asked.id
    assert request["step"] == acknowledge["step"] == 4
    assert [e["message"] for e in live.events("routing")] == [
        "routing went from off to warmup",
        "routing went from warmup to on",
        "routing went from on to drain",
        "routing went from drain to off",
    ]
    assert [e["message"] for e in live.events("decision")] == ["requested: on", "requested: off"]


def test_a_request_may_bring_its_delay_while_routing_is_off(tmp_path: Path) -> None:
    live = Live(tmp_path / "run")
    live.ask("on", delay=1)
    live.steps(4)
    refused = live.ask("on", delay=3)
    live.steps(1)
    same = live.ask("on", delay=1)
    live.steps(1)
    live.monitor.close()
    assert live.modes()[:3] == ["off", "warmup", "on"]
    answers = {e["data"]["request"]: e for e in live.events("acknowledge")}
    assert answers[refused.id]["data"]["obeyed"] is False
    assert (
        "the delay can change only while routing is off; it is in on"
        in answers[refused.id]["message"]
    )
    assert answers[same.id]["data"]["obeyed"] is True
    assert live.modes()[-1] == "on", "a refusal changes nothing"


@pytest.mark.parametrize(("routing", "obeyed"), [("on", False), ("auto", False), ("off", True)])
def test_a_training_without_routing_says_so(tmp_path: Path, routing: str, obeyed: bool) -> None:
    live = Live(tmp_path / "run", delay=None)
    live.ask(routing)
    live.steps(2)
    live.monitor.close()
    (answer,) = live.events("acknowledge")
    assert answer["data"]["obeyed"] is obeyed
    assert ("gave attach no AnticipatoryRouting" in answer["message"]) is not obeyed
    assert live.modes() == ["off", "off"]


def test_ranks_that_cannot_be_talked_to_are_not_switched_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(os.environ, "WORLD_SIZE", "4")
    live = Live(tmp_path / "run")
    live.ask("on")
    live.steps(2)
    live.monitor.close()
    (answer,) = live.events("acknowledge")
    assert (
        "the other ranks cannot be reached; "
        "call torch.distributed.init_process_group before geodiag.attach" in answer["message"]
    )
    assert live.modes() == ["off", "off"]


def test_a_request_from_before_the_run_is_not_obeyed(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    write_request(Folder.of(tmp_path / "run"), Request(routing="on"))
    live = Live(tmp_path / "run")
    live.steps(3)
    live.monitor.close()
    assert live.modes() == ["off"] * 3
    assert live.events("request", "acknowledge") == []


def test_a_request_is_obeyed_once(tmp_path: Path) -> None:
    live = Live(tmp_path / "run")
    asked = live.ask("on")
    live.steps(2)
    write_request(Folder.of(live.path), asked)  # the same, written again
    live.steps(2)
    live.monitor.close()
    assert len(live.events("acknowledge")) == 1


def test_on_from_the_start_warms_up_with_the_first_step(tmp_path: Path) -> None:
    live = Live(tmp_path / "run", policy="on")
    live.steps(4)
    live.monitor.close()
    assert live.modes() == ["warmup", "warmup", "on", "on"]
    (decision,) = live.events("decision")
    assert (decision["step"], decision["message"]) == (0, "requested: on")


def spiking(step: int) -> float:
    return 3.0 + 0.01 * (step % 3) + (2.0 if 60 <= step < 70 else 0.0)


@pytest.mark.parametrize("policy", ["off", "auto"])
def test_a_spike_switches_routing_on_for_its_period_and_only_under_auto(
    tmp_path: Path, policy: str
) -> None:
    live = Live(tmp_path / "run", policy=Policy(mode=policy, period=12, cooldown=30))  # type: ignore[arg-type]
    live.steps(100, spiking)
    live.monitor.close()
    (spike,) = live.events("spike")
    decisions = live.events("decision")
    detected = spike["step"]
    assert 60 <= detected < 64
    assert [d["data"]["action"] for d in decisions] == ["enable", "disable"]
    assert [d["data"]["acted"] for d in decisions] == [policy == "auto"] * 2
    assert [d["data"]["policy"] for d in decisions] == [policy] * 2
    modes = live.modes()
    if policy == "off":
        assert modes == ["off"] * 100
        assert all("would have acted" in d["message"] for d in decisions)
        return
    expected = ["off"] * (detected + 1) + ["warmup"] * 2 + ["on"] * 12 + ["drain"] * 2
    assert modes == expected + ["off"] * (100 - len(expected))
    assert f"spike raised at step {detected}" in decisions[0]["message"]


def test_auto_needs_a_routing_to_act_on(tmp_path: Path) -> None:
    with pytest.raises(geodiag.GeodiagError, match=r"pass attach\(\.\.\., routing=\.\.\.\)"):
        Live(tmp_path / "run", delay=None, policy="auto")


def test_after_the_run_is_closed_routing_goes_on_unrecorded(tmp_path: Path) -> None:
    live = Live(tmp_path / "run", policy="on")
    live.steps(1)
    live.monitor.close()
    assert live.routing is not None
    for _ in range(3):
        small.one_step(live.t, next(live.batches))
    assert live.routing.mode == "on"
    assert live.modes() == ["warmup"]


@pytest.mark.parametrize(
    ("saved", "now", "mode"), [("on", "off", "off"), ("off", "on", "on"), ("on", "on", "on")]
)
def test_a_resumed_training_has_the_mode_that_it_is_given_now(
    tmp_path: Path, saved: str, now: str, mode: str
) -> None:
    def watched(resume: bool, policy: str) -> tuple[Monitor, Any]:
        t = small.trainer("plain")
        routing = AnticipatoryRouting(t.model, 2, forward=lambda m, ids: m(ids[:, :-1]))
        snapshots = geodiag.Snapshots(t.model, t.optimizers, every=4, where="disk")
        more = {
            "routing": routing,
            "snapshots": snapshots,
            "policy": Policy(mode=policy),
            "resume": resume,
        }
        monitor = small.watch(t, tmp_path / "run", **more)
        batches = monitor.batches(small.tokens(step) for step in range(1000))
        for _ in range(12):
            small.one_step(t, next(batches), monitor)
        return monitor, routing

    first, _ = watched(False, saved)
    first.close()
    second, routing = watched(True, now)
    second.close()
    assert routing.mode == mode
    rows = geodiag.open_run(tmp_path / "run").read_arrow("events", attempt="all").to_pylist()
    asked = [r["message"] for r in rows if r["kind"] == "decision" and r["attempt"] == 1]
    assert any(f"requested: {now}" in m for m in asked) == (saved != now)
