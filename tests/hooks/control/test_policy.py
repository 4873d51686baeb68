"""The policy: typed actions and triggers, their text forms, and errors that name the fix."""

from typing import Any

import pytest

import geodiag
from geodiag.hooks.control.controller import Controller
from geodiag.hooks.control.policy import (
    Clamp,
    LowerLr,
    OnSpike,
    OnWarning,
    Policy,
    Rollback,
    Route,
    Schedule,
    SkipBatch,
)
from geodiag.spikes.detector import Spike

EVERYTHING = Policy(
    mode="auto",
    on=[OnSpike(), OnWarning(), Schedule(5, 9), Schedule(20, 30)],
    actions=[Rollback(), SkipBatch(), Route(), LowerLr(0.5), Clamp(10)],
)
ON_TEXT = "spike, warning,schedule:5-9,schedule:20-30"
ACTIONS_TEXT = "rollback,skip-batch, route,lower-lr=0.5,clamp=10"


def test_a_policy_answers_what_it_does_and_on_what() -> None:
    policy = EVERYTHING
    assert policy.acts_on(OnSpike)
    assert policy.acts_on(OnWarning)
    assert policy.schedules == (Schedule(5, 9), Schedule(20, 30))
    assert all(policy.does(a) for a in (Rollback, SkipBatch, Route, LowerLr, Clamp))
    assert policy.lower_lr == LowerLr(0.5)
    assert policy.clamp == Clamp(10)
    assert policy.lasting == ("route", "lower-lr", "clamp")
    always = Policy(mode="on", actions=[Route(), Clamp(5)])
    assert always.lasting == ("clamp",), "mode `on` routes all the time"
    assert not Policy().does(Rollback)
    assert Policy().lower_lr is None
    assert not Policy(on=[OnWarning()]).acts_on(OnSpike)


def test_text_is_read_as_the_same_policy() -> None:
    parsed = Policy.parse(ACTIONS_TEXT, on=ON_TEXT, mode="auto")
    assert parsed == EVERYTHING
    assert Policy.parse("route") == Policy()
    assert Policy.parse("route", on="warning") != Policy()


def test_a_policy_is_rebuilt_from_its_dictionary() -> None:
    assert Policy.parse(**EVERYTHING.as_dict()) == EVERYTHING
    assert EVERYTHING.as_dict() == {
        "mode": "auto",
        "on": ON_TEXT.replace(" ", ""),
        "actions": ACTIONS_TEXT.replace(" ", ""),
        "period": 50,
        "cooldown": 100,
        "budget": 8,
    }
    third = Policy(actions=[LowerLr(1 / 3)], budget=2)
    assert Policy.parse(**third.as_dict()) == third, "no digit is lost"


def test_text_in_the_constructor_works_and_is_deprecated() -> None:
    written: dict[str, Any] = {"on": "warning", "actions": "rollback,lower-lr=0.5"}
    with pytest.warns(DeprecationWarning, match="is deprecated; write") as caught:
        policy = Policy(mode="auto", **written)
    messages = [str(w.message) for w in caught]
    assert "write on=[OnWarning()]" in messages[0]
    assert "write actions=[Rollback(), LowerLr(factor=0.5)]" in messages[1]
    assert [w.filename for w in caught] == [__file__] * 2, "the warning names the caller's line"
    assert policy == Policy(mode="auto", on=[OnWarning()], actions=[Rollback(), LowerLr(0.5)])


def test_typed_actions_cause_no_warning(recwarn: pytest.WarningsRecorder) -> None:
    assert Policy(actions=(Route(),)) == Policy.parse("route")
    assert len(recwarn) == 0


def test_actions_and_triggers_are_public_in_one_module() -> None:
    for name in geodiag.policy.__all__:
        assert getattr(geodiag.policy, name).__doc__
    assert geodiag.policy.Policy is geodiag.Policy
    assert geodiag.Policy(actions=[geodiag.policy.Clamp(3)]).clamp == Clamp(3)


OLD_STATE = {
    "policy": {
        "mode": "auto",
        "on": "spike",
        "actions": "rollback,route,lower-lr=0.5",
        "period": 10,
        "cooldown": 20,
        "budget": 3,
    },
    "delay_steps": 8,
    "activations": 1,
    "until": 30,
    "resting_until": 12,
    "went_back": True,
    "lingering": True,
    "restored": 7,
    "reached": 11,
}
"""A controller's state in snapshots before its fields were renamed."""


def test_the_state_of_an_older_snapshot_is_loaded() -> None:
    controller = Controller()
    controller.load_state_dict(OLD_STATE)
    assert controller == Controller(
        policy=Policy(
            mode="auto",
            actions=[Rollback(), Route(), LowerLr(0.5)],
            period=10,
            cooldown=20,
            budget=3,
        ),
        delay_steps=8,
        activations=1,
        period_end=30,
        cooldown_end=12,
        rolled_back=True,
        awaiting_recovery=True,
        restored_step=7,
        rolled_back_from=11,
    )
    assert set(vars(controller)) == set(vars(Controller())), "no field under its old name"
    again = Controller()
    again.load_state_dict(controller.state_dict())
    assert again == controller


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"on": "monday"}, "cannot act on 'monday'; it is spike, warning or schedule:START-END"),
        ({"on": "schedule:9-5"}, "cannot read 'schedule:9-5'; write schedule:START-END"),
        ({"on": "schedule:5"}, "write schedule:START-END"),
        (
            {"actions": "pray"},
            "there is no action 'pray'; it is one of rollback, skip-batch, route, lower-lr, clamp",
        ),
        ({"actions": "lower-lr"}, "write lower-lr=NUMBER"),
        ({"actions": "route=3"}, "route takes no number"),
        ({"actions": "lower-lr=half"}, "lower-lr=half is no number"),
        ({"actions": "lower-lr=1.5"}, "a factor from 0 to below 1, not 1.5"),
        ({"actions": "clamp=0"}, "a limit above 0, not 0"),
        ({"actions": "lower-lr=nan"}, "a factor from 0 to below 1"),
        ({"actions": "skip-batch"}, "skip-batch needs rollback"),
        ({"mode": "maybe"}, "policy is off, auto or on"),
        ({"period": 0}, "period is at least 1"),
    ],
)
def test_a_wrong_text_is_refused_with_the_fix(wrong: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Policy.parse(**({"actions": "route"} | wrong))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"actions": ["route"]}, "there is no action 'route'; it is one of Rollback, SkipBatch"),
        ({"actions": [Route]}, "there is no action <class"),
        ({"actions": [OnSpike()]}, "there is no action OnSpike"),
        ({"on": [Route()]}, "there is no trigger Route.*; it is one of OnSpike, OnWarning"),
        ({"actions": [SkipBatch()]}, "skip-batch needs rollback"),
    ],
)
def test_a_part_of_the_wrong_type_is_refused_with_the_fix(wrong: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Policy(**wrong)


def spike(onset: int, detected: int) -> Spike:
    return Spike(kind="spike", detected=detected, onset=onset, peak=onset, end=None, score=9.0)


def test_batches_from_the_update_before_the_onset_until_detection_are_skipped() -> None:
    policy = Policy.parse("rollback,skip-batch")
    assert policy.skipped(spike(10, 12)) == range(9, 13)
    assert policy.skipped(spike(0, 2)) == range(3)
    assert policy.skipped(spike(10, 300)) == range(9, 25), (
        "a late detection does not throw the data away"
    )
    assert Policy.parse("rollback").skipped(spike(10, 12)) is None
