"""The monitor: one training step after another is watched, recorded, and perhaps steered."""

import atexit
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from geodiag.control import RequestWatch
from geodiag.errors import GeodiagError
from geodiag.events import Event
from geodiag.hooks.adapters import Layout
from geodiag.hooks.control.controller import Controller
from geodiag.hooks.control.interventions import Interventions
from geodiag.hooks.control.rank_consensus import RankConsensus
from geodiag.hooks.control.steering import Steering
from geodiag.hooks.distributed.rank_exchange import Ranks
from geodiag.hooks.distributed.sharded_weights import CollectiveAborted, full_value
from geodiag.hooks.measure.step_buffers import Slots
from geodiag.hooks.record.recorder import Facts, Recorder
from geodiag.hooks.record.step_observer import Observation
from geodiag.hooks.routing.base import Rerouting
from geodiag.hooks.snapshots.rollback import Rollback
from geodiag.hooks.snapshots.snapshots import Snapshots
from geodiag.hooks.step_measurement import Measurement, Plan
from geodiag.run import Run, Status


class Monitor:
    """A watched training. `step` once an optimizer step, `close` at the end; or use it as a
    context.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        run: Run,
        layout: Layout,
        *,
        routing: Rerouting | None,
        controller: Controller,
        snapshots: Snapshots | None,
        plan: Plan,
        first_step: int,
        ranks: Ranks | None = None,
    ) -> None:
        self._ranks = ranks or Ranks()
        self.model, self.run, self.layout = model, run, layout
        self.next_step = first_step
        interventions = Interventions(optimizers, layout, controller.policy)
        self._device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self._recorder = Recorder(run, layout, self._device, self._ranks)
        together = 1 if self._ranks.single_process else self._ranks.world
        self._measured = Measurement(
            model, optimizers, layout, plan, self._complain, ranks=together
        )
        self._plan, self._optimizers = plan, optimizers
        self._ended_at: float | None = None
        self._record_seconds: float | None = None
        self._closed = False
        self._rollback = Rollback(snapshots, routing)
        self.steering = Steering(
            routing,
            controller,
            self.event,
            interventions,
            snapshots=lambda: self._consensus.common_snapshots(self._rollback.steps),
            go_back=self._go_back,
        )
        self._consensus = RankConsensus(self._ranks, self.steering, RequestWatch(Path(run.url)))
        self._measured.replaying = lambda: self.steering.replaying
        atexit.register(self.close, "interrupted")

    def begin(self, resume: bool) -> None:
        """Before the first step: to the newest snapshot on disk that all ranks have, where that is
        wanted.
        """
        resumed = self._rollback.resume({"monitor": self}, resume, self._ranks)
        self._stand_before(self.next_step if resumed is None else resumed)
        self.steering.begin(self.next_step, self.run.attempt, resumed is not None)

    def batches(self, source: Iterable[Any]) -> Iterator[Any]:
        """The batches of `source` in order, as the routing wants them, and once more after a
        rollback.
        """
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
        """Ends one optimizer step: records it, and lets the controller decide about the next.

        `grad_norm` is the total before clipping, where the trainer knows it; without it, what the
        optimizer saw.
        `domains` names the domain of each of the step's sequences, `sequence_losses` has the mean
        loss of each. A failure in here is reported once and swallowed: monitoring does not end a
        training. Of several ranks every one calls this for every step; GeodiagError where ranks
        that are steered together lost each other, or where a probe of sharded weights failed in the
        model itself.
        """
        if self._closed:  # the writer has ended; nothing would ever answer
            return
        began = time.perf_counter()
        step, self.next_step = self.next_step, self.next_step + 1
        loss, grad_norm = full_value(loss), full_value(grad_norm)
        probed, halfway = self._probed()
        try:
            try:
                self._record(step, loss, grad_norm, lr, began, domains, sequence_losses, probed)
            finally:  # also where that failed: nothing of this step may be read as the next one's
                self._measured.turn_over(self.next_step)
        except (
            Exception
        ) as e:  # monitoring must not end a training: said once, and the next step is tried again
            self._complain("the end of a step", e)
        self._recorder.ensure(step)
        if halfway is not None:
            self._recorder.wait()
            fix = "pass attach(..., probe=...) of a batch that the model can run"
            raise GeodiagError(
                f"{halfway}; {fix}; steps up to {step} are on record in {self.run.url}"
            ) from halfway
        try:
            self._steer()
        except Exception as e:  # nor must steering
            self._complain("steering", e)
        if self._consensus.desync_reason is not None:
            self._complain("what the other ranks saw", RuntimeError(self._consensus.desync_reason))
            self._consensus.raise_if_desynced(f"steps up to {step} are on record in {self.run.url}")
        self._ended_at = time.perf_counter()
        self._record_seconds = self._ended_at - began

    def _probed(self) -> tuple[dict[str, Tensor], CollectiveAborted | None]:
        """What the probes say. Where they left the other ranks alone, nothing more is heard of
        those.
        """
        try:
            return self._measured.probed(), None
        except CollectiveAborted as e:
            self._recorder.wait()
            self._ranks.leave()
            return {}, e

    def _steer(self) -> None:
        """What the steps that are through call for."""
        for seen in self._recorder.observed():
            self._consensus.apply(seen.heard, self.next_step)
            if self.steering.act_on(seen):
                break  # whatever else is known is of a past that was given up
        self._consensus.poll_requests(self.next_step)
        self._try("a snapshot", self._keep)

    def _record(
        self,
        step: int,
        loss: Tensor | float,
        grad_norm: Tensor | float | None,
        lr: float | None,
        began: float,
        domains: Sequence[str] | None,
        sequence_losses: Tensor | None,
        probed: dict[str, Tensor],
    ) -> None:
        values, absent = self._measured.values(
            None if grad_norm is None else _scalar(grad_norm, self._device)
        )
        values |= probed
        values["loss"] = _scalar(loss, self._device)
        if sequence_losses is not None and self._measured.wants("domains.loss"):
            values["domain/loss"] = sequence_losses.detach()
        groups = self._optimizers[0].param_groups if self._optimizers else []
        lr = lr if lr is not None else (float(groups[0]["lr"]) if groups else None)
        facts = Facts(
            step=step,
            lr=None if lr is None else lr * self.steering.interventions.lr_scale,
            routing_mode=self.steering.mode,
            routing_lag=self.steering.lag,
            step_seconds=began - self._ended_at if self._ended_at is not None else None,
            record_seconds=self._record_seconds,
            absent=absent,
            probe_seconds=self._measured.probe_seconds,
            domains=tuple(domains) if domains is not None else None,
            probe_domains=self._plan.probe_domains,
            said=self._consensus.message(self._rollback.steps),
        )
        self._recorder.push(values, facts)

    def _try(self, what: str, measure: Callable[[], dict[str, Tensor] | None]) -> dict[str, Tensor]:
        """What `measure` gives, or nothing where it fails: the loss is on record all the same."""
        try:
            return measure() or {}
        except Exception as e:  # monitoring must not end a training: said once
            self._complain(what, e)
            return {}

    # -- going back --------------------------------------------------------------------------

    def _keep(self) -> None:
        """A snapshot, where one is due."""
        self._rollback.after_step(self.next_step, self._healthy)

    @property
    def _healthy(self) -> bool:
        """Nobody wants to come back to a training whose loss is out of its range."""
        return self.last is None or not (self.last.verdict.active or self.last.verdict.raised)

    def _go_back(self, step: int, skip: range | None) -> int:
        """Training stands before `step` again, and writes it under the next attempt, which is
        returned.
        """
        self._recorder.settle()
        self._rollback.go_back(step, skip)
        attempt = self._recorder.next_attempt()
        self._stand_before(step)
        return attempt

    def _stand_before(self, step: int) -> None:
        self.next_step, self._ended_at = step, None
        self._measured.stand_before(step)

    # -- the rest ----------------------------------------------------------------------------

    def event(self, kind: str, message: str, **more: Any) -> None:
        """Records an event at the coming step: a fault, a note of the training script's own."""
        self._recorder.event(Event(step=self.next_step, kind=kind, message=message, **more))

    @property
    def slots(self) -> Slots:
        """The device buffers that the hooks write into."""
        return self._measured.slots

    @property
    def last(self) -> Observation | None:
        """The newest `Observation`, or None before the first."""
        return self._recorder.last

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training needs to go on judging as before. The routing has a `state_dict`
        of its own: its queue holds batches.
        """
        self._recorder.wait()
        return {
            "next_step": self.next_step,
            **self._recorder.observer.state_dict(),
            "controller": self.steering.controller.state_dict(),
            "measured": self._measured.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The controller goes on with the policy that it has now."""
        self.next_step = state["next_step"]
        self._recorder.observer.load_state_dict(state)
        self._measured.load_state_dict(state["measured"])
        controller = self.steering.controller
        policy = controller.policy
        controller.load_state_dict(state["controller"])
        self.steering.saved_mode, controller.policy = controller.policy.mode, policy

    @property
    def routing(self) -> Rerouting | None:
        """The routing that the controller may switch, if the training has one."""
        return self.steering.routing

    def _complain(self, what: str, error: Exception) -> None:
        self._recorder.complain(what, error, self.next_step)

    def wait(self) -> None:
        """Until every step so far is on record, and all ranks have heard of it."""
        self._recorder.wait()

    def close(self, status: Status = "finished") -> None:
        """Takes every hook off and closes the run. Closing twice does nothing."""
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self.close)
        self._measured.remove()
        self.steering.close()
        self._try("a snapshot", lambda: self._rollback.close(self._last_snapshot(status)))
        self._recorder.close(status)
        self._ranks.leave()

    def _last_snapshot(self, status: Status) -> int | None:
        """The step to be kept at the end, if any."""
        self._recorder.wait()
        return self.next_step if status == "finished" and self._healthy else None

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None
    ) -> None:
        if kind is None:
            self.close("finished")
        else:
            self.close(
                "interrupted" if issubclass(kind, KeyboardInterrupt | SystemExit) else "failed"
            )


def _scalar(value: Tensor | float, device: torch.device) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach().float().reshape(()).to(device)
    return torch.full((), float(value), device=device)
