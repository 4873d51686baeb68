"""A data loader whose recent batches can be replayed, because training may return to them."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any


class ReplayableLoader:
    """An iterator of batches that can be rewound. Positions count the loader's batches from 0.

    A loader with `state_dict` is asked for its state at every mark, so that a resume does not need
    to iterate over all data from the start.
    """

    def __init__(self, source: Iterable[Any], position: int = 0) -> None:
        self._source = source
        self._data: Iterator[Any] | None = None
        self.position = position
        """Position of the batch that comes next."""
        self._head = position
        """Position of the batch that the loader yields next; beyond `position` during a replay."""
        self._buffer: deque[Any] = deque()
        """Batches `_head - len(_buffer)` to `_head - 1`."""
        self._handed_out: deque[int] = deque(maxlen=1 << 16)
        """Positions of the batches that were handed out, in order."""
        self._skipped: list[range] = []
        self._marks: dict[int, Any] = {position: _state(source)}
        """Position → the loader's state at that position."""

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        """Return the next batch, from the buffer or from the loader.

        A rewind after the end of the data makes the iterator continue.
        """
        while any(self.position in skipped for skipped in self._skipped):
            self._read(self.position)
            self.position += 1
        batch = self._read(self.position)
        self._handed_out.append(self.position)
        self.position += 1
        return batch

    def _read(self, position: int) -> Any:
        if position == self._head:
            if self._data is None:
                self._data = iter(self._source)
            self._buffer.append(next(self._data))
            self._head += 1
        return self._buffer[position - self._head]

    def next_to_train(self, queued: int) -> int:
        """Return the position of the next batch to train on.

        queued: how many of the batches handed out wait in the routing's queue.
        """
        return self._handed_out[-queued] if queued else self.position

    def mark(self) -> None:
        """Keep the loader's state at this position, for a snapshot."""
        # During a replay the loader is ahead of the position, and its state is of no use.
        if self.position == self._head:
            self._marks[self.position] = _state(self._source)

    def rewind(self, position: int, queued: Sequence[int] = ()) -> None:
        """Continue with the batch of `position`; the batches of `queued` count as handed out.

        ValueError if the batch is no longer buffered.
        """
        if not self._head - len(self._buffer) <= position <= self._head:
            raise ValueError(f"the batches from {position} on are no longer kept")
        self.position = position
        self._handed_out = deque(queued, maxlen=self._handed_out.maxlen)

    def discard(self, before: int) -> None:
        """Free the batches of positions below `before`; no rewind will go there."""
        while self._buffer and self._head - len(self._buffer) < before:
            self._buffer.popleft()
        newest = max((m for m in self._marks if m <= before), default=None)
        self._marks = {p: s for p, s in self._marks.items() if newest is None or p >= newest}
        self._skipped = [skipped for skipped in self._skipped if skipped.stop > before]

    def skip(self, positions: range) -> None:
        """Pass over these positions from now on, in every replay."""
        self._skipped.append(positions)

    # -- resume ------------------------------------------------------------------------------

    def state_dict(self, queued: int) -> dict[str, Any]:
        """Return the position, and the loader's state at the newest mark at or before it.

        queued: how many of the batches handed out wait in the routing's queue.
        """
        mark = max((m for m in self._marks if m <= self.position), default=None)
        return {
            "position": self.position,
            "queued": list(self._handed_out)[-queued:] if queued else [],
            "mark": mark,
            "source": None if mark is None else self._marks[mark],
            "skipped": [(r.start, r.stop) for r in self._skipped],
        }

    @classmethod
    def resumed(cls, source: Any, state: dict[str, Any]) -> "ReplayableLoader":
        """Return a loader over a new `source`, at the position of `state`.

        The source continues from its saved state, or else is iterated from the start. ValueError if
        the data end before the position.
        """
        has_state = state["source"] is not None
        if has_state:
            source.load_state_dict(state["source"])
        loader = cls(source, state["mark"] if has_state else 0)
        try:
            while loader.position < state["position"]:
                loader._read(loader.position)
                loader.position += 1
                loader.discard(loader.position)
        except StopIteration:
            raise ValueError(
                f"the data ends after {loader.position} batches; pass the loader of the run"
            ) from None
        loader._skipped = [range(*r) for r in state["skipped"]]
        loader.rewind(loader.position, state["queued"])
        return loader


def _state(source: Any) -> Any:
    """Return the loader's state, None if it has none."""
    if hasattr(source, "state_dict") and hasattr(source, "load_state_dict"):
        return source.state_dict()
    return None
