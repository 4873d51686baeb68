"""Rollback: weights, data, routing and random states return to one and the same earlier step.

Between two steps `after_step` takes a snapshot if one is due, the loss is in its normal range, and
the routing is off or on; during warmup and drain its queue is only partly filled. A snapshot also
holds the position in the data, the routing's queue and the state of detector and controller. The
loader buffers every batch from the oldest snapshot on. `go_back` restores a snapshot, rewinds the
loader and discards the routing's queue, so that the next batch is the one that was trained on after
the snapshot; it can skip the batches of given steps. Detector and controller keep their state in a
rollback, or they would make the same decision again; a resume restores it. A resume in a new
process uses the newest snapshot that every rank has on disk. If a restore fails during a rollback,
training continues where it is; if a resume fails on one rank, it fails on every rank.
"""

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

_MAX_AGE = 2
"""Age beyond which a snapshot is not used, in multiples of the span of all snapshots.

It limits the buffered batches of a training that takes no snapshots any more.
"""


class Rollback:
    """Takes snapshots between steps and returns training to one of them, with its batches."""

    def __init__(self, snapshots: Snapshots | None, routing: Rerouting | None) -> None:
        self.snapshots = snapshots
        self._routing = routing
        self._loader: ReplayableLoader | None = None
        self._rollbacks = 0
        self._first_batch: dict[int, int] = {}
        """Step → position of its first batch, for the steps that could be repeated."""
        self._positions: dict[int, tuple[int, list[int]]] = {}
        """Snapshot → the loader's position, and the positions of the queued batches."""
        self._resumed_data: dict[str, Any] | None = None

    # -- data --------------------------------------------------------------------------------

    def batches(self, source: Iterable[Any], step: int) -> Iterator[Any]:
        """Yield the batches of `source` in order, routed, and again from a rollback's position.

        A second call (a new epoch) makes a rollback to before its first `step` impossible.
        """
        data: Iterable[Any] = source
        if self.snapshots is not None:
            self._loader = data = self._new_loader(source)
            self._positions = {}
            self._first_batch = {step: self._loader.next_to_train(self._queued)}
            if step in self.snapshots.steps:
                self._note_position(step)
        while True:
            rollbacks = self._rollbacks
            routed = self._routing.batches(data) if self._routing else iter(data)
            for batch in routed:
                yield batch
                if rollbacks != self._rollbacks:
                    break  # begin again: the loader was rewound
            else:
                return

    def _new_loader(self, source: Iterable[Any]) -> ReplayableLoader:
        resumed = self._resumed_data
        self._resumed_data = None
        if resumed is None:
            return ReplayableLoader(source)
        return ReplayableLoader.resumed(source, resumed)

    # -- between steps -----------------------------------------------------------------------

    @property
    def steps(self) -> list[int]:
        """Steps to which training can return."""
        if self.snapshots is None or self._loader is None:
            return []
        return [s for s in self.snapshots.steps if s in self._positions]

    def after_step(self, next_step: int, healthy: bool) -> None:
        """Note the position in the data; take a snapshot if one is due and training is healthy."""
        if self.snapshots is None:
            return
        if self._loader is not None:
            self._first_batch[next_step] = self._loader.next_to_train(self._queued)
        try:
            if healthy and self._routing_settled and self.snapshots.due(next_step):
                self.take(next_step)
        finally:
            if self._loader is not None:
                span = self.snapshots.every * self.snapshots.keep
                self._discard(next_step - _MAX_AGE * span, self._loader)

    def _discard(self, oldest: int, loader: ReplayableLoader) -> None:
        """Free the batches that no snapshot needs, and forget the snapshots before `oldest`."""
        for step in [s for s in self._positions if s < oldest]:
            del self._positions[step]
        oldest_snapshot = min(self.steps, default=None)

        needed_from = loader.position
        if oldest_snapshot is not None:
            needed_from = min(self._positions[oldest_snapshot][0], loader.position)
        loader.discard(needed_from)

        # One step more is kept: the batches to skip begin with the step before an onset.
        first_needed = (oldest if oldest_snapshot is None else oldest_snapshot) - 1
        while self._first_batch and (step := next(iter(self._first_batch))) < first_needed:
            del self._first_batch[step]

    def take(self, step: int) -> None:
        """Take a snapshot of the training before `step`, including its position in the data."""
        if self.snapshots is None:
            return
        if self._loader is None:
            raise ValueError(
                "a rollback needs the batches again; take them from run.batches(loader)"
            )
        self._loader.mark()
        extra = {
            "data": self._loader.state_dict(self._queued),
            "routing": self._routing.state_dict() if self._routing else None,
            "variant": self._routing.variant if self._routing else None,
            "resume_only": {
                name: part.state_dict() for name, part in self.snapshots.resume_only.items()
            },
        }
        if self.snapshots.take(step, extra):
            self._note_position(step)
            oldest = min(self.snapshots.steps)
            self._positions = {s: p for s, p in self._positions.items() if s >= oldest}

    def _note_position(self, step: int) -> None:
        if self._loader is not None:
            queued = self._loader.state_dict(self._queued)["queued"]
            self._positions[step] = self._loader.position, queued

    @property
    def _queued(self) -> int:
        return self._routing.queued if self._routing else 0

    @property
    def _routing_settled(self) -> bool:
        """False during warmup and drain: a partly filled queue cannot be restored."""
        return self._routing is None or self._routing.mode in ("off", "on")

    # -- going back --------------------------------------------------------------------------

    def go_back(self, step: int, skip: range | None) -> None:
        """Restore everything to before `step`, so that its batch comes next.

        skip: steps whose batches are skipped from now on.
        """
        if self.snapshots is None or self._loader is None:
            raise ValueError("no snapshot is kept to roll back to")
        extra = self.snapshots.restore(step)
        if skip is not None and skip.start in self._first_batch:
            # Positions must be read before the rewind, which changes what counts as handed out.
            first = self._first_batch[skip.start]
            after = self._first_batch.get(skip.stop, self._loader.next_to_train(self._queued))
            self._loader.skip(range(first, after))
        self._loader.rewind(*self._positions[step])
        self._rollbacks += 1
        if self._routing is not None:
            self._routing.rewind()
            _restore_routing(self._routing, extra)

    def resume(self, resume_only: dict[str, Stateful], wanted: bool, ranks: Ranks) -> int | None:
        """Restore the newest snapshot on disk that every rank has; return its step, None if none.

        resume_only: state that is added to every snapshot from now on, and restored by a resume
        only. wanted: False adds the state and restores nothing. GeodiagError on every rank if the
        ranks have no snapshot in common, or if one rank cannot read its own.
        """
        if self.snapshots is None:
            return None
        self.snapshots.resume_only |= resume_only
        step = _newest_common(ranks.gather(self.snapshots.steps)) if wanted else None
        if step is not None:
            ranks.run_on_all(partial(self._resume_at, step, self.snapshots))
        return step

    def _resume_at(self, step: int, snapshots: Snapshots) -> None:
        """Restore everything to before `step`, in a new process."""
        try:
            extra = snapshots.restore(step)
        except (OSError, ValueError) as e:
            raise GeodiagError(f"cannot resume from step {step}: {first_line(e, 300)}") from None
        self._resumed_data = extra["data"]
        for name, part in snapshots.resume_only.items():
            if name in extra["resume_only"]:
                part.load_state_dict(extra["resume_only"][name])
        if self._routing is not None:
            _restore_routing(self._routing, extra)
        elif extra["routing"] and extra["routing"]["mode"] != "off":
            raise GeodiagError(
                f"step {step} was routed by {extra['variant']} routing; resume with that routing"
            )

    def close(self, step: int | None = None) -> None:
        """Close the snapshots; with a `step`, first write a last snapshot to disk."""
        if self.snapshots is None:
            return
        try:
            possible = self._loader is not None and self._routing_settled
            on_disk = self.snapshots.where == "disk"
            if possible and on_disk and step is not None and step not in self.snapshots.steps:
                self.snapshots.wait()
                self.take(step)
        finally:
            self.snapshots.close()


def _restore_routing(routing: Rerouting, extra: dict[str, Any]) -> None:
    """Restore the routing's state. GeodiagError if a different routing was on in the snapshot."""
    saved = extra["routing"]
    variant = extra["variant"]
    if saved is None:
        return
    if variant != routing.variant or saved["delay_steps"] != routing.delay_steps:
        if saved["mode"] != "off":
            was = f"{variant} routing with a delay of {saved['delay_steps']}"
            raise GeodiagError(f"the snapshot was taken while {was} was on; resume with the same")
        return
    mode_before = routing.mode
    routing.load_state_dict(saved)
    if routing.mode != mode_before:
        routing.on_change(mode_before, routing.mode)


def _newest_common(steps_by_rank: Sequence[Sequence[int]]) -> int | None:
    """Return the newest step that all ranks have; None if no rank has any.

    GeodiagError if ranks have snapshots, but none in common.
    """
    common = set.intersection(*map(set, steps_by_rank))
    if common:
        return max(common)
    if any(steps_by_rank):
        each = "; ".join(
            f"rank {rank}: {', '.join(map(str, steps)) or 'none'}"
            for rank, steps in enumerate(steps_by_rank)
        )
        raise GeodiagError(
            f"no snapshot is held by every rank ({each}); begin again with another path"
        )
    return None
