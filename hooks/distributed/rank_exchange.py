"""Messages between the ranks of one training: one packed all-reduce per step.

The all-reduce runs in the writer's thread, on a gloo group that only geodiag uses, so that it
cannot interleave with the training's collectives and never waits for a device. Every rank enters it
exactly once per step with a buffer of one fixed size, even if recording the step failed, because
the other ranks block until every rank has sent one. After it all ranks hold identical messages, and
whatever is computed from them is identical on every rank. A rank that does not answer within
`TIMEOUT`, or whose connection breaks, is given up: the remaining ranks set `connection_error` and
continue alone.
"""

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from geodiag.errors import GeodiagError
from geodiag.hooks.distributed.rank_messages import (
    RankMessage,
    RankMessages,
    own_messages,
    pack,
    unpack,
)

T = TypeVar("T")
TIMEOUT = timedelta(minutes=10)
"""How much longer than the others one rank may need for a step before it is given up."""


class Ranks:
    """This rank and its connection to the other ranks.

    In a training of one process an exchange returns this rank's own message at no cost.
    """

    def __init__(self, rank: int = 0, world: int = 1, group: Any = None) -> None:
        self.rank = rank
        self.world = world
        self._group = group
        self.connection_error: str | None = None
        """Why the other ranks are no longer reachable; None while they are."""

    @classmethod
    def join(cls) -> "Ranks":
        """Return the ranks of this process's training. Collective if there is a process group."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))

        rank = dist.get_rank()
        world = dist.get_world_size()
        if world == 1:
            return cls()
        if not dist.is_gloo_available():
            raise GeodiagError(
                "geodiag needs gloo for messages between ranks, and this torch was built without "
                "it; install a torch that has gloo"
            )
        return cls(rank, world, dist.new_group(backend="gloo", timeout=TIMEOUT))

    @property
    def single_process(self) -> bool:
        """True if this rank exchanges no messages: one process, or the connection is lost."""
        return self._group is None

    @property
    def unreachable_ranks(self) -> bool:
        """True if other ranks exist but cannot be reached.

        There was no process group at `attach`, or the connection is lost.
        """
        return self._group is None and self.world > 1

    def leave(self) -> None:
        """Close the connection. The other ranks notice that and continue without this rank."""
        group = self._group
        self._group = None
        if group is not None and dist.is_initialized():
            dist.destroy_process_group(group)

    # -- once a step, in the writer's thread ---------------------------------------------------

    def exchange(self, message: RankMessage) -> RankMessages:
        """Return the messages of all ranks, or only this rank's own if no other is reachable.

        Blocks until every rank has sent its message.
        """
        if self._group is None:
            return own_messages(message)

        buffer = pack(message, self.rank, self.world)
        try:
            dist.all_reduce(torch.from_numpy(buffer), group=self._group)  # in place
        except Exception as e:  # gloo raises several types for a broken connection
            self._disconnect(e)
            return own_messages(message)
        return unpack(buffer, self.world)

    def _disconnect(self, error: Exception) -> None:
        if self._group is None:  # this rank itself has left
            return
        self._group = None
        others = "the other rank" if self.world == 2 else f"the other {self.world - 1} ranks"
        reason = _gloo_reason(error)
        self.connection_error = f"rank {self.rank} lost the connection to {others} ({reason})"

    # -- before the first step, on the training thread -----------------------------------------

    def create_on_all(
        self,
        make: Callable[[int | None], T],
        attempt_of: Callable[[T], int],
        undo: Callable[[T], None],
    ) -> T:
        """Return `make(attempt)`: rank 0 first, with None, then the others with rank 0's attempt.

        If one rank fails, the ranks that succeeded call `undo`, and every rank raises the first
        GeodiagError. Collective.
        """
        if self._group is None:
            return make(None)

        made: T | None = None
        failure: str | None = None
        if self.rank == 0:
            made, failure = _attempt(lambda: make(None))
        from_rank_0 = [(None if made is None else attempt_of(made), failure)]
        dist.broadcast_object_list(from_rank_0, src=0, group=self._group)
        attempt, failure = from_rank_0[0]

        if failure is None and self.rank != 0:
            made, failure = _attempt(lambda: make(attempt))
        self.raise_on_all(failure, undo=None if made is None else lambda: undo(made))
        assert made is not None, "no rank failed"
        return made

    def gather(self, value: T) -> list[T]:
        """Return the `value` of every rank, in rank order. Collective."""
        if self._group is None:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=self._group)
        return values

    def raise_on_all(self, failure: str | None, undo: Callable[[], Any] | None = None) -> None:
        """Raise the first rank's failure on every rank, after `undo`. Collective."""
        first = next((f for f in self.gather(failure) if f is not None), None)
        if first is None:
            return
        if undo is not None:
            undo()
        raise GeodiagError(first)

    def run_on_all(self, work: Callable[[], Any]) -> None:
        """Run `work`, as all ranks do; a GeodiagError of one rank is raised on all. Collective."""
        _, failure = _attempt(work)
        self.raise_on_all(failure)

    def check_same(self, what: str, value: Any) -> None:
        """GeodiagError on every rank if `value` is not the same on all. Collective."""
        values = self.gather(value)
        different = next((r for r, v in enumerate(values) if v != values[0]), None)
        if different is not None:
            raise GeodiagError(
                f"rank {different} has another {what} than rank 0; give every rank the same"
            )


def _attempt(make: Callable[[], T]) -> tuple[T | None, str | None]:
    """Return the result and None, or None and the text of a GeodiagError."""
    try:
        return make(), None
    except GeodiagError as e:
        return None, str(e)


def _gloo_reason(error: Exception) -> str:
    """Return what happened, from gloo's "[file:line] what happened. advice"."""
    first_line = (str(error).splitlines() or [type(error).__name__])[0]
    return first_line.rpartition("] ")[2].partition(". ")[0]
