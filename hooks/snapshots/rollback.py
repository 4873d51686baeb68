"""Going back: weights, data, routing and random states to one and the same earlier step."""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

from geodiag.errors import GeodiagError
from geodiag.hooks.distributed.rank_exchange import Ranks
from geodiag.hooks.routing.base import Rerouting
from geodiag.hooks.snapshots.replayable_loader import ReplayableLoader
from geodiag.hooks.snapshots.snapshots import Snapshots
from geodiag.hooks.snapshots.state_tree import Stateful
from geodiag.store.files import first_line

_OLD = 2
"""Times the span of all snapshots: older ones, of a training that takes none any more, are not gone
back to.
"""


class Rollback:
    """Takes snapshots between steps, and brings a training back to one. Counts batches, so that
    they come again.
    """

    def __init__(self, snapshots: Snapshots | None, routing: Rerouting | None) -> None:
        self.snapshots, self._routing = snapshots, routing
        self._tape: ReplayableLoader | None = None
        self._turn = 0
        self._first: dict[int, int] = {}
        """Step → position of its first batch, of the steps that could still come again."""
        self._positions: dict[int, tuple[int, list[int]]] = {}
        """Snapshot → where the tape stood, and what it had handed out that still waited."""
        self._resumed: dict[str, Any] | None = None

    # -- data --------------------------------------------------------------------------------

    def batches(self, source: Iterable[Any], step: int) -> Iterator[Any]:
        """The batches of `source` in order, routed if there is a routing, and again from the place
        gone back to.

        Called once more, for another epoch, say, training can no longer go back to before this
        `step`.
        """
        tape: Iterable[Any] = source
        if self.snapshots is not None:
            resumed, self._resumed = self._resumed, None
            self._tape = tape = (
                ReplayableLoader(source)
                if resumed is None
                else ReplayableLoader.resumed(source, resumed)
            )
            self._first, self._positions = {}, {}
            self._first[step] = self._tape.next_to_train(self._queued)
            if step in self.snapshots.steps:
                self._note_position(step)
        while True:
            turn = self._turn
            routed = self._routing.batches(tape) if self._routing else iter(tape)
            for batch in routed:
                yield batch
                if turn != self._turn:
                    break
            else:
                return

    # -- between steps -----------------------------------------------------------------------

    @property
    def steps(self) -> list[int]:
        """The steps that training can go back to."""
        if self.snapshots is None or self._tape is None:
            return []
        return [s for s in self.snapshots.steps if s in self._positions]

    def after_step(self, next_step: int, calm: bool) -> None:
        """Notes where the data stands; takes a snapshot where one is due and the training is
        `calm`.
        """
        if self.snapshots is None:
            return
        if self._tape is not None:
            self._first[next_step] = self._tape.next_to_train(self._queued)
        try:
            if calm and self._at_rest and self.snapshots.due(next_step):
                self.take(next_step)
        finally:
            if self._tape is not None:
                self._forget(
                    next_step - _OLD * self.snapshots.every * self.snapshots.keep, self._tape
                )

    def _forget(self, oldest: int, tape: ReplayableLoader) -> None:
        """Batches that no snapshot needs any more; and where none is taken any more, the snapshots
        before `oldest`.
        """
        for step in [s for s in self._positions if s < oldest]:
            del self._positions[step]
        back_to = min(self.steps, default=None)
        kept = tape.position if back_to is None else self._positions[back_to][0]
        tape.discard(min(kept, tape.position))
        while (
            self._first
            and (step := next(iter(self._first))) < (oldest if back_to is None else back_to) - 1
        ):
            del self._first[step]

    def take(self, step: int) -> None:
        """Keeps the training as it is now, before `step`."""
        if self.snapshots is None:
            return
        if self._tape is None:
            raise ValueError(
                "a rollback needs the batches again; take them from run.batches(loader)"
            )
        self._tape.mark()
        aside = {
            "data": self._tape.state_dict(self._queued),
            "routing": self._routing.state_dict() if self._routing else None,
            "variant": self._routing.variant if self._routing else None,
            "resume_only": {
                name: thing.state_dict() for name, thing in self.snapshots.resume_only.items()
            },
        }
        if self.snapshots.take(step, aside):
            self._note_position(step)
            oldest = min(self.snapshots.steps)
            self._positions = {s: p for s, p in self._positions.items() if s >= oldest}

    def _note_position(self, step: int) -> None:
        if self._tape is not None:
            self._positions[step] = (
                self._tape.position,
                self._tape.state_dict(self._queued)["waiting"],
            )

    @property
    def _queued(self) -> int:
        return self._routing.queued if self._routing else 0

    @property
    def _at_rest(self) -> bool:
        """While routing warms up or drains, the queue of batches is half filled: no place to come
        back to.
        """
        return self._routing is None or self._routing.mode in ("off", "on")

    def go_back(self, step: int, skip: range | None) -> None:
        """The coming batch is that of `step`, and everything else is as it was then."""
        if self.snapshots is None or self._tape is None:
            raise ValueError("nothing is kept to go back to")
        aside = self.snapshots.restore(step)
        if skip is not None and skip.start in self._first:
            after = self._first.get(skip.stop, self._tape.next_to_train(self._queued))
            self._tape.skip(range(self._first[skip.start], after))
        self._tape.rewind(*self._positions[step])
        self._turn += 1
        if self._routing is not None:
            self._routing.rewind()
            self._put_back_routing(self._routing, aside)

    def resume(self, resume_only: dict[str, Stateful], wanted: bool, ranks: Ranks) -> int | None:
        """The step of the newest snapshot on disk, before which the training now stands; None where
        there is none.

        Of several ranks all go to the newest that every one of them has. Where one has none of
        those, or cannot read its own, none goes on: GeodiagError on every rank. `resume_only` goes into
        every snapshot from here on, and comes back with this one.
        """
        if self.snapshots is None:
            return None
        self.snapshots.resume_only |= resume_only
        step = _newest(ranks.gather(self.snapshots.steps)) if wanted else None
        if step is not None:
            ranks.run_on_all(partial(self._begin_at, step, self.snapshots))
        return step

    def _begin_at(self, step: int, snapshots: Snapshots) -> None:
        """Everything as it was before `step`, in a new process."""
        try:
            aside = snapshots.restore(step)
        except (OSError, ValueError) as e:
            raise GeodiagError(f"cannot resume from step {step}: {first_line(e, 300)}") from None
        self._resumed = aside["data"]
        for name, thing in snapshots.resume_only.items():
            if name in aside["resume_only"]:
                thing.load_state_dict(aside["resume_only"][name])
        if self._routing is not None:
            self._put_back_routing(self._routing, aside)
        elif aside["routing"] and aside["routing"]["mode"] != "off":
            raise GeodiagError(
                f"step {step} was routed by {aside['variant']} routing; resume with that routing"
            )

    def close(self, step: int | None = None) -> None:
        """Gives everything back; before that, with a `step`, keeps on disk where the training
        ended.
        """
        if self.snapshots is None:
            return
        try:
            wanted = (
                step is not None
                and self._tape is not None
                and self._at_rest
                and self.snapshots.where == "disk"
            )
            if wanted and step not in self.snapshots.steps:
                assert step is not None
                self.snapshots.wait()
                self.take(step)
        finally:
            self.snapshots.close()

    @staticmethod
    def _put_back_routing(routing: Rerouting, aside: dict[str, Any]) -> None:
        saved, variant = aside["routing"], aside["variant"]
        if (
            saved is None
            or variant != routing.variant
            or saved["delay_steps"] != routing.delay_steps
        ):
            if saved is not None and saved["mode"] != "off":
                was = f"{variant} routing with a delay of {saved['delay_steps']}"
                raise GeodiagError(
                    f"the snapshot was taken while {was} was on; resume with the same"
                )
            return
        before = routing.mode
        routing.load_state_dict(saved)
        if routing.mode != before:
            routing.on_change(before, routing.mode)


def _newest(held: Sequence[Sequence[int]]) -> int | None:
    """The newest step that all ranks hold; None where nobody holds any. GeodiagError where they
    have none in common.
    """
    common = set.intersection(*map(set, held))
    if common:
        return max(common)
    if any(held):
        each = "; ".join(
            f"rank {r}: {', '.join(map(str, steps)) or 'none'}" for r, steps in enumerate(held)
        )
        raise GeodiagError(
            f"no snapshot is held by every rank ({each}); begin anew with another path"
        )
    return None
