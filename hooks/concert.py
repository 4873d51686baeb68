"""All ranks steer alike: what rank 0 is asked, and what one rank cannot do, reaches all of them with the same step.

Nothing is decided here. The ranks hear the same numbers and requests, and each one's controller decides from them; a
fingerprint of its state travels along, so that controllers that went apart (one rank was resumed, another was not)
are noticed by all at once, and stop.
"""

import json
import zlib
from dataclasses import asdict

import numpy as np

from geodiag.control import Request, RequestWatch
from geodiag.hooks.ranks import Heard, Ranks, Said
from geodiag.hooks.steering import Steering


class Concert:
    """Joins this rank's steering to the others'. In a training of one process only the requests are left of it."""

    def __init__(self, ranks: Ranks, steering: Steering, watch: RequestWatch) -> None:
        self._ranks, self._steering, self._watch = ranks, steering, watch
        self._apart = False

    def said(self) -> Said:
        """What this rank has to say with the coming exchange, beside the step's values."""
        if self._ranks.alone:
            return Said()
        request = self._watch.poll() if self._ranks.rank == 0 else None
        gave_up, self._steering.gave_up = self._steering.gave_up, False
        numbers = {"gave_up": float(gave_up), "mind": float(_fingerprint(self._steering))}
        return Said(numbers=numbers, note=json.dumps(asdict(request)).encode() if request else b"")

    def follow(self, heard: Heard, step: int) -> None:
        """Obeys what rank 0 was asked, and stops where one rank cannot go along."""
        if heard.largest("gave_up") > 0:
            rank = int(np.nanargmax(heard.by_rank["gave_up"]))
            self._steering.fall_back(f"rank {rank} could not look ahead, so no rank does")
        minds = heard.by_rank["mind"]
        if np.nanmax(minds) != np.nanmin(minds) and not self._apart:
            self._apart = True
            self._steering.let_go("the ranks' controllers differ; load the same state on every rank", step)
        if heard.note:
            self._steering.obey(Request(**json.loads(heard.note)), step)

    def alone(self, step: int) -> None:
        """What follows from requests where there is nobody to agree with."""
        request = self._watch.poll() if self._ranks.rank == 0 else None
        if request is not None:
            self._steering.obey(request, step)


def _fingerprint(steering: Steering) -> int:
    state = json.dumps(steering.controller.state_dict(), sort_keys=True, default=str)
    return zlib.crc32(state.encode())
