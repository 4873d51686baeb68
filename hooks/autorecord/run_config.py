"""RunConfig: what `geodiag run` passes to the processes of a command, and the notes they leave.

The configuration travels in one environment variable. A note is a line in a file, from which
`geodiag run` explains why nothing was recorded. The command line imports this module, so it imports
nothing heavy.
"""

import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

VARIABLE = "GEODIAG_RUN"
"""The environment variable with a `RunConfig` as JSON."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What is recorded, and where."""

    path: str
    """The run directory, absolute: a script may change its working directory before it trains."""
    notes: str
    """A folder for a note from each process that imports torch."""
    probe_every: int
    every: Mapping[str, int] = field(default_factory=dict)
    layers: str | None = None
    trace: str = "flipped"
    command: tuple[str, ...] = ()

    def environment(self) -> dict[str, str]:
        """Return the environment variable for the processes of the command."""
        return {VARIABLE: json.dumps(asdict(self))}

    @classmethod
    def from_environment(cls) -> "RunConfig":
        """Return the configuration of this process."""
        values = json.loads(os.environ[VARIABLE])
        return cls(**values | {"command": tuple(values["command"])})

    def note(self, weight: int, text: str) -> None:
        """Write how far this process came; see `why_nothing`."""
        write_note(self.notes, weight, text)


def write_note(folder: str, weight: int, text: str) -> None:
    """Write this process's note. Of all processes, `geodiag run` prints the note of most weight."""
    try:
        with open(os.path.join(folder, f"note-{os.getpid()}"), "w", encoding="utf-8") as file:
            file.write(f"{weight} {text}")
    except OSError:  # `geodiag run` itself has ended, and its folder of notes is gone
        return


def why_nothing(notes: Path) -> str:
    """Return why nothing was recorded: the note of the process that came farthest."""
    farthest = (
        0,
        "nothing in the command imported torch, or its Python ignores PYTHONPATH (python -I, -E)",
    )
    for path in sorted(notes.glob("note-*")):
        with contextlib.suppress(OSError, ValueError):
            weight, _, text = path.read_text().partition(" ")
            farthest = max(farthest, (int(weight), text))
    return farthest[1]
