"""StepRecording: collect what is recorded of an optimizer step and queue it for the writer."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from geodiag.errors import GeodiagError
from geodiag.hooks.control.rank_consensus import RankConsensus
from geodiag.hooks.control.steering import Steering
from geodiag.hooks.distributed.rank_exchange import Ranks
from geodiag.hooks.distributed.sharded_weights import CollectiveAborted, full_value
from geodiag.hooks.record.recorder import Recorder
from geodiag.hooks.record.step_writer import StepMetadata
from geodiag.hooks.snapshots.rollback import Rollback
from geodiag.hooks.step_context import StepContext
from geodiag.hooks.step_measurement import StepMeasurement

Number = Tensor | float


@dataclass(kw_only=True)
class FinishedStep:
    """The arguments of `Monitor.step`, and when it was called."""

    step: int
    began: float
    """`time.perf_counter()`"""
    loss: Number
    grad_norm: Number | None
    lr: float | None
    domains: Sequence[str] | None
    sequence_losses: Tensor | None


@dataclass(kw_only=True)
class StepRecording:
    """Measures each finished step. An error is reported, and the loss is recorded all the same."""

    context: StepContext
    ranks: Ranks
    recorder: Recorder
    measurement: StepMeasurement
    rollback: Rollback
    steering: Steering
    consensus: RankConsensus

    def record(self, finished: FinishedStep) -> None:
        """Probe, measure and queue one step. GeodiagError if a probe of sharded weights failed."""
        # Collective if the numbers are spread over ranks, so outside of the guard.
        finished.loss = full_value(finished.loss)
        finished.grad_norm = full_value(finished.grad_norm)
        probed, aborted = self._probe()
        self.recorder.guard.run("the end of a step", lambda: self._measure(finished, probed))
        self.recorder.push_empty_if_missing(finished.step)
        if aborted is not None:
            self.recorder.wait()
            fix = "pass attach(..., probe=...) of a batch that the model can run"
            recorded = f"steps up to {finished.step} are on record in {self.recorder.url}"
            raise GeodiagError(f"{aborted}; {fix}; {recorded}") from aborted

    def _probe(self) -> tuple[dict[str, Tensor], CollectiveAborted | None]:
        """Return the values of the probes that are due.

        A probe that failed between two collectives has left the other ranks alone in them. No
        exchange with those ranks is possible any more, and the caller ends the training.
        """
        try:
            return self.measurement.probe_values(), None
        except CollectiveAborted as error:
            self.recorder.wait()
            self.ranks.leave()
            return {}, error

    def _measure(self, finished: FinishedStep, probed: dict[str, Tensor]) -> None:
        measurement = self.measurement
        device = measurement.buffers.device
        try:
            known = finished.grad_norm
            total = None if known is None else _scalar(known, device)
            values, absent = measurement.step_values(total)
            values |= probed
            values["steps.loss"] = _scalar(finished.loss, device)
            if finished.sequence_losses is not None and measurement.is_due("domains.loss"):
                values["domains.loss"] = finished.sequence_losses.detach()
            self.recorder.push(values, self._metadata(finished, absent))
        finally:  # also after a failure: no value of this step may be taken for one of the next
            measurement.prepare(self.context.next_step)

    def _metadata(self, finished: FinishedStep, absent: tuple[str, ...]) -> StepMetadata:
        ended_at = self.context.step_ended_at
        return StepMetadata(
            step=finished.step,
            lr=self.steering.interventions.effective_lr(finished.lr),
            routing_mode=self.steering.mode,
            routing_lag=self.steering.lag,
            step_seconds=None if ended_at is None else finished.began - ended_at,
            record_seconds=self.context.record_seconds,
            absent=absent,
            probe_seconds=self.measurement.probe_seconds,
            domains=None if finished.domains is None else tuple(finished.domains),
            probe_domains=self.measurement.plan.probe_domains,
            message=self.consensus.message(self.rollback.steps),
        )


def _scalar(value: Number, device: torch.device) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach().float().reshape(()).to(device)
    return torch.full((), float(value), device=device)
