"""What `geodiag run` tells the processes of a command, in one environment variable, and what they
leave for it to read.

Nothing heavy is imported here: the command line reads it too.
"""

import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from geodiag.hooks.autorecord.sitecustomize_hook import ORDERS, note


@dataclass(frozen=True, kw_only=True)
class Orders:
    """What is to be recorded, and where."""

    path: str
    """The run directory, absolute: a script may change its folder before it trains."""
    notes: str
    """A folder for a line from each process that imported torch."""
    probe_every: int
    every: Mapping[str, int] = field(default_factory=dict)
    layers: str | None = None
    trace: str = "flipped"
    command: tuple[str, ...] = ()

    def environment(self) -> dict[str, str]:
        """As the processes of the command get it."""
        return {ORDERS: json.dumps(asdict(self))}

    @classmethod
    def of_environment(cls) -> "Orders":
        """What this process was told."""
        said = json.loads(os.environ[ORDERS])
        return cls(**said | {"command": tuple(said["command"])})

    def note(self, weight: int, text: str) -> None:
        """Leaves word how far this process came; see `why_nothing`."""
        note(self.notes, weight, text)


def why_nothing(notes: Path) -> str:
    """Why there is nothing on record, in the words of the process that came farthest."""
    best = (
        0,
        "nothing in the command imported torch, or its Python ignores PYTHONPATH (python -I, -E)",
    )
    for path in sorted(notes.glob("note-*")):
        with contextlib.suppress(OSError, ValueError):
            weight, _, text = path.read_text().partition(" ")
            best = max(best, (int(weight), text))
    return best[1]
