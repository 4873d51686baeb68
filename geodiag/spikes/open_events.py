"""Open events: the spike and the excursion that have not ended, and the updates around them."""

from collections import deque
from dataclasses import replace
from typing import Any

from geodiag.spikes.event import OpenSpike, ScoredUpdate, Spike

_RISING = 1.5
"""Score above which a loss may already be rising. The onset of a spike is the first update of the
unbroken run of such scores that leads to its detection.
"""


class OpenEvents:
    """The open spike, the present excursion out of range, and the recent updates.

    An excursion is a stretch out of range for which the evidence is not enough yet. It becomes a
    spike, an outlier or a near miss.
    """

    def __init__(self, recent: int) -> None:
        """recent: number of updates that are kept, to find an onset in them."""
        self.recent: deque[ScoredUpdate] = deque(maxlen=recent)
        self.active: OpenSpike | None = None
        """The open spike, divergence or non-finite stretch."""
        self.unlearned = 0
        """Updates since the last one that was learned."""
        self._excursion: OpenSpike | None = None
        self._in_range = 0  # consecutive updates in range during a spike

    def is_open(self, kind: str) -> bool:
        """Return True if an event of this kind is open."""
        return self.active is not None and self.active.kind == kind

    def record(self, update: ScoredUpdate) -> None:
        """Add an update to the recent ones and to the open event."""
        self.recent.append(update)
        if self.active:
            self.active.extend(update)

    def start(self, event: OpenSpike) -> Spike:
        """Open an event and return it as raised."""
        self.active = event
        return event.as_spike(None)

    def start_spike(self) -> Spike:
        """Open a spike at the newest update, with its onset at the first update of the rise."""
        updates = list(self.recent)
        first = len(updates) - 1
        while first > 0 and updates[first - 1].score > _RISING:
            first -= 1
        self._in_range = 0
        self.drop_excursion()
        return self.start(OpenSpike.from_updates("spike", updates[first:]))

    def continue_spike(self, in_range: bool, normal: float, hold: int) -> Spike | None:
        """Count one more update of the open spike; return the spike if it has ended.

        It ends after `hold` updates in range whose scores average at most half of `normal`.
        """
        self.unlearned += 1
        self._in_range = self._in_range + 1 if in_range else 0
        if self._in_range < hold:
            return None
        last = list(self.recent)[-hold:]
        if sum(update.score for update in last) > hold * normal / 2:
            return None
        return self.close(last[0].step)

    def close(self, step: int) -> Spike | None:
        """End the open event at `step` and return it; None if there is none."""
        closed = self.active
        self.active = None
        self.unlearned = 0
        return closed.as_spike(step) if closed else None

    def extend_excursion(self, update: ScoredUpdate) -> None:
        """Add an update that is out of range to the excursion, or begin one with it."""
        self.unlearned += 1
        if self._excursion:
            self._excursion.extend(update)
        else:
            self._excursion = OpenSpike.from_updates("outlier", [update])

    def end_excursion(self) -> OpenSpike | None:
        """Return the excursion and forget it: the loss is in range again."""
        excursion = self._excursion
        self._excursion = None
        self.unlearned = 0
        return excursion

    def drop_excursion(self) -> None:
        """Forget the excursion without a result."""
        self._excursion = None
        self.unlearned = 0

    def as_divergence(self, step: int) -> OpenSpike | None:
        """Return what is out of range as a divergence detected at `step`.

        None if nothing is out of range, or if a divergence is open already.
        """
        lasting = self.active or self._excursion
        if lasting is None or lasting.kind == "divergence":
            return None
        return replace(lasting, kind="divergence", detected=step)

    def state_dict(self) -> dict[str, Any]:
        """Return the state as JSON-able data."""
        return {
            "recent": [list(update) for update in self.recent],
            "active": self.active and self.active.state_dict(),
            "excursion": self._excursion and self._excursion.state_dict(),
            "calm": self._in_range,
            "unlearned": self.unlearned,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state from `state_dict()`."""
        updates = (ScoredUpdate(*update) for update in state["recent"])
        self.recent = deque(updates, maxlen=self.recent.maxlen)
        self.active = OpenSpike.from_state(state["active"]) if state["active"] else None
        self._excursion = OpenSpike.from_state(state["excursion"]) if state["excursion"] else None
        self._in_range = state["calm"]
        self.unlearned = state["unlearned"]
