"""All ranks steer alike: what rank 0 is asked, and what one rank cannot do, reaches all of them
with the same step.

Nothing is decided here. The ranks hear the same numbers and requests, and each one's controller
decides from them; a fingerprint of its state travels along, so that controllers that went apart
(one rank was resumed and another was not, or could not be rolled back) are noticed by all at once.
"""

import json
import zlib
from dataclasses import asdict

import numpy as np

from geodiag.control import Request, RequestWatch
from geodiag.errors import GeodiagError
from geodiag.hooks.control.steering import Steering
from geodiag.hooks.distributed.rank_exchange import (
    SNAPSHOT_FIELDS,
    RankMessage,
    RankMessages,
    Ranks,
)


class RankConsensus:
    """Joins this rank's steering to the others'. In a training of one process only the requests are
    left of it.
    """

    def __init__(self, ranks: Ranks, steering: Steering, watch: RequestWatch) -> None:
        self._ranks, self._steering, self._watch = ranks, steering, watch
        self._apart: str | None = None
        self._kept: set[int] = set()

    def message(self, snapshots: list[int]) -> RankMessage:
        """What this rank has to say with the coming exchange, beside the step's values."""
        if self._ranks.single_process:
            return RankMessage()
        request = self._watch.poll() if self._ranks.rank == 0 else None
        routing_failed, self._steering.routing_failed = self._steering.routing_failed, False
        numbers = {
            "routing_failed": float(routing_failed),
            "controller_checksum": float(_fingerprint(self._steering)),
        }
        numbers |= {
            name: float(step)
            for name, step in zip(SNAPSHOT_FIELDS, reversed(snapshots), strict=False)
        }
        return RankMessage(numbers=numbers, note={"request": asdict(request)} if request else {})

    def common_snapshots(self, snapshots: list[int]) -> list[int]:
        """Of this rank's snapshots those that every rank has."""
        return snapshots if self._ranks.single_process else sorted(self._kept)

    def apply(self, heard: RankMessages | None, step: int) -> None:
        """Obeys what was asked, and falls back to today's choice where one rank had to."""
        self._steering.unreachable_ranks = self._ranks.unreachable_ranks
        if self._ranks.single_process or heard is None:
            return
        self._kept = _in_all(
            np.stack([heard.by_rank[name] for name in SNAPSHOT_FIELDS], 1)[heard.present]
        )
        if heard.largest("routing_failed") > 0:
            rank = int(np.nanargmax(heard.by_rank["routing_failed"]))
            self._steering.fall_back(f"rank {rank} could not look ahead, so no rank does")
        minds = heard.by_rank["controller_checksum"][
            ~np.isnan(heard.by_rank["controller_checksum"])
        ]
        if len(set(minds.tolist())) > 1:
            self._apart = "the ranks' controllers went apart; load the same state on every rank"
        if "request" in heard.note:
            self._steering.handle_request(Request(**heard.note["request"]), step)

    def poll_requests(self, step: int) -> None:
        """A training of one process, or rank 0 of unreachable_ranks, looks for requests by itself."""
        if self._ranks.single_process and self._ranks.rank == 0:
            request = self._watch.poll()
            if request is not None:
                self._steering.handle_request(request, step)

    @property
    def desync_reason(self) -> str | None:
        """Why the ranks no longer go together, if so."""
        return self._ranks.connection_error or self._apart

    def raise_if_desynced(self, where: str) -> None:
        """GeodiagError where the ranks are steered and no longer go together; ranks that only
        record can go on.
        """
        if self.desync_reason is not None and self._steering.must_agree:
            raise GeodiagError(f"{self.desync_reason}; {where}")


def _in_all(kept_RK: np.ndarray) -> set[int]:
    each = [set(row[~np.isnan(row)].astype(int).tolist()) for row in kept_RK]
    return set.intersection(*each) if each else set()


def _fingerprint(steering: Steering) -> int:
    state = json.dumps(steering.controller.state_dict(), sort_keys=True, default=str)
    return zlib.crc32(state.encode())
