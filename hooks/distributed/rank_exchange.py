"""The ranks of one training: one packed all-reduce a step, so that each knows what all of them saw.

It runs in the writer's thread, on a gloo group of geodiag's own: it cannot interleave with the
training's collectives, and waits for no device. Every rank enters it once a step, whatever failed
before, with a message of one fixed size. All ranks then hold the same numbers and the same request,
and what is decided from them is decided alike everywhere.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from geodiag.errors import GeodiagError

T = TypeVar("T")
TIMEOUT = timedelta(minutes=10)
"""So long a rank may take for one step more than the others before they go on without it."""
NOTE_BYTES = 1024
SNAPSHOT_FIELDS = tuple(f"snapshot{i}" for i in range(8))
"""The newest snapshots."""
FIELDS = (
    "here",
    "loss",
    "tokens",
    "grad_norm",
    "stage1",
    "stage2",
    "stage3",
    "routing_failed",
    "controller_checksum",
    *SNAPSHOT_FIELDS,
)
"""What each rank says of a step: numbers, NaN where it has nothing to say."""


@dataclass(frozen=True, kw_only=True)
class RankMessage:
    """One rank's part of the exchange."""

    numbers: dict[str, float] = field(default_factory=dict)
    """Of `FIELDS`."""
    sums: np.ndarray | None = None
    """To be added up over ranks; `Ranks.sums` long."""
    note: dict[str, Any] = field(default_factory=dict)
    """Plain data that only rank 0's is heard of; a request, an early warning."""


class RankMessages(NamedTuple):
    """What all ranks said of one step."""

    by_rank: dict[str, np.ndarray]
    sums: np.ndarray
    note: dict[str, Any]

    def largest(self, name: str) -> float:
        """NaN where nobody said anything."""
        values = self.by_rank[name]
        return float("nan") if np.isnan(values).all() else float(np.nanmax(values))

    @property
    def present(self) -> np.ndarray:
        """Which ranks had a step to tell of."""
        return ~np.isnan(self.by_rank["here"])

    @property
    def loss(self) -> float:
        """Mean over ranks, weighted by their tokens where they were counted. One rank's NaN is
        everybody's.
        """
        losses, tokens = self.by_rank["loss"][self.present], self.by_rank["tokens"][self.present]
        return float(np.average(losses, weights=tokens if (tokens > 0).all() else None))


class Ranks:
    """This rank among the others. A training of one process is alone, and every exchange costs
    nothing.
    """

    def __init__(self, rank: int = 0, world: int = 1, group: Any = None) -> None:
        self.rank, self.world, self._group = rank, world, group
        self.sum_count = 0
        """How many sums a message carries."""
        self.connection_error: str | None = None
        """Why the others are no longer heard, once they are not."""

    @classmethod
    def join(cls) -> "Ranks":
        """The ranks of this process's training. Collective where there is a process group: every
        rank calls it.
        """
        if not (dist.is_available() and dist.is_initialized()):
            return cls(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))
        rank, world = dist.get_rank(), dist.get_world_size()
        if world == 1:
            return cls()
        if not dist.is_gloo_available():
            raise GeodiagError(
                "ranks talk over gloo, which this torch was built without; install one that has it"
            )
        return cls(rank, world, dist.new_group(backend="gloo", timeout=TIMEOUT))

    @property
    def single_process(self) -> bool:
        """Whether nobody else is heard."""
        return self._group is None

    @property
    def unreachable_ranks(self) -> bool:
        """Whether there are other ranks that cannot be talked to: lost, or no process group was
        there at `attach`.
        """
        return self._group is None and self.world > 1

    def leave(self) -> None:
        """Closes the lines. The others notice, and go on without this rank."""
        group, self._group = self._group, None
        if group is not None and dist.is_initialized():
            dist.destroy_process_group(group)

    # -- once a step, in the writer's thread ---------------------------------------------------

    def exchange(self, said: RankMessage) -> RankMessages:
        """What all ranks said, once all have said it; this rank's own words where it is alone."""
        heard = None if self._group is None else self._exchanged(said)
        if heard is not None:
            return heard
        own = {name: np.array([said.numbers.get(name, np.nan)]) for name in FIELDS}
        return RankMessages(own, self._own_sums(said), said.note)

    def _own_sums(self, said: RankMessage) -> np.ndarray:
        return np.full(self.sum_count, np.nan) if said.sums is None else said.sums

    def _exchanged(self, said: RankMessage) -> RankMessages | None:
        # Each rank adds to zeros: a sum of zeros and one number is that number, to the bit, on
        # every rank.
        columns, n = self.world * len(FIELDS), len(FIELDS)
        message = np.zeros(columns + NOTE_BYTES + self.sum_count)
        mine = [said.numbers.get(name, np.nan) for name in FIELDS]
        message[self.rank * n : (self.rank + 1) * n] = mine
        if self.rank == 0:
            text = json.dumps(said.note).encode() if said.note else b""
            written = np.frombuffer(text if len(text) <= NOTE_BYTES else b"", np.uint8)
            message[columns : columns + len(written)] = written
        message[columns + NOTE_BYTES :] = self._own_sums(said)
        wire = torch.from_numpy(message)
        try:
            dist.all_reduce(wire, group=self._group)
        except Exception as e:  # whatever a torn line raises
            self._lose(e)
            return None
        by_rank = message[:columns].reshape(self.world, n)
        text = message[columns : columns + NOTE_BYTES].astype(np.uint8).tobytes().rstrip(b"\0")
        note = json.loads(text) if text else {}
        return RankMessages(
            dict(zip(FIELDS, by_rank.T, strict=True)), message[columns + NOTE_BYTES :], note
        )

    def _lose(self, error: Exception) -> None:
        if self._group is None:  # it is this rank that left
            return
        self._group = None
        # gloo says where in its own source it noticed; what it noticed comes behind that, and
        # advice after it.
        why = (
            (str(error).splitlines() or [type(error).__name__])[0]
            .rpartition("] ")[2]
            .partition(". ")[0]
        )
        others = "the other rank" if self.world == 2 else f"the other {self.world - 1} ranks"
        self.connection_error = f"rank {self.rank} no longer hears {others} ({why})"

    # -- before the first step, on the training thread -----------------------------------------

    def create_on_all(
        self,
        make: Callable[[int | None], T],
        attempt_of: Callable[[T], int],
        undo: Callable[[T], None],
    ) -> T:
        """What `make` makes: rank 0's first, then the others' with rank 0's attempt. Where one
        cannot, none goes on.

        GeodiagError of the first rank that could not, on every rank.
        """
        if self._group is None:
            return make(None)
        made, failure = None, None
        if self.rank == 0:
            made, failure = _try(lambda: make(None))
        word = [(None if made is None else attempt_of(made), failure)]
        dist.broadcast_object_list(word, src=0, group=self._group)
        attempt, failure = word[0]
        if failure is None and self.rank != 0:
            made, failure = _try(lambda: make(attempt))
        self.raise_on_all(failure, undo=None if made is None else lambda: undo(made))
        assert made is not None, "nobody failed"
        return made

    def gather(self, value: T) -> list[T]:
        """Every rank's `value`, in their order. Collective."""
        if self._group is None:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=self._group)
        return values

    def raise_on_all(self, failure: str | None, undo: Callable[[], Any] | None = None) -> None:
        """Raises on every rank what one rank failed at. Collective."""
        first = next((f for f in self.gather(failure) if f is not None), None)
        if first is None:
            return
        if undo is not None:
            undo()
        raise GeodiagError(first)

    def run_on_all(self, work: Callable[[], Any]) -> None:
        """Does `work` on this rank as on all. GeodiagError of the first that could not, on every
        rank. Collective.
        """
        _, failure = _try(work)
        self.raise_on_all(failure)

    def check_same(self, what: str, value: Any) -> None:
        """GeodiagError on every rank where `value` is not the same on all. Collective."""
        values = self.gather(value)
        odd = next((r for r, v in enumerate(values) if v != values[0]), None)
        if odd is not None:
            raise GeodiagError(
                f"rank {odd} has another {what} than rank 0; give every rank the same"
            )


def _try(make: Callable[[], T]) -> tuple[T | None, str | None]:
    try:
        return make(), None
    except GeodiagError as e:
        return None, str(e)
