"""CascadeRecorder: the cascade behind each spike, written as an event while the training goes on.

A spike is explained `AFTER` steps after it was raised, when the record shows how far it spread;
earlier if a rollback or the end of the training comes first. The cascade is computed from the run
directory, as any reader computes it, on a thread that the training does not wait for until `close`.
"""

from functools import partial

from geodiag.cascade.event import cascade_event
from geodiag.cascade.explain import AFTER
from geodiag.health import SPIKES
from geodiag.hooks.failure_guard import FailureGuard
from geodiag.hooks.record.serial_worker import Worker
from geodiag.hooks.record.step_observer import Observation
from geodiag.run import Run
from geodiag.spikes.detector import Spike


class CascadeRecorder:
    """Explains raised spikes. All methods are called on one thread, the writer's."""

    def __init__(self, run: Run, guard: FailureGuard) -> None:
        self._run = run
        self._guard = guard
        # Started here and not at the first spike: when a training ends without `close`, a spike may
        # still wait, and an interpreter that shuts down starts no thread.
        self._thread = Worker("geodiag-cascade")
        self._waiting: list[Spike] = []
        self._step = 0

    def observe(self, seen: Observation) -> None:
        """Queue the spike raised at this step, and explain one that was raised long enough ago."""
        self._step = seen.step
        raised = seen.verdict.raised
        if raised is not None and raised.kind in SPIKES:
            self._waiting.append(raised)
        if self._waiting and seen.step >= self._waiting[0].detected + AFTER:
            self._submit(self._waiting.pop(0))

    def flush(self) -> None:
        """Explain the waiting spikes from what is on record: their attempt is over."""
        while self._waiting:
            self._submit(self._waiting.pop(0))

    def close(self) -> None:
        """Explain the waiting spikes and wait until all events are written."""
        self.flush()
        self._thread.stop()

    def _submit(self, spike: Spike) -> None:
        record = partial(self._record, spike, self._run.attempt, self._step)
        guarded = partial(self._guard.run, "the cascade behind a spike", record)
        self._thread.submit(guarded)

    def _record(self, spike: Spike, attempt: int, step: int) -> None:
        self._run.event(cascade_event(self._run.url, spike, attempt, step))
