"""The policy: what people write is what is meant, and nonsense is refused with the fix."""

import pytest

import geodiag
from geodiag.hooks.control.policy import Policy
from geodiag.spikes.detector import Spike


def test_what_is_written_is_what_is_done() -> None:
    policy = geodiag.Policy(
        mode="auto",
        on="spike, warning,schedule:5-9,schedule:20-30",
        actions="rollback,skip-batch, route,lower-lr=0.5,clamp=10",
    )
    assert policy.acts_on("spike")
    assert policy.acts_on("warning")
    assert policy.schedules == ((5, 9), (20, 30))
    assert all(policy.does(a) for a in ("rollback", "skip-batch", "route", "lower-lr", "clamp"))
    assert (policy.value("lower-lr"), policy.value("clamp")) == (0.5, 10.0)
    assert policy.lasting == ("route", "lower-lr", "clamp")
    assert Policy(mode="on", actions="route,clamp=5").lasting == ("clamp",), (
        "on keeps routing whatever else ends"
    )
    assert not Policy().does("rollback")
    assert not Policy(on="warning").acts_on("spike")


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
def test_nonsense_is_refused_with_the_fix(wrong: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Policy(**wrong)


def spike(onset: int, detected: int) -> Spike:
    return Spike(kind="spike", detected=detected, onset=onset, peak=onset, end=None, score=9.0)


def test_skipped_are_the_batches_from_the_update_that_led_to_the_onset_until_detection() -> None:
    policy = Policy(actions="rollback,skip-batch")
    assert policy.skipped(spike(10, 12)) == range(9, 13)
    assert policy.skipped(spike(0, 2)) == range(3)
    assert policy.skipped(spike(10, 300)) == range(9, 25), (
        "a late detection does not throw the data away"
    )
    assert Policy(actions="rollback").skipped(spike(10, 12)) is None
