"""Rounds: which optimizers' steps are together one step of the training.

Muon and AdamW of one model step one after the other, and that is one step. Who steps in a round is
first guessed (every optimizer that holds some of the model's weights), then learned.
"""

from collections.abc import Iterable


class Rounds:
    """`differentiated`, `stepped`, `next` as the training goes; optimizers are told apart by any
    key.
    """

    def __init__(self, expected: Iterable[int]) -> None:
        self._expected = set(expected)
        self._stepped: set[int] = set()
        self._fresh = False

    def differentiated(self) -> None:
        """A backward: a step that comes now is no latecomer of the round before."""
        self._fresh = True

    def stepped(self, optimizer: int) -> bool:
        """Whether the round is over with this optimizer's step."""
        if not self._fresh and not self._stepped and optimizer not in self._expected:
            self._expected.add(
                optimizer
            )  # it steps only now and then, and the others have already ended the round
            return False
        self._stepped.add(optimizer)
        return self.complete

    @property
    def complete(self) -> bool:
        """Whether everyone expected has stepped."""
        return bool(self._stepped) and self._stepped >= self._expected

    def next(self) -> bool:
        """Whether what begins now, a forward or a backward, shows that a round is over that waited
        for more steps.
        """
        if not self._stepped:
            return False
        self._expected = set(self._stepped)
        return True

    def over(self) -> None:
        """The round was recorded."""
        self._stepped.clear()
        self._fresh = False
