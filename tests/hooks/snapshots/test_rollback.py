"""Rollback: after a fault that passes, training goes on as if it had never been."""

import json
import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import geodiag
from geodiag.cascade.early_warning import EarlyWarning
from geodiag.hooks.routing.anticipatory import AnticipatoryRouting
from geodiag.hooks.routing.router_lag import RouterLag
from geodiag.reference_models.moe import ClampedSwiGLU
from tests.hooks import small

FAULT, STEPS = 43, 70


class Live:
    """A training with snapshots whose weights are hurt once, before step `FAULT`."""

    def __init__(
        self,
        path: Path,
        *,
        policy: geodiag.Policy,
        routing: Callable[[Any], Any] | None = None,
        where: Any = "memory",
        faults: tuple[int, ...] = (FAULT,),
        every: int = 10,
        keep: int = 4,
        hurt: float = 1.0,
        micro_batches: int = 1,
        resume: bool = False,
    ) -> None:
        self.path, self.t = path, small.trainer("plain", micro_batches=micro_batches)
        self.routing = routing(self.t.model) if routing else None
        snapshots = geodiag.Snapshots(
            self.t.model, self.t.optimizers, self.t.progress, every=every, keep=keep, where=where
        )
        self.monitor = small.watch(
            self.t, path, routing=self.routing, snapshots=snapshots, policy=policy, resume=resume
        )
        self.faults, self.hurt = set(faults), hurt
        self.losses: dict[int, float] = {}
        self.seen: list[tuple[int, int]] = []
        """(step, batch) as they were trained."""

    def data(self) -> Iterator[tuple[int, Tensor]]:
        for position in range(1000):
            yield position, small.tokens(position)

    def train(
        self, steps: int, spoil: Callable[[int, float], float] = lambda _, loss: loss
    ) -> "Live":
        for position, ids in self.monitor.batches(self.data()):
            step = self.monitor.next_step
            if step in self.faults:
                self.faults.remove(step)
                with torch.no_grad():
                    for p in self.t.model.parameters():
                        p.add_(torch.randn_like(p), alpha=self.hurt)
            self.seen.append((step, position))
            for part in ids.chunk(self.t.config.micro_batches):
                self.t.accumulate(geodiag_batch(part))
            done = self.t.update()
            self.losses[step] = done.loss.item()
            self.monitor.step(spoil(step, done.loss.item()), grad_norm=done.grad_norm, lr=done.lr)
            if self.monitor.next_step >= steps:
                break
        return self

    def events(self, *kinds: str) -> list[dict[str, Any]]:
        rows = geodiag.open_run(self.path).read_arrow("events").to_pylist()
        return [r | {"data": json.loads(r["data"])} for r in rows if r["kind"] in kinds]


def geodiag_batch(ids: Tensor) -> Any:
    from geodiag.reference_models.data import Batch

    return Batch(0, ids[:, :-1], ids[:, 1:], ("x",) * len(ids))


def clean(steps: int = STEPS, micro_batches: int = 1) -> list[float]:
    return small.train(small.trainer("plain", micro_batches=micro_batches), steps)


ROLLBACK = geodiag.Policy.parse("rollback", mode="auto")


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_a_training_that_went_back_equals_one_that_never_saw_the_fault_bit_for_bit(
    tmp_path: Path, where: str
) -> None:
    live = Live(tmp_path / "run", policy=ROLLBACK, where=where).train(STEPS)
    live.monitor.close()
    (back,) = live.events("rollback")
    assert back["data"]["to"] == back["step"] == 40
    assert [live.losses[s] for s in range(STEPS)] == clean()
    replayed = live.seen[live.seen.index((back["data"]["from"], back["data"]["from"])) + 1 :]
    assert replayed == [(s, s) for s in range(40, STEPS)], "the same batches come again, in order"


def test_without_rollback_the_fault_is_felt_to_the_end(tmp_path: Path) -> None:
    """The twin of the test above."""
    live = Live(tmp_path / "run", policy=geodiag.Policy()).train(STEPS)
    live.monitor.close()
    expected = clean()
    assert [live.losses[s] for s in range(FAULT)] == expected[:FAULT], "snapshots change nothing"
    assert live.losses[STEPS - 1] != expected[-1]
    assert "would have acted" in live.events("decision")[0]["message"]
    assert live.events("rollback") == []


def test_the_repeated_steps_are_another_attempt_and_the_first_ones_stay_readable(
    tmp_path: Path,
) -> None:
    live = Live(tmp_path / "run", policy=ROLLBACK).train(STEPS)
    live.monitor.close()
    detected = live.events("rollback")[0]["data"]["from"]
    run = geodiag.open_run(live.path)
    newest, both = run.read("steps"), run.read("steps", attempt="all")
    assert newest["step"].tolist() == list(range(STEPS))
    assert newest["attempt"].tolist() == [0] * 40 + [1] * (STEPS - 40)
    assert both[both["attempt"] == 0]["step"].tolist() == list(range(detected + 1))
    assert newest["loss"].tolist() == pytest.approx(
        [live.losses[s] for s in range(STEPS)], rel=1e-6
    )
    assert [(e["step"], e["attempt"]) for e in live.events("attempt")] == [(0, 0), (40, 1)]
    (spike,) = live.events("spike")
    assert spike["attempt"] == 0
    assert run.status() == "finished"


def test_after_going_back_the_spike_is_over_and_a_new_one_is_seen(tmp_path: Path) -> None:
    policy = geodiag.Policy.parse("rollback", mode="auto", cooldown=5)
    live = Live(tmp_path / "run", policy=policy, faults=(43, 63)).train(90)
    live.monitor.close()
    assert [e["data"]["to"] for e in live.events("rollback")] == [40, 60]
    assert [live.losses[s] for s in range(90)] == clean(90)
    last = live.monitor.last
    assert last is not None
    assert not last.verdict.active


def test_with_routing_it_goes_back_far_enough_to_be_on_at_the_onset(tmp_path: Path) -> None:
    def ahead(model: Any) -> AnticipatoryRouting:
        return AnticipatoryRouting(model, 6, forward=lambda m, item: m(item[1][:, :-1]))

    policy = geodiag.Policy.parse("rollback,route", mode="auto", period=12)
    live = Live(tmp_path / "run", policy=policy, routing=ahead).train(STEPS)
    live.monitor.close()
    (back,) = live.events("rollback")
    (spike,) = live.events("spike")
    assert back["step"] == 30, (
        "40 is before the onset too, but warming up from there ends behind it"
    )
    modes = geodiag.open_run(live.path).read("steps")["routing_mode"].tolist()
    assert modes[30:] == ["warmup"] * 6 + ["on"] * 12 + ["drain"] * 6 + ["off"] * (STEPS - 54)
    assert modes[spike["data"]["onset"]] == "on"
    assert [b for _, b in live.seen[-40:]] == list(range(30, STEPS)), "looking ahead loses no batch"
    expected = clean()
    assert [live.losses[s] for s in range(36)] == expected[:36], (
        "up to the routing it is the clean run"
    )
    assert max(live.losses[s] for s in range(36, STEPS)) < 1.05 * max(expected), (
        "and behind it, as if nothing had been"
    )


def test_delay_0_and_rollback_together_are_still_the_clean_run(tmp_path: Path) -> None:
    def ahead(model: Any) -> AnticipatoryRouting:
        return AnticipatoryRouting(model, 0, forward=lambda m, item: m(item[1][:, :-1]))

    policy = geodiag.Policy.parse("rollback,route", mode="auto", period=12)
    live = Live(tmp_path / "run", policy=policy, routing=ahead).train(STEPS)
    live.monitor.close()
    assert len(live.events("rollback")) == 1
    assert "on" in geodiag.open_run(live.path).read("steps")["routing_mode"].tolist()
    assert [live.losses[s] for s in range(STEPS)] == clean()


@pytest.mark.parametrize("variant", ["anticipatory", "router-lag"])
def test_a_snapshot_taken_while_routing_is_on_brings_its_past_back(
    tmp_path: Path, variant: str
) -> None:
    """Routing on from the start: a rollback repeats exactly the steps before the fault."""

    def make(model: Any) -> Any:
        if variant == "router-lag":
            return RouterLag(model, 3)
        return AnticipatoryRouting(model, 3, forward=lambda m, item: m(item[1][:, :-1]))

    policy = geodiag.Policy.parse("rollback", mode="on")
    live = Live(tmp_path / "run", policy=policy, routing=make).train(STEPS)
    live.monitor.close()
    (back,) = live.events("rollback")
    assert back["step"] == 40
    modes = geodiag.open_run(live.path).read("steps")["routing_mode"].tolist()
    assert modes[3:-1] == ["on"] * (STEPS - 4)
    unhurt = Live(tmp_path / "unhurt", policy=policy, routing=make, faults=()).train(STEPS)
    unhurt.monitor.close()
    assert live.losses == unhurt.losses
    assert [b for _, b in live.seen[-30:]] == list(range(40, STEPS))


def test_skipped_batches_are_never_trained_on_again(tmp_path: Path) -> None:
    policy = geodiag.Policy.parse("rollback,skip-batch", mode="auto")
    live = Live(tmp_path / "run", policy=policy).train(STEPS)
    live.monitor.close()
    (spike,) = live.events("spike")
    onset, detected = spike["data"]["onset"], spike["data"]["detected"]
    skipped = set(range(onset - 1, detected + 1))
    again = [b for _, b in live.seen[detected + 1 :]]
    assert again == [b for b in range(40, 40 + len(again) + len(skipped)) if b not in skipped]
    assert (
        f"skip the batches of steps {onset - 1} to {detected}"
        in live.events("decision")[0]["message"]
    )


def test_micro_batches_come_again_too(tmp_path: Path) -> None:
    live = Live(tmp_path / "run", policy=ROLLBACK, micro_batches=2).train(STEPS)
    live.monitor.close()
    assert [live.losses[s] for s in range(STEPS)] == clean(micro_batches=2)


def test_a_loss_that_is_not_finite_goes_back(tmp_path: Path) -> None:
    live = Live(tmp_path / "run", policy=ROLLBACK, hurt=math.nan).train(STEPS)
    live.monitor.close()
    (back,) = live.events("rollback")
    assert back["step"] == 40
    assert (
        "the loss is not finite since step 43: roll back to the snapshot of step 40"
        in live.events("decision")[0]["message"]
    )
    assert [live.losses[s] for s in range(STEPS)] == clean()


def test_an_outlier_takes_nothing_back(tmp_path: Path) -> None:
    live = Live(tmp_path / "run", policy=ROLLBACK, faults=())
    live.train(STEPS, spoil=lambda step, loss: loss + 5.0 * (step == 43))
    live.monitor.close()
    assert len(live.events("outlier")) == 1
    assert live.events("rollback", "decision") == []
    assert [live.losses[s] for s in range(STEPS)] == clean()


def test_nothing_is_kept_of_a_training_that_is_out_of_its_range(tmp_path: Path) -> None:
    live = Live(tmp_path / "run", policy=geodiag.Policy(), every=1, keep=100, faults=())
    live.train(50, spoil=lambda step, loss: loss + 5.0 * (step >= 43))
    snapshots = live.monitor._rollback.snapshots
    assert snapshots is not None
    (spike,) = live.events("spike")
    assert max(snapshots.steps) <= spike["data"]["detected"]
    live.monitor.close()


def test_nothing_is_kept_while_the_routing_warms_up_or_drains(tmp_path: Path) -> None:
    def ahead(model: Any) -> AnticipatoryRouting:
        return AnticipatoryRouting(model, 4, forward=lambda m, item: m(item[1][:, :-1]))

    policy = geodiag.Policy.parse("route", mode="auto", on="schedule:10-20")
    live = Live(tmp_path / "run", policy=policy, routing=ahead, every=1, keep=100, faults=()).train(
        40
    )
    snapshots = live.monitor._rollback.snapshots
    assert snapshots is not None
    modes = ["off", *geodiag.open_run(live.path).read("steps")["routing_mode"].tolist()]
    assert snapshots.steps == [s for s in range(1, 41) if modes[s] in ("off", "on")]
    assert {"warmup", "drain"} < set(modes)
    live.monitor.close()


def test_a_loop_that_keeps_no_batches_is_told_and_not_taken_back(
    tmp_path: Path, capsys: Any
) -> None:
    t = small.trainer("plain")
    snapshots = geodiag.Snapshots(t.model, t.optimizers, t.progress, every=5)
    run = small.watch(t, tmp_path / "run", snapshots=snapshots, policy=ROLLBACK)
    for step in range(40):
        done = t.step(geodiag_batch(small.tokens(step)))
        run.step(done.loss.item() + 5.0 * (step >= 30))
    run.close()
    assert "take them from run.batches(loader)" in capsys.readouterr().err
    assert t.steps_done == 40


def test_a_period_at_a_lower_learning_rate_is_that_and_ends(tmp_path: Path) -> None:
    policy = geodiag.Policy.parse("lower-lr=0.5", mode="auto", on="schedule:5-9")
    live = Live(tmp_path / "run", policy=policy, faults=()).train(12)
    live.monitor.close()
    t, expected = small.trainer("plain"), []
    for step in range(12):
        t.lr_scale = 0.5 if 5 <= step < 9 else 1.0
        expected.append(small.one_step(t, small.tokens(step)))
    assert [live.losses[s] for s in range(12)] == expected
    assert expected != clean(12)
    lr = geodiag.open_run(live.path).read("steps")["lr"]
    assert lr[6] == pytest.approx(0.5 * t.config.lr_at(6))
    assert lr[10] == pytest.approx(t.config.lr_at(10))


def test_a_clamp_for_a_period_is_the_clamped_model_and_ends(tmp_path: Path) -> None:
    policy = geodiag.Policy.parse("clamp=0.01", mode="auto", on="schedule:5-9")
    live = Live(tmp_path / "run", policy=policy, faults=()).train(12)
    live.monitor.close()
    t, expected = small.trainer("plain"), []
    for step in range(12):
        for block in t.model.blocks:
            for act in (m for m in block.moe.modules() if isinstance(m, ClampedSwiGLU)):
                act.limit = 0.01 if 5 <= step < 9 else t.model.config.swiglu_limit
        expected.append(small.one_step(t, small.tokens(step)))
    assert [live.losses[s] for s in range(12)] == expected
    assert expected != clean(12)


def test_what_a_policy_needs_is_asked_for_at_once(tmp_path: Path) -> None:
    t = small.trainer("plain")
    with pytest.raises(
        geodiag.GeodiagError, match="rollback needs something to go back to; pass attach"
    ):
        small.watch(t, tmp_path / "a", policy=ROLLBACK)
    model = small.Blocks()
    optimizer = torch.optim.SGD(model.parameters())
    clamp = geodiag.Policy.parse("clamp=3", mode="auto")
    with pytest.raises(geodiag.GeodiagError, match="has no SwiGLU clamp to switch on"):
        geodiag.attach(model, optimizer, tmp_path / "b", quiet=True, policy=clamp)


def test_in_another_epoch_it_goes_back_to_nothing_that_the_data_cannot_follow(
    tmp_path: Path,
) -> None:
    """A fault after the second call of `batches`: the snapshots belong to the first call's data."""
    live = Live(tmp_path / "run", policy=ROLLBACK).train(42)
    live.train(STEPS)
    live.monitor.close()
    assert live.events("rollback") == []
    assert "no snapshot from before the onset is kept" in live.events("decision")[0]["message"]
    later = Live(tmp_path / "later", policy=ROLLBACK, faults=(63,)).train(42)
    later.train(90)
    later.monitor.close()
    (back,) = later.events("rollback")
    assert back["step"] == 60
    assert [b for s, b in later.seen if s >= 60][-30:] == list(range(18, 48)), (
        "its own data come again"
    )


def test_a_warning_turns_routing_on_at_the_next_step(tmp_path: Path) -> None:
    def ahead(model: Any) -> AnticipatoryRouting:
        return AnticipatoryRouting(model, 2, forward=lambda m, item: m(item[1][:, :-1]))

    policy = geodiag.Policy.parse("rollback,route", mode="auto", on="warning", period=5)
    live = Live(tmp_path / "run", policy=policy, routing=ahead, faults=())
    observe = live.monitor._recorder.observer.observe

    def warned(step: int, *args: Any) -> Any:
        warning = EarlyWarning(
            step=step, since=8, stage=2, layer=1, site="ffn", part="router", score=20.0
        )
        return replace(observe(step, *args), warning=warning if step == 12 else None)  # type: ignore[type-var]

    live.monitor._recorder.observer.observe = warned  # type: ignore[method-assign]
    live.train(30)
    live.monitor.close()
    modes = geodiag.open_run(live.path).read("steps")["routing_mode"].tolist()
    assert modes[:24] == ["off"] * 13 + ["warmup"] * 2 + ["on"] * 5 + ["drain"] * 2 + ["off"] * 2
    assert "early warning at step 12 (layer 1, ffn: " in live.events("decision")[0]["message"]
    assert live.events("rollback") == [], "there is nothing to undo yet"


def test_where_no_snapshot_is_taken_any_more_batches_are_kept_for_a_while_and_no_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = Live(tmp_path / "run", policy=geodiag.Policy(), faults=(), every=5, keep=2)
    rollback, sizes = live.monitor._rollback, {}

    def watched(step: int, loss: float) -> float:
        if step == 12:
            monkeypatch.setattr(geodiag.Snapshots, "take", lambda *_: False)
        assert rollback._loader is not None
        sizes[step] = len(rollback._loader._buffer), len(rollback._first_batch), rollback.steps
        return loss

    live.train(60, spoil=watched).monitor.close()
    assert sizes[12] == (8, 9, [5, 10]), "what snapshots are taken of"
    assert sizes[25] == (21, 22, [5, 10]), "two spans of all snapshots"
    assert sizes[26][2] == [10]
    assert sizes[31][2] == []
    assert sizes[59] == (1, 22, [])
    assert max(kept for kept, _, _ in sizes.values()) == 21


# -- resume --------------------------------------------------------------------------------


@pytest.mark.parametrize("routed", [False, True])
def test_a_resumed_training_equals_one_that_was_never_stopped(tmp_path: Path, routed: bool) -> None:
    """With routing on from the start, too: its queue of batches and ids is in the snapshot."""

    def ahead(model: Any) -> AnticipatoryRouting:
        return AnticipatoryRouting(model, 3, forward=lambda m, item: m(item[1][:, :-1]))

    options: dict[str, Any] = {"policy": geodiag.Policy(), "where": "disk", "faults": ()}
    if routed:
        options |= {"policy": geodiag.Policy(mode="on"), "routing": ahead}
    whole = Live(tmp_path / "whole", **options).train(40)
    whole.monitor.close()
    first = Live(tmp_path / "run", **options).train(26)
    first.monitor._rollback.snapshots.wait()  # type: ignore[union-attr]
    first.monitor.close("interrupted")
    second = Live(tmp_path / "run", **options, resume=True)
    assert second.monitor.next_step == 20
    second.train(40)
    second.monitor.close()
    assert {s: second.losses[s] for s in range(20, 40)} == {
        s: whole.losses[s] for s in range(20, 40)
    }
    assert second.seen[0] == (20, 20)
    for name, table in (("data_shift", "steps"), ("attn_logit_max", "layers")):
        seen, expected = (
            geodiag.open_run(tmp_path / run)
            .read(table, ["step", name], steps=(21, 39))[name]
            .to_numpy()
            for run in ("run", "whole")
        )
        assert np.isfinite(expected).any()
        assert np.array_equal(seen, expected, equal_nan=True), (
            f"{name}: of the same batches, against the same past"
        )
    rows = geodiag.open_run(tmp_path / "run").read("steps")
    assert rows["attempt"].tolist() == [0] * 20 + [1] * 20
    assert rows["stage1_score"][21:].notna().all(), (
        "what was learned of every layer is not learned anew"
    )
    assert "resumed from the snapshot of step 20: attempt 1" in [
        e["message"] for e in second.events("attempt")
    ]


def test_a_training_whose_batches_no_disk_can_keep_has_snapshots_and_resumes(
    tmp_path: Path,
) -> None:
    """A mask that is a function, as flexible attention has them: probed with, and met anew after a
    resume.
    """

    class Masked(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = small.trainer("plain").model

        def forward(self, ids: Tensor, mask: Callable[[Tensor], Tensor]) -> Any:
            return self.inner(mask(ids))

    def train(last: int, resume: bool = False) -> int:
        model = Masked()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        snapshots = geodiag.Snapshots(model, optimizer, every=2, where="disk")
        options: dict[str, Any] = {"snapshots": snapshots, "resume": resume, "quiet": True}
        with geodiag.attach(model, optimizer, tmp_path / "run", **options) as monitor:
            began = monitor.next_step
            for step in monitor.batches(range(last)):
                loss = model(small.tokens(step)[:, :-1], lambda ids: ids).logits_BSV.square().mean()
                loss.backward()
                optimizer.step()
                monitor.step(loss)
                snapshots.wait()
        return began

    train(5)
    assert train(12, resume=True) == 5
    probed = geodiag.open_run(tmp_path / "run").read("layers", ["step", "attn_logit_max"])
    assert probed["attn_logit_max"][probed["step"] == 10].notna().any()


def test_a_resumed_training_remembers_what_was_decided(tmp_path: Path) -> None:
    """Resumed inside a rollback's cooldown, it is still resting, and still has one intervention
    fewer.
    """
    policy = geodiag.Policy.parse("rollback", mode="auto", cooldown=100)
    first = Live(tmp_path / "run", policy=policy, where="disk").train(65)
    first.monitor._rollback.snapshots.wait()  # type: ignore[union-attr]
    before = first.monitor.steering.controller.state_dict()
    first.monitor.close("interrupted")
    second = Live(tmp_path / "run", policy=policy, where="disk", faults=(), resume=True)
    assert second.monitor.next_step == 60
    assert second.monitor.steering.controller.state_dict() == before
    assert before["activations"] == 1
    second.train(STEPS)
    second.monitor.close()
    assert [second.losses[s] for s in range(60, STEPS)] == clean()[60:]


def test_snapshots_of_an_earlier_training_are_not_overwritten_by_mistake(tmp_path: Path) -> None:
    options: dict[str, Any] = {"policy": geodiag.Policy(), "where": "disk", "faults": ()}
    first = Live(tmp_path / "run", **options).train(15)
    first.monitor.close()
    with pytest.raises(
        geodiag.GeodiagError, match="pass resume=True to go on from step 15, or another path"
    ):
        Live(tmp_path / "run", **options)
    with pytest.raises(geodiag.GeodiagError, match="only snapshots on disk can be resumed from"):
        Live(tmp_path / "run", **(options | {"where": "memory"}), resume=True)


def test_a_resume_that_does_not_fit_is_refused_with_the_fix(tmp_path: Path) -> None:
    def ahead(delay: int) -> Callable[[Any], AnticipatoryRouting]:
        return lambda model: AnticipatoryRouting(
            model, delay, forward=lambda m, item: m(item[1][:, :-1])
        )

    options: dict[str, Any] = {"policy": geodiag.Policy(mode="on"), "where": "disk", "faults": ()}
    Live(tmp_path / "run", **options, routing=ahead(3)).train(15).monitor.close()
    with pytest.raises(
        geodiag.GeodiagError, match="routing with a delay of 3 was on; resume with the same"
    ):
        Live(tmp_path / "run", **options, routing=ahead(4), resume=True)
    with pytest.raises(geodiag.GeodiagError, match="resume with that routing"):
        Live(tmp_path / "run", **(options | {"policy": geodiag.Policy()}), resume=True)
    for data in (tmp_path / "run/snapshots/rank-0/step-00000015").glob("*.distcp"):
        data.unlink()
    with pytest.raises(geodiag.GeodiagError, match=r"cannot resume from step 15: .* is unreadable"):
        Live(tmp_path / "run", **options, routing=ahead(3), resume=True)
    assert geodiag.open_run(tmp_path / "run").status() == "failed"
    assert not [t for t in threading.enumerate() if t.name.startswith("geodiag")], (
        "no thread is left"
    )
