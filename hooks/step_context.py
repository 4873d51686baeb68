"""StepContext: where the training is. One object, shared by the parts of a monitor."""

from dataclasses import dataclass


@dataclass
class StepContext:
    """The monitor advances it; events, problems and resumes read the step from it."""

    next_step: int
    """The step that training takes next; between two calls of `Monitor.step`, the current one."""
    step_ended_at: float | None = None
    """`time.perf_counter()` at the end of the last step. None before the first and after a
    rollback, when the time since then is not the duration of a step.
    """
    record_seconds: float | None = None
    """Time that geodiag itself took at the last step, on the training thread."""

    def move_to(self, step: int) -> None:
        """Continue before `step`: at the beginning, at a resume or after a rollback."""
        self.next_step = step
        self.step_ended_at = None
