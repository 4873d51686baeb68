"""The controller: which verdicts start a period, how long it lasts, and what it says."""

import math
from typing import Any

import pytest

from geodiag.hooks.control.controller import Controller
from geodiag.hooks.control.decision import Decision
from geodiag.hooks.control.policy import Policy
from geodiag.spikes.detector import Spike, Verdict

CALM = Verdict(0.5, None, None, False)


def raised(step: int, kind: str = "spike") -> Verdict:
    spike = Spike(kind=kind, detected=step, onset=step - 2, peak=step, end=None, score=9.0)  # type: ignore[arg-type]
    return Verdict(9.0, spike, None, True)


def drive(
    controller: Controller, steps: int, events: dict[int, Verdict], start: int = 0
) -> dict[int, Decision]:
    """Decides step by step; returns what was said, by step."""
    said = {}
    for step in range(start, steps):
        decision = controller.decide(step, events.get(step, CALM))
        if decision is not None:
            said[step] = decision
    return said


def short(said: dict[int, Decision]) -> dict[int, str]:
    return {step: d.action for step, d in said.items()}


def auto(mode: str = "auto", **changes: Any) -> Controller:
    settings = {"actions": "route", "mode": mode, "period": 10, "cooldown": 20} | changes
    return Controller(policy=Policy.parse(**settings), delay_steps=3)


def test_a_spike_starts_a_period_that_ends_after_warm_up_and_period() -> None:
    """Enabled after step 5: warm-up is 6 to 8, on is 9 to 18, and at the end of 18 it is over."""
    said = drive(auto(), 60, {5: raised(5)})
    assert short(said) == {5: "enable", 18: "disable"}
    assert all(d.acted for d in said.values())
    assert (
        said[5].reason
        == "spike raised at step 5 (onset 3, 9.0 σ): on for 10 steps after 3 of warm-up"
    )
    assert said[18].reason == "the period of 10 steps is over"


def test_off_says_what_it_would_have_done_and_never_acts() -> None:
    controller = auto("off")
    said = drive(controller, 60, {5: raised(5)})
    assert short(said) == {5: "enable", 18: "disable"}
    assert not any(d.acted for d in said.values())
    assert all(d.reason.startswith("would have acted: ") for d in said.values())


def test_a_spike_while_on_makes_it_last_a_whole_period_from_there() -> None:
    said = drive(auto(), 60, {5: raised(5), 12: raised(12)})
    assert short(said) == {5: "enable", 12: "none", 22: "disable"}
    assert "the period lasts until step 22" in said[12].reason


def test_a_spike_during_warm_up_shortens_nothing() -> None:
    said = drive(auto(), 60, {5: raised(5), 7: raised(7)})
    assert short(said) == {5: "enable", 7: "none", 18: "disable"}


def test_a_spike_at_the_very_end_of_a_period_extends_it() -> None:
    assert short(drive(auto(), 60, {5: raised(5), 18: raised(18)})) == {
        5: "enable",
        18: "none",
        28: "disable",
    }


def test_nothing_starts_during_the_cooldown_and_something_may_right_after() -> None:
    said = drive(auto(), 80, {5: raised(5), 37: raised(37), 38: raised(38)})
    assert short(said) == {5: "enable", 18: "disable", 37: "none", 38: "enable", 51: "disable"}
    assert "no action before step 38 (cooldown)" in said[37].reason


def test_the_budget_is_kept() -> None:
    said = drive(auto(budget=1, cooldown=0), 60, {5: raised(5), 30: raised(30)})
    assert short(said) == {5: "enable", 18: "disable", 30: "none"}
    assert "the budget of 1 activations is used up" in said[30].reason
    assert short(drive(auto(budget=0), 10, {5: raised(5)})) == {5: "none"}


@pytest.mark.parametrize(("kind", "actions"), [("divergence", {5: "enable"}), ("outlier", {})])
def test_a_divergence_acts_and_an_outlier_does_not(kind: str, actions: dict[int, str]) -> None:
    assert short(drive(auto(), 10, {5: raised(5, kind)})) == actions


@pytest.mark.parametrize("policy", ["off", "auto", "on"])
def test_a_loss_that_is_not_finite_cannot_be_repaired_by_routing(policy: str) -> None:
    controller = auto(policy)
    said = drive(controller, 10, {5: raised(5, "nonfinite")._replace(score=math.inf)})
    assert short(said) == {5: "none"}
    assert not said[5].acted
    assert (
        "routing cannot repair weights; restart from a checkpoint before that step"
        in said[5].reason
    )
    assert controller.activations == 0


def test_a_nonfinite_loss_at_the_end_of_a_period_does_not_keep_it_on() -> None:
    assert short(drive(auto(), 60, {5: raised(5), 18: raised(18, "nonfinite")}))[19] == "disable"


def test_on_decides_nothing() -> None:
    controller = auto("on")
    assert drive(controller, 60, {5: raised(5), 9: raised(9, "divergence")}) == {}


@pytest.mark.parametrize(
    ("before", "asked", "action"),
    [
        ("off", "off", "disable"),
        ("off", "auto", "none"),
        ("off", "on", "enable"),
        ("auto", "off", "disable"),
        ("auto", "auto", "none"),
        ("auto", "on", "enable"),
        ("on", "off", "disable"),
        ("on", "auto", "disable"),
        ("on", "on", "enable"),
    ],
)
def test_asking_takes_effect_at_once(before: str, asked: str, action: str) -> None:
    controller = auto(before)
    decision = controller.set_mode(asked, 7)
    assert (decision.action, decision.acted, controller.policy.mode) == (action, True, asked)
    assert decision.reason.startswith(f"requested: {asked}")


def test_asking_for_auto_during_a_period_does_not_keep_routing_on_for_ever() -> None:
    controller = auto()
    drive(controller, 10, {5: raised(5)})
    controller.set_mode("auto", 10)
    assert short(drive(controller, 60, {}, start=10)) == {18: "disable"}


def test_what_was_only_on_record_uses_up_neither_budget_nor_cooldown() -> None:
    controller = auto("off", budget=1)
    drive(controller, 20, {5: raised(5)})
    controller.set_mode("auto", 20)
    assert short(drive(controller, 30, {21: raised(21)}, start=20)) == {21: "enable"}


def test_a_period_on_record_does_not_end_one_that_was_asked_for() -> None:
    controller = auto("off")
    drive(controller, 10, {5: raised(5)})
    controller.set_mode("on", 10)
    assert drive(controller, 60, {}, start=10) == {}


@pytest.mark.parametrize("cut", [3, 7, 18, 19, 30])
def test_a_resumed_controller_decides_as_if_it_had_never_stopped(cut: int) -> None:
    events = {5: raised(5), 9: raised(9), 25: raised(25), 60: raised(60)}
    whole, first, second = auto(), auto(), Controller()
    expected = drive(whole, 90, events)
    said = drive(first, cut, events)
    second.load_state_dict(first.state_dict())
    assert said | drive(second, 90, events, start=cut) == expected
    assert len(expected) == 6
    assert drive(Controller(policy=Policy(mode="auto")), 90, events, start=cut) != expected, (
        "the twin: without its state"
    )


@pytest.mark.parametrize(
    "wrong", [{"mode": "maybe"}, {"period": 0}, {"cooldown": -1}, {"budget": -1}]
)
def test_wrong_settings_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match=r"policy is off, auto or on|at least"):
        Policy(**wrong)
    with pytest.raises(ValueError, match="not 'maybe'"):
        Controller().set_mode("maybe", 0)


# -- going back ----------------------------------------------------------------------------


def back(**changes: Any) -> Controller:
    return auto(**({"actions": "rollback,route"} | changes))


def at(controller: Controller, step: int, verdict: Verdict, *snapshots: int) -> Decision:
    decision = controller.decide(step, verdict, None, snapshots)
    assert decision is not None
    return decision


def test_training_goes_back_to_the_newest_snapshot_from_strictly_before_the_onset() -> None:
    """The onset is 48: the state before step 48 would only see it again."""
    only = {"actions": "rollback"}
    assert at(back(**only), 50, raised(50), 30, 40).restore == 40
    assert at(back(**only), 50, raised(50), 30, 40, 48).restore == 40
    assert at(back(**only), 50, raised(50), 30, 40, 47, 50).restore == 47


def test_with_routing_the_snapshot_is_old_enough_for_the_warm_up_where_one_is() -> None:
    assert at(back(), 50, raised(50), 30, 45, 47).restore == 45, (
        "the warm-up of 3 steps ends with the onset"
    )
    assert at(back(), 50, raised(50), 47).restore == 47


def test_a_period_after_going_back_counts_from_there() -> None:
    controller = back()
    decision = at(controller, 50, raised(50), 40)
    assert decision.reason == (
        "spike raised at step 50 (onset 48, 9.0 σ): roll back to the snapshot of step 40, "
        "on for 10 steps after 3 of warm-up"
    )
    assert (decision.action, decision.actions, decision.acted) == ("enable", ("route",), True)
    assert short(drive(controller, 90, {}, start=40)) == {52: "disable"}


def test_without_a_snapshot_from_before_it_the_rest_is_done() -> None:
    decision = at(back(), 50, raised(50), 48, 50)
    assert decision.restore is None
    assert (
        "no rollback, because no snapshot from before the onset is kept, on for 10 steps"
        in decision.reason
    )
    assert decision.actions == ("route",)


def test_rollback_alone_goes_back_once_and_then_lets_the_cooldown_pass() -> None:
    """The same batches lead to the same place: going there for ever would help nobody."""
    controller = back(actions="rollback")
    first = at(controller, 50, raised(50), 40)
    assert (first.restore, first.actions, first.action) == (40, (), "none")
    again = at(controller, 50, raised(50), 30, 40)
    assert again.restore is None
    assert "no action before step 59 (cooldown)" in again.reason
    assert at(controller, 80, raised(80), 70).restore == 70


def test_where_going_back_did_not_help_it_goes_to_the_snapshot_before() -> None:
    controller = back(actions="rollback", cooldown=0)
    assert at(controller, 50, raised(50), 30, 40).restore == 40
    assert at(controller, 50, raised(50), 30, 40).restore == 30
    assert at(controller, 50, raised(50), 30).restore == 30, "there is none before that"
    assert at(controller, 90, raised(90), 30, 80).restore == 80, "another place"


def test_an_outlier_never_goes_back() -> None:
    assert back(cooldown=0).decide(50, raised(50, "outlier"), None, [40]) is None


def test_a_loss_that_is_not_finite_goes_back_even_while_resting() -> None:
    controller = back()
    controller.cooldown_end = 1000
    decision = at(controller, 50, raised(50, "nonfinite"), 40)
    assert decision.restore == 40
    assert decision.reason.startswith(
        "the loss is not finite since step 48: roll back to the snapshot of step 40"
    )
    spent = back(budget=0)
    assert (
        "the budget of 0 activations is used up"
        in at(spent, 50, raised(50, "nonfinite"), 40).reason
    )
    nothing = at(back(), 50, raised(50, "nonfinite"))
    assert not nothing.acted
    assert "no snapshot from before the onset is kept; restart from a checkpoint" in nothing.reason


def test_on_goes_back_too_and_routing_stays() -> None:
    controller = back(mode="on")
    decision = at(controller, 50, raised(50), 40)
    assert (decision.restore, decision.actions) == (40, ())
    assert drive(controller, 200, {}, start=40) == {}


def test_off_says_where_it_would_have_gone_back_to_and_counts_from_where_it_is() -> None:
    controller = back(mode="off")
    decision = at(controller, 50, raised(50), 40)
    assert decision.reason.startswith("would have acted: spike raised at step 50")
    assert not decision.acted
    assert short(drive(controller, 90, {}, start=51)) == {63: "disable"}


def test_one_period_goes_back_once_unless_it_began_otherwise() -> None:
    controller = back(on="spike,warning")
    assert at_warning(controller, 45).actions == ("route",)
    assert at(controller, 50, raised(50), 40).restore == 40, "the warning had nothing to undo"
    decision = at(controller, 51, raised(51), 40)
    assert decision.restore is None
    assert "during a period" in decision.reason


def test_a_rollback_that_failed_leaves_a_whole_period() -> None:
    controller = back()
    at(controller, 50, raised(50), 40)
    controller.rollback_failed(50)
    assert short(drive(controller, 90, {}, start=51)) == {63: "disable"}


# -- warnings, schedules, and the end of a period ------------------------------------------


def at_warning(controller: Controller, step: int) -> Decision:
    decision = controller.decide(step, CALM, "flips in layer 3", [step - 5])
    assert decision is not None
    return decision


def test_a_warning_starts_a_period_and_never_goes_back() -> None:
    controller = back(on="warning")
    decision = at_warning(controller, 50)
    assert (decision.action, decision.restore) == ("enable", None)
    assert (
        decision.reason
        == "early warning at step 50 (flips in layer 3): on for 10 steps after 3 of warm-up"
    )
    assert short(drive(controller, 90, {60: raised(60)}, start=51)) == {63: "disable"}, (
        "spikes are not acted on"
    )
    assert back().decide(50, CALM, "flips in layer 3", [45]) is None, (
        "the twin: nobody asked for warnings"
    )


def test_a_schedule_is_kept_to_the_step() -> None:
    controller = auto(on="schedule:10-20,schedule:40-45")
    said = drive(controller, 60, {12: raised(12)})
    assert short(said) == {9: "enable", 19: "disable", 39: "enable", 44: "disable"}
    assert said[9].reason == "schedule: from step 10 until step 20"
    assert controller.activations == 0
    first = auto(on="schedule:0-5").begin(0)
    assert first is not None
    assert first.action == "enable"


def test_a_period_goes_on_while_the_loss_is_not_back_but_not_for_ever() -> None:
    away = {s: Verdict(9.0, None, None, True) for s in range(6, 100)}
    said = drive(auto(), 60, {5: raised(5)} | {s: v for s, v in away.items() if s < 22})
    assert short(said) == {5: "enable", 18: "none", 22: "disable"}
    assert (
        "has not recovered: the period goes on until the loss recovers, at most until step 28"
        in said[18].reason
    )
    assert short(drive(auto(), 60, {5: raised(5)} | away)) == {
        5: "enable",
        18: "none",
        28: "disable",
    }


def test_a_decision_says_when_the_next_is_possible() -> None:
    controller = auto(budget=2)
    first = at(controller, 5, raised(5))
    assert first.next_possible == 18 + 1 + 20
    said = drive(controller, 60, {}, start=6)
    assert said[18].next_possible == 38
    assert at(controller, 60, raised(60)).next_possible is None, "the budget is used up"
