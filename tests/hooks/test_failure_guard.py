"""The failure guard: one report per name, defaults, disabled names, and no logging in a graph."""

import pytest
import torch

from geodiag.hooks.distributed.sharded_weights import CollectiveAborted
from geodiag.hooks.failure_guard import FailureGuard, FirstFailure


class Reports(list):
    """Collects what a guard reports."""

    def __call__(self, name: str, error: Exception) -> None:
        self.append((name, str(error)))


def fail(message: str = "broken"):
    raise ValueError(message)


def test_run_returns_the_result_or_the_default():
    guard = FailureGuard(Reports())
    assert guard.run("layers", lambda: {"a": 1}, {}) == {"a": 1}
    assert guard.run("layers", fail, {}) == {}
    assert guard.run("rows", fail) is None


def test_a_failure_is_reported_once_per_name():
    reports = Reports()
    guard = FailureGuard(reports)
    for _ in range(3):
        guard.run("rows of layers", lambda: fail("disk full"))
        guard.run("rows of steps", lambda: fail("disk full"))
    assert reports == [("rows of layers", "disk full"), ("rows of steps", "disk full")]


def test_a_name_is_tried_again_unless_retry_is_off():
    guard = FailureGuard(Reports())
    calls = []

    def work() -> None:
        calls.append(1)
        fail()

    guard.run("retried", work)
    guard.run("retried", work)
    assert len(calls) == 2
    assert not guard.disabled("retried")

    guard.run("dropped", work, retry=False)
    guard.run("dropped", work, retry=False)
    assert len(calls) == 3
    assert guard.disabled("dropped")
    assert guard.run("dropped", lambda: 1, 2, retry=False) == 2
    assert guard.run("another", lambda: 1, 2, retry=False) == 1


def test_a_report_that_fails_does_not_reach_the_training():
    def report(_name: str, _error: Exception) -> None:
        raise OSError("stderr is closed")

    assert FailureGuard(report).run("rows", fail, 7) == 7


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, CollectiveAborted])
def test_errors_that_must_end_the_training_pass_through(error):
    reports = Reports()

    def work() -> None:
        raise error

    with pytest.raises(error):
        FailureGuard(reports).run("probe", work)
    assert not reports


def test_an_error_caught_elsewhere_is_reported_likewise():
    reports = Reports()
    guard = FailureGuard(reports)
    guard.failed("a snapshot", OSError("disk full"))
    guard.failed("a snapshot", OSError("disk full"), retry=False)
    assert reports == [("a snapshot", "disk full")]
    assert guard.disabled("a snapshot")


@pytest.mark.parametrize("broken", [False, True])
def test_a_compiled_hook_does_not_trace_the_report(broken):
    """One full graph, with and without a failure; the report comes later, outside of the graph."""
    reports = Reports()

    def report(name: str, error: Exception) -> None:
        torch._dynamo.graph_break()  # would end a full graph, as logging does
        reports(name, error)

    guard = FailureGuard(report)
    seen = torch.zeros(1, 3)
    model = torch.nn.Linear(3, 3)

    def write(x: torch.Tensor) -> None:
        if broken:
            raise ValueError("no such view")
        seen.copy_(x)

    model.register_forward_hook(
        lambda _module, _args, out: guard.run("layer", lambda: write(out.detach()), retry=False)
    )
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    out = compiled(torch.ones(1, 3))
    torch.testing.assert_close(out, compiled(torch.ones(1, 3)), rtol=0, atol=0)
    assert guard.disabled("layer") == broken
    assert not reports
    assert torch.equal(seen, torch.zeros(1, 3)) == broken

    guard.flush()
    assert reports == ([("layer", "no such view")] if broken else [])


def test_first_failure_is_raised_after_all_calls():
    failures = FirstFailure()
    assert failures.run(lambda: 1) == 1
    assert failures.run(lambda: fail("first"), 0) == 0
    assert failures.run(lambda: fail("second")) is None
    with pytest.raises(ValueError, match="first"):
        failures.raise_if_any()
    failures.raise_if_any()
