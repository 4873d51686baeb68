"""StepBoundaries: which optimizers' steps together are one step of the training.

Muon and AdamW of one model step one after the other, and that is one step. Which optimizers take
part is guessed first (each that holds some of the model's weights), then learned from the training.
"""

from collections.abc import Iterable


class StepBoundaries:
    """Follows backwards and optimizer steps; optimizers are identified by any key."""

    def __init__(self, expected: Iterable[int]) -> None:
        self._expected = set(expected)
        self._stepped: set[int] = set()
        self._backward_seen = False
        """True if a backward ended since the last step was recorded."""

    def backward_ended(self) -> None:
        self._backward_seen = True

    def optimizer_stepped(self, optimizer: int) -> bool:
        """Note an optimizer's step; return whether the training's step is over with it."""
        latecomer = not self._backward_seen and not self._stepped
        if latecomer and optimizer not in self._expected:
            # It steps only now and then: the others have ended this step already.
            self._expected.add(optimizer)
            return False
        self._stepped.add(optimizer)
        return self.complete

    @property
    def complete(self) -> bool:
        """True if all expected optimizers have stepped."""
        return bool(self._stepped) and self._stepped >= self._expected

    def ended_by_next_pass(self) -> bool:
        """Return whether a forward or backward that begins now ends a step.

        The step waited for more optimizers. They do not take part: from here on they are not
        expected.
        """
        if not self._stepped:
            return False
        self._expected = set(self._stepped)
        return True

    def reset(self) -> None:
        """The step was recorded."""
        self._stepped.clear()
        self._backward_seen = False
