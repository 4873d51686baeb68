"""The message that each rank sends once a step, and its layout in one flat float64 buffer.

    [ rank 0's numbers | rank 1's numbers | … | rank 0's note as bytes | sums ]

Every rank fills its own part and zeros elsewhere, so that one all-reduce (a sum) gives every rank
the complete buffer. A sum of zeros and one number is this number, to the bit, on every rank.
"""

import json
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

NOTE_BYTES = 1024
SNAPSHOT_FIELDS = tuple(f"snapshot{i}" for i in range(8))
"""Steps of the rank's newest snapshots."""
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
"""The numbers of each rank at a step; NaN where the rank has no value."""


@dataclass(frozen=True, kw_only=True)
class RankMessage:
    """The message that one rank sends."""

    numbers: dict[str, float] = field(default_factory=dict)
    """Values of `FIELDS`; missing ones are sent as NaN."""
    sums: np.ndarray = field(default_factory=lambda: np.zeros(0))
    """Values to be added up over the ranks: at every step equally many on every rank."""
    note: dict[str, Any] = field(default_factory=dict)
    """Plain data, sent by rank 0 only: a request, an early warning."""


class RankMessages(NamedTuple):
    """The messages of all ranks at one step. They are identical on every rank."""

    by_rank: dict[str, np.ndarray]
    """Field → one value per rank."""
    sums: np.ndarray
    note: dict[str, Any]

    def largest(self, name: str) -> float:
        """Return the largest value of a field over the ranks, NaN if no rank has one."""
        values = self.by_rank[name]
        return float("nan") if np.isnan(values).all() else float(np.nanmax(values))

    @property
    def present(self) -> np.ndarray:
        """Which ranks have recorded this step."""
        return ~np.isnan(self.by_rank["here"])

    @property
    def loss(self) -> float:
        """Mean loss over the ranks, weighted by their tokens if all ranks counted them.

        A NaN on one rank gives NaN.
        """
        losses = self.by_rank["loss"][self.present]
        tokens = self.by_rank["tokens"][self.present]
        return float(np.average(losses, weights=tokens if (tokens > 0).all() else None))


def pack(message: RankMessage, rank: int, world: int) -> np.ndarray:
    """Return the flat buffer with this rank's part of the message."""
    buffer = np.zeros(world * len(FIELDS) + NOTE_BYTES + len(message.sums))
    by_rank, note, sums = _parts(buffer, world)
    by_rank[rank] = [message.numbers.get(name, np.nan) for name in FIELDS]
    if rank == 0 and message.note:
        text = json.dumps(message.note).encode()
        if len(text) <= NOTE_BYTES:  # a longer note is not sent
            note[: len(text)] = np.frombuffer(text, np.uint8)
    sums[:] = message.sums
    return buffer


def unpack(buffer: np.ndarray, world: int) -> RankMessages:
    """Return the messages in a buffer that was summed over all ranks."""
    by_rank, note, sums = _parts(buffer, world)
    text = note.astype(np.uint8).tobytes().rstrip(b"\0")
    fields = dict(zip(FIELDS, by_rank.T, strict=True))
    return RankMessages(fields, sums, json.loads(text) if text else {})


def own_messages(message: RankMessage) -> RankMessages:
    """Return the messages of a training in which only this rank exists or is reachable."""
    fields = {name: np.array([message.numbers.get(name, np.nan)]) for name in FIELDS}
    return RankMessages(fields, message.sums, message.note)


def _parts(buffer: np.ndarray, world: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return views of the buffer: numbers (world, fields), note, sums."""
    end_of_numbers = world * len(FIELDS)
    end_of_note = end_of_numbers + NOTE_BYTES
    by_rank = buffer[:end_of_numbers].reshape(world, len(FIELDS))
    return by_rank, buffer[end_of_numbers:end_of_note], buffer[end_of_note:]
