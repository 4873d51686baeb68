"""Monitor: records every optimizer step of a training, and lets the controller act on it."""

import atexit
import time
from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from geodiag.hooks.adapters import Layout
from geodiag.hooks.measure.step_buffers import StepBuffers
from geodiag.hooks.record.step_observer import Observation
from geodiag.hooks.rewind import Rewind
from geodiag.hooks.routing.base import Rerouting
from geodiag.hooks.step_recording import FinishedStep, StepRecording
from geodiag.run import Run, Status


class Monitor:
    """A training under observation. Returned by `geodiag.attach`.

    Call `step` after each optimizer step and `close` at the end, or use the monitor as a context
    manager.
    """

    def __init__(
        self, model: nn.Module, layout: Layout, run: Run, recording: StepRecording, rewind: Rewind
    ) -> None:
        self.model = model
        self.layout = layout
        self.run = run
        self.steering = recording.steering
        self._recording = recording
        self._rewind = rewind
        self._context = recording.context
        self._recorder = recording.recorder
        self._guard = recording.recorder.guard
        self._rollback = recording.rollback
        self._consensus = recording.consensus
        self._closed = False
        atexit.register(self.close, "interrupted")

    def begin(self, resume: bool) -> None:
        """Prepare the first step; if `resume`, from the newest snapshot that all ranks have."""
        resumed = self._rollback.resume({"monitor": self}, resume, self._recording.ranks)
        self._rewind.move_to(self.next_step if resumed is None else resumed)
        self.steering.begin(self.next_step, self.run.attempt, resumed is not None)

    def batches(self, source: Iterable[Any]) -> Iterator[Any]:
        """Return the batches of `source`, as the routing orders them; again after a rollback."""
        return self._rollback.batches(source, self.next_step)

    # -- once a step -------------------------------------------------------------------------

    def step(
        self,
        loss: Tensor | float,
        *,
        grad_norm: Tensor | float | None = None,
        lr: float | None = None,
        domains: Sequence[str] | None = None,
        sequence_losses: Tensor | None = None,
    ) -> None:
        """Record one optimizer step, and let the controller decide about the next.

        loss: mean loss of the step, nats per token. grad_norm: norm of the whole gradient before
        clipping; default: of the gradients that the optimizer received. lr: default: of the
        optimizer's first group. domains: the domain of each of the step's sequences.
        sequence_losses: the mean loss of each.

        An error inside geodiag is reported once and does not reach the training. Of several ranks,
        every rank calls `step` at every step. GeodiagError if ranks that are steered together lost
        each other, or if a probe of sharded weights failed in the model itself.
        """
        if self._closed:  # the writer's thread has ended
            return
        began = time.perf_counter()
        finished = FinishedStep(
            step=self._context.next_step,
            began=began,
            loss=loss,
            grad_norm=grad_norm,
            lr=lr,
            domains=domains,
            sequence_losses=sequence_losses,
        )
        self._context.next_step += 1
        self._recording.record(finished)
        self._guard.run("steering", self._steer)
        self._guard.flush()
        self._check_ranks(finished.step)
        self._context.step_ended_at = time.perf_counter()
        self._context.record_seconds = self._context.step_ended_at - began

    def _steer(self) -> None:
        """Let the controller act on the steps that are recorded by now; take a snapshot if due."""
        for seen in self._recorder.observed():
            self._consensus.apply(seen.messages, self.next_step)
            snapshots = self._consensus.common_snapshots(self._rollback.steps)
            if self.steering.act_on(seen, snapshots):
                break  # rolled back: later observations are of the attempt that was given up
        self._consensus.poll_requests(self.next_step)
        self._guard.run("a snapshot", self._take_snapshot)

    def _take_snapshot(self) -> None:
        self._rollback.after_step(self.next_step, self._loss_in_range)

    @property
    def _loss_in_range(self) -> bool:
        """False during a spike: a state whose loss is out of range is no snapshot to return to."""
        return self.last is None or not (self.last.verdict.active or self.last.verdict.raised)

    def _check_ranks(self, step: int) -> None:
        """GeodiagError if ranks that are steered together no longer agree."""
        reason = self._consensus.desync_reason
        if reason is not None:
            self._guard.failed("what the other ranks saw", RuntimeError(reason))
            self._consensus.raise_if_desynced(f"steps up to {step} are on record in {self.run.url}")

    # -- the record --------------------------------------------------------------------------

    @property
    def next_step(self) -> int:
        """The step that training takes next."""
        return self._context.next_step

    @property
    def last(self) -> Observation | None:
        """The newest `Observation`, or None before the first."""
        return self._recorder.last

    @property
    def slots(self) -> StepBuffers:
        """The device buffers that the hooks write into."""
        return self._recording.measurement.buffers

    @property
    def routing(self) -> Rerouting | None:
        """The routing that the controller may switch, if the training has one."""
        return self.steering.routing

    def event(self, kind: str, message: str, **more: Any) -> None:
        """Record an event at the coming step: a fault, a note of the training script."""
        self._recorder.event(kind, message, **more)

    def wait(self) -> None:
        """Wait until every step so far is on record and all ranks have received it."""
        self._recorder.wait()

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed training needs to judge its steps as this one would.

        The routing has a `state_dict` of its own, whose queue holds batches.
        """
        self._recorder.wait()
        return {
            "next_step": self.next_step,
            **self._recorder.observer.state_dict(),
            "controller": self.steering.controller.state_dict(),
            "measured": self._recording.measurement.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`. The controller keeps the policy that it has now."""
        self._context.next_step = state["next_step"]
        self._recorder.observer.load_state_dict(state)
        self._recording.measurement.load_state_dict(state["measured"])
        self.steering.load_controller(state["controller"])

    # -- the end -----------------------------------------------------------------------------

    def close(self, status: Status = "finished") -> None:
        """Remove all hooks and close the run. Closing twice has no effect."""
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self.close)
        self._recording.measurement.remove()
        self.steering.close()
        self._guard.run("a snapshot", lambda: self._rollback.close(self._last_snapshot(status)))
        self._recorder.close(status)
        self._recording.ranks.leave()

    def _last_snapshot(self, status: Status) -> int | None:
        """Return the step to keep at the end: none of a failed training, or during a spike."""
        self._recorder.wait()
        return self.next_step if status == "finished" and self._loss_in_range else None

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None
    ) -> None:
        if kind is None:
            self.close("finished")
        else:
            stopped = issubclass(kind, KeyboardInterrupt | SystemExit)
            self.close("interrupted" if stopped else "failed")
