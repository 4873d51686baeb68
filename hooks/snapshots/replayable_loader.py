"""The tape: batches as a loader gives them, kept while training could come back to them."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any


class ReplayableLoader:
    """An iterator of batches that can be rewound. Positions count what the loader gave, from 0.

    A loader that has `state_dict` is asked for it at every mark, so that a resume need not count
    through all the data.
    """

    def __init__(self, source: Iterable[Any], position: int = 0) -> None:
        self._source = source
        self._data: Iterator[Any] | None = None
        self.position = position
        """Of the batch that comes next."""
        self._head = position
        """Of the batch that the loader gives next."""
        self._kept: deque[Any] = deque()
        """Batches `_head - len(_kept)` to `_head - 1`."""
        self._given: deque[int] = deque(maxlen=1 << 16)
        self._left_out: list[range] = []
        self._marks: dict[int, Any] = {position: _state(source)}

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        """The next batch, from the tape or from the loader. After its end, a rewound tape goes on."""
        while any(self.position in r for r in self._left_out):
            self._read(self.position)
            self.position += 1
        batch = self._read(self.position)
        self._given.append(self.position)
        self.position += 1
        return batch

    def _read(self, position: int) -> Any:
        if position == self._head:
            if self._data is None:
                self._data = iter(self._source)
            self._kept.append(next(self._data))
            self._head += 1
        return self._kept[position - self._head]

    def next_to_train(self, queued: int) -> int:
        """The position of the next batch to train on, while `queued` of those handed out still
        wait.
        """
        return self._given[-queued] if queued else self.position

    def mark(self) -> None:
        """A snapshot is taken here: remembers where the loader stands."""
        if self.position == self._head:
            self._marks[self.position] = _state(self._source)

    def rewind(self, position: int, waiting: Sequence[int] = ()) -> None:
        """The next batch is that of `position`, and `waiting` are handed out. ValueError where it
        is not kept.
        """
        if not self._head - len(self._kept) <= position <= self._head:
            raise ValueError(f"the batches from {position} on are no longer kept")
        self.position = position
        self._given = deque(waiting, maxlen=self._given.maxlen)

    def discard(self, before: int) -> None:
        """Nobody will come back to positions below `before`."""
        while self._kept and self._head - len(self._kept) < before:
            self._kept.popleft()
        newest = max((m for m in self._marks if m <= before), default=None)
        self._marks = {p: s for p, s in self._marks.items() if newest is None or p >= newest}
        self._left_out = [r for r in self._left_out if r.stop > before]

    def skip(self, positions: range) -> None:
        """From now on these positions are passed over."""
        self._left_out.append(positions)

    # -- resume ------------------------------------------------------------------------------

    def state_dict(self, queued: int) -> dict[str, Any]:
        """Where to go on, by the newest mark at or before here; `queued` of those handed out still
        wait.
        """
        mark = max((m for m in self._marks if m <= self.position), default=None)
        return {
            "position": self.position,
            "waiting": list(self._given)[-queued:] if queued else [],
            "mark": mark,
            "source": None if mark is None else self._marks[mark],
            "left_out": [(r.start, r.stop) for r in self._left_out],
        }

    @classmethod
    def resumed(cls, source: Any, state: dict[str, Any]) -> "ReplayableLoader":
        """A tape over a new `source`, at the place where `state` was taken. ValueError where the
        data ends before.
        """
        known = state["source"] is not None
        if known:
            source.load_state_dict(state["source"])
        tape = cls(source, state["mark"] if known else 0)
        try:
            while tape.position < state["position"]:
                tape._read(tape.position)
                tape.position += 1
                tape.discard(tape.position)
        except StopIteration:
            raise ValueError(
                f"the data ends after {tape.position} batches; pass the loader of the run"
            ) from None
        tape._left_out = [range(*r) for r in state["left_out"]]
        tape.rewind(tape.position, state["waiting"])
        return tape


def _state(source: Any) -> Any:
    """Where a loader stands, if it can say."""
    return (
        source.state_dict()
        if hasattr(source, "state_dict") and hasattr(source, "load_state_dict")
        else None
    )
