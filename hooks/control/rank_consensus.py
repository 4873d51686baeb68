"""Rank consensus: all ranks steer alike, because each decides from the same messages.

No rank decides for another. Once a step every rank sends one message (see
`distributed.rank_exchange`) and receives the messages of all ranks; each rank's controller then
decides from the same numbers and reaches the same decision. Only rank 0 reads `control.json`, since
ranks that read the file at different moments would switch at different steps; its request travels
in the message, and all ranks apply it at the same step. A rank whose routing failed reports that in
its message, and all ranks return to today's choice together. A rollback uses only snapshots that
every rank has. The message also carries a checksum of the controller's state, so that controllers
that differ (one rank was resumed and another was not, or a rollback failed on one rank) are noticed
by all ranks at once. Ranks that differ or lost their connection end the training with an error if
it is steered; ranks that only record continue.
"""

import json
import zlib
from dataclasses import asdict

import numpy as np

from geodiag.control import Request, RequestWatch
from geodiag.errors import GeodiagError
from geodiag.hooks.control.steering import Steering
from geodiag.hooks.distributed.rank_exchange import Ranks
from geodiag.hooks.distributed.rank_messages import SNAPSHOT_FIELDS, RankMessage, RankMessages

# R ranks, S snapshots per rank


class RankConsensus:
    """Connects this rank's steering with the other ranks. A single process only reads requests."""

    def __init__(self, ranks: Ranks, steering: Steering, watch: RequestWatch) -> None:
        self._ranks = ranks
        self._steering = steering
        self._watch = watch
        self._controllers_differ: str | None = None
        self._common_snapshots: set[int] = set()

    def message(self, snapshots: list[int]) -> RankMessage:
        """Return this rank's steering part of the next message."""
        if self._ranks.single_process:
            return RankMessage()
        numbers = {
            "routing_failed": float(self._steering.take_routing_failure()),
            "controller_checksum": float(_checksum(self._steering)),
        }
        newest_first = reversed(snapshots)
        for name, step in zip(SNAPSHOT_FIELDS, newest_first, strict=False):
            numbers[name] = float(step)

        request = self._watch.poll() if self._ranks.rank == 0 else None
        note = {"request": asdict(request)} if request else {}
        return RankMessage(numbers=numbers, note=note)

    def common_snapshots(self, snapshots: list[int]) -> list[int]:
        """Return those of this rank's snapshots that every rank has."""
        return snapshots if self._ranks.single_process else sorted(self._common_snapshots)

    def apply(self, messages: RankMessages | None, step: int) -> None:
        """Apply the request and the failures in the messages of all ranks."""
        if self._ranks.single_process or messages is None:
            return

        snapshots_RS = np.stack([messages.by_rank[name] for name in SNAPSHOT_FIELDS], 1)
        self._common_snapshots = _held_by_all(snapshots_RS[messages.present])

        if messages.largest("routing_failed") > 0:
            rank = int(np.nanargmax(messages.by_rank["routing_failed"]))
            self._steering.fall_back(f"routing failed on rank {rank}, so no rank continues it")

        checksums_R = messages.by_rank["controller_checksum"]
        if len(set(checksums_R[~np.isnan(checksums_R)].tolist())) > 1:
            self._controllers_differ = (
                "the ranks' controllers differ; load the same state on every rank"
            )

        if "request" in messages.note:
            self._steering.handle_request(Request(**messages.note["request"]), step)

    def poll_requests(self, step: int) -> None:
        """Apply a request without messages: in a single process, or if ranks are unreachable."""
        if self._ranks.single_process and self._ranks.rank == 0:
            request = self._watch.poll()
            if request is not None:
                self._steering.handle_request(request, step)

    @property
    def desync_reason(self) -> str | None:
        """Why the ranks can no longer decide alike; None while they can."""
        return self._ranks.connection_error or self._controllers_differ

    def raise_if_desynced(self, where: str) -> None:
        """GeodiagError if the ranks are steered and can no longer decide alike."""
        if self.desync_reason is not None and self._steering.must_agree:
            raise GeodiagError(f"{self.desync_reason}; {where}")


def _held_by_all(snapshots_RS: np.ndarray) -> set[int]:
    """Return the steps that occur in every rank's row; NaN marks an unused field."""
    by_rank = [set(row[~np.isnan(row)].astype(int).tolist()) for row in snapshots_RS]
    return set.intersection(*by_rank) if by_rank else set()


def _checksum(steering: Steering) -> int:
    """Return a CRC-32 of the controller's state; 32 bits are exact in a float64."""
    state = json.dumps(steering.controller.state_dict(), sort_keys=True, default=str)
    return zlib.crc32(state.encode())
