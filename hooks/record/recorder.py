"""Recorder: one asynchronous copy a step off the device, and one thread that records it.

The writer's thread owns the run directory: rows, events and heartbeats are written there, in order.
On a CPU the training thread waits for it, so that a step is on record when `Monitor.step` returns.
On a GPU the training is at most one step ahead of the record.
"""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any

import torch
from torch import Tensor

from geodiag import log
from geodiag.events import Event
from geodiag.hooks.adapters.base import Layout
from geodiag.hooks.distributed.rank_exchange import Ranks
from geodiag.hooks.failure_guard import FailureGuard, describe
from geodiag.hooks.measure.step_values import unregistered
from geodiag.hooks.record.cascade_recorder import CascadeRecorder
from geodiag.hooks.record.serial_worker import Worker
from geodiag.hooks.record.step_observer import Observation, Observer
from geodiag.hooks.record.step_writer import StepMetadata, StepValues, StepWriter
from geodiag.hooks.step_context import StepContext
from geodiag.run import Run, Status


class Recorder:
    """`push` a step's values; `observed` returns what is known of the steps that are recorded.

    All methods are called on the training thread.
    """

    def __init__(
        self, run: Run, layout: Layout, device: torch.device, ranks: Ranks, context: StepContext
    ) -> None:
        self.url = run.url
        self._run = run
        self._context = context
        self._behind = 1 if device.type == "cuda" else 0
        """Steps that may be unrecorded when the training goes on."""
        self.guard = FailureGuard(self._report_failure)
        """For all parts of geodiag on the training thread: a failure is logged and becomes an event
        `problem`.
        """
        self._writer_guard = FailureGuard(_log_failure)
        """For the writer's thread. Logs only: what fails there is writing, so no event is tried."""
        self._cascades = CascadeRecorder(run, self.guard)
        self._steps = StepWriter(run, layout, ranks, self._writer_guard, self._cascades)
        self._writer = Worker("geodiag-writer")
        self._pending: deque[Future[Observation | None]] = deque()
        self._pushed: int | None = None

    # -- steps -------------------------------------------------------------------------------

    def push(self, values: dict[str, Tensor], metadata: StepMetadata) -> None:
        """Start the copy of one step's values to the host and queue the step for the writer."""
        for key in unregistered(values):
            values = {k: v for k, v in values.items() if k != key}
            self.guard.failed(f"the values of {key!r}", KeyError("no metric has this name"))
        shapes = [(name, value.shape) for name, value in values.items()]
        flat = torch.cat([value.detach().reshape(-1).float() for value in values.values()])
        packed = StepValues(shapes, flat)
        if flat.is_cuda:
            packed.flat = torch.empty(flat.shape, pin_memory=True)
            packed.flat.copy_(flat, non_blocking=True)
            packed.ready = torch.cuda.Event()
            packed.ready.record()
        self._submit(metadata, packed)

    def push_empty_if_missing(self, step: int) -> None:
        """Queue `step` without values if nothing of it was pushed.

        The other ranks block until every rank has sent its message of the step.
        """
        if self._pushed != step:
            self._submit(StepMetadata(step=step), None)

    def _submit(self, metadata: StepMetadata, values: StepValues | None) -> None:
        self._pushed = metadata.step
        self._pending.append(self._writer.submit(lambda: self._steps.write(metadata, values)))

    def observed(self) -> list[Observation]:
        """Return the steps recorded since the last call.

        On a GPU the newest step is still being copied and is left out.
        """
        found = []
        while len(self._pending) > self._behind:
            seen = self._pending.popleft().result()
            if seen is not None:
                found.append(seen)
        return found

    @property
    def last(self) -> Observation | None:
        """The newest observation, or None before the first."""
        return self._steps.last

    @property
    def observer(self) -> Observer:
        """Detector, stage scores and early warning, with their state."""
        return self._steps.observer

    # -- waiting -----------------------------------------------------------------------------

    def wait(self) -> None:
        """Wait until all pushed steps are on record."""
        for future in self._pending:
            future.result()

    def settle(self) -> None:
        """Wait, and discard the observations that were not returned yet."""
        self.wait()
        self._pending.clear()

    def next_attempt(self) -> int:
        """Start the next attempt, to which all later rows belong, and return its number."""

        def begin() -> int:
            self._cascades.flush()
            return self._run.next_attempt()

        return self._writer.submit(begin).result()

    # -- events ------------------------------------------------------------------------------

    def event(self, kind: str, message: str, **more: Any) -> None:
        """Record an event at the coming step, after the rows that are already queued.

        Of several ranks, only rank 0 records what all ranks observe; a `problem` is a rank's own.
        """
        if not self._steps.writes_shared_events and kind != "problem":
            return
        event = Event(step=self._context.next_step, kind=kind, message=message, **more)
        written = self._submit_guarded("events", partial(self._run.event, event))
        if not self._behind:
            written.result()

    def _report_failure(self, name: str, error: Exception) -> None:
        """Log that geodiag could not record something, and record it as an event `problem`."""
        line = f"could not record {name}: {describe(error)}"
        log.warning(f"geodiag {line}; training goes on without it")
        event = Event(step=self._context.next_step, kind="problem", message=line)
        self._writer.submit(partial(self._run.event, event))  # an error stays in the future

    def _submit_guarded(self, name: str, work: Callable[[], None]) -> Future[None]:
        return self._writer.submit(lambda: self._writer_guard.run(name, work))

    def close(self, status: Status) -> None:
        """Wait for everything that is queued and close the run."""
        self.settle()
        # A cascade that fails queues an event: the run is closed behind it.
        self._writer.submit(self._cascades.close).result()
        self._submit_guarded("closing the run", lambda: self._run.close(status))
        self._writer.stop()


def _log_failure(name: str, error: Exception) -> None:
    log.warning(f"geodiag: {name}: {describe(error)}; training goes on")
