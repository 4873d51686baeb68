"""Rewind: move all parts of a monitor to before an earlier step."""

from geodiag.hooks.record.recorder import Recorder
from geodiag.hooks.snapshots.rollback import Rollback
from geodiag.hooks.step_context import StepContext
from geodiag.hooks.step_measurement import StepMeasurement


class Rewind:
    """Rolls back training, record and measurement together. Used by `Steering` and at a resume."""

    def __init__(
        self,
        context: StepContext,
        recorder: Recorder,
        measurement: StepMeasurement,
        rollback: Rollback,
    ) -> None:
        self._context = context
        self._recorder = recorder
        self._measurement = measurement
        self._rollback = rollback

    def go_back(self, step: int, skip: range | None) -> int:
        """Restore the state before `step`, start a new attempt and return its number.

        skip: steps whose batches are left out when the training continues.
        """
        self._recorder.settle()
        self._rollback.go_back(step, skip)
        attempt = self._recorder.next_attempt()
        self.move_to(step)
        return attempt

    def move_to(self, step: int) -> None:
        """Continue before `step`; measurements have no earlier step to compare with."""
        self._context.move_to(step)
        self._measurement.start_at(step)
