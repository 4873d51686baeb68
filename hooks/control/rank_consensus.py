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
from geodiag.hooks.distributed.rank_exchange import KEPT, Heard, Ranks, Said


class Concert:
    """Joins this rank's steering to the others'. In a training of one process only the requests are
    left of it.
    """

    def __init__(self, ranks: Ranks, steering: Steering, watch: RequestWatch) -> None:
        self._ranks, self._steering, self._watch = ranks, steering, watch
        self._apart: str | None = None
        self._kept: set[int] = set()

    def said(self, snapshots: list[int]) -> Said:
        """What this rank has to say with the coming exchange, beside the step's values."""
        if self._ranks.alone:
            return Said()
        request = self._watch.poll() if self._ranks.rank == 0 else None
        gave_up, self._steering.gave_up = self._steering.gave_up, False
        numbers = {"gave_up": float(gave_up), "mind": float(_fingerprint(self._steering))}
        numbers |= {
            name: float(step) for name, step in zip(KEPT, reversed(snapshots), strict=False)
        }
        return Said(numbers=numbers, note={"request": asdict(request)} if request else {})

    def common(self, snapshots: list[int]) -> list[int]:
        """Of this rank's snapshots those that every rank has."""
        return snapshots if self._ranks.alone else sorted(self._kept)

    def follow(self, heard: Heard | None, step: int) -> None:
        """Obeys what was asked, and falls back to today's choice where one rank had to."""
        self._steering.strangers = self._ranks.strangers
        if self._ranks.alone or heard is None:
            return
        self._kept = _in_all(np.stack([heard.by_rank[name] for name in KEPT], 1)[heard.spoke])
        if heard.largest("gave_up") > 0:
            rank = int(np.nanargmax(heard.by_rank["gave_up"]))
            self._steering.fall_back(f"rank {rank} could not look ahead, so no rank does")
        minds = heard.by_rank["mind"][~np.isnan(heard.by_rank["mind"])]
        if len(set(minds.tolist())) > 1:
            self._apart = "the ranks' controllers went apart; load the same state on every rank"
        if "request" in heard.note:
            self._steering.obey(Request(**heard.note["request"]), step)

    def ask_around(self, step: int) -> None:
        """A training of one process, or rank 0 of strangers, looks for requests by itself."""
        if self._ranks.alone and self._ranks.rank == 0:
            request = self._watch.poll()
            if request is not None:
                self._steering.obey(request, step)

    @property
    def torn(self) -> str | None:
        """Why the ranks no longer go together, if so."""
        return self._ranks.lost or self._apart

    def end_if_torn(self, where: str) -> None:
        """GeodiagError where the ranks are steered and no longer go together; ranks that only
        record can go on.
        """
        if self.torn is not None and self._steering.acts:
            raise GeodiagError(f"{self.torn}; {where}")


def _in_all(kept_RK: np.ndarray) -> set[int]:
    each = [set(row[~np.isnan(row)].astype(int).tolist()) for row in kept_RK]
    return set.intersection(*each) if each else set()


def _fingerprint(steering: Steering) -> int:
    state = json.dumps(steering.controller.state_dict(), sort_keys=True, default=str)
    return zlib.crc32(state.encode())
