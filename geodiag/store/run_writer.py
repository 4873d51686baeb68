"""The write side of a run for one rank: table rows, the manifest run.json and the heartbeat."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from geodiag.metrics.schema import SCHEMAS
from geodiag.store import heartbeat, manifest
from geodiag.store.files import Folder, write_json
from geodiag.store.reader import read_keys
from geodiag.store.writer import TableWriter

HEARTBEAT_SECONDS = 1.0


class RunWriter:
    """Writes one rank of a run. Not thread-safe: `Run` holds a lock around each call.

    Rank 0 alone writes run.json, control.json and heartbeat.json, for all ranks.
    """

    def __init__(
        self, folder: Path, tables: TableWriter, rank: int, manifest: dict[str, Any]
    ) -> None:
        self.manifest = manifest
        self._folder = folder
        self._tables = tables
        self._rank = rank
        self._unsaved = False
        self._last_heartbeat = 0.0

    @classmethod
    def begin(
        cls,
        folder: Path,
        *,
        found: Mapping[str, Any],
        config: Mapping[str, Any],
        counterfactual: Sequence[str],
        rank: int,
        world_size: int,
        attempt: int | None,
    ) -> "RunWriter":
        """Begin a run in `folder`, or the next attempt of the run in it; see `Run.create`.

        OSError where `folder` cannot be written, GeodiagError where another process writes it.
        """
        folder.mkdir(parents=True, exist_ok=True)
        tables = TableWriter(folder, rank, 0)
        store = Folder.of(folder)
        old = store.read_json("run.json")
        if not isinstance(old, dict):
            old = manifest.recovered([read_keys(store, t) for t in SCHEMAS])
        tables.attempt = manifest.next_attempt(old, rank) if attempt is None else attempt
        new = manifest.begin(old, tables.attempt, found, config, counterfactual, world_size)
        tables.last_step = new["last_step"]

        writer = cls(folder, tables, rank, new)
        if rank == 0:
            # A request in the file was made to an earlier training.
            (folder / "control.json").unlink(missing_ok=True)
        writer._save()
        writer.heartbeat(tables.last_step, force=True)
        return writer

    @property
    def attempt(self) -> int:
        """The attempt that rows are appended to."""
        return self._tables.attempt

    def append(self, table: str, columns: Mapping[str, Any]) -> None:
        """Append rows; see `TableWriter.append`."""
        # The rows first, the manifest second: where an attempt began can be read from its rows.
        self._tables.append(table, columns)
        if table == "steps":
            self._note_first_step()

    def heartbeat(self, step: int | None, force: bool = False) -> None:
        """Write heartbeat.json, at most once a second unless `force`."""
        now = time.monotonic()
        if self._rank != 0:
            return
        if force or now - self._last_heartbeat >= HEARTBEAT_SECONDS:
            self._last_heartbeat = now
            write_json(self._folder / "heartbeat.json", heartbeat.heartbeat(step))

    def next_attempt(self) -> int:
        """Append to the next attempt from here on, and return its number."""
        self._tables.attempt += 1
        self.manifest["attempt"] = self._tables.attempt
        self._save()
        return self._tables.attempt

    def close(self, status: str) -> None:
        """Turn journals into parts and write `status` to the manifest.

        OSError where the disk refuses; the rows are safe in the journals, and closing may be tried
        again.
        """
        try:
            self._tables.close()
        finally:
            self.manifest |= {"status": status, "last_step": self._tables.last_step}
            self._save()

    def _note_first_step(self) -> None:
        """Enter the attempt in the manifest once its first step is known."""
        attempt, first_step = self._tables.attempt, self._tables.first_step
        if attempt not in manifest.known_starts(self.manifest) and first_step is not None:
            entry = manifest.entry(attempt, first_step)
            self.manifest["attempts"] = [*self.manifest["attempts"], entry]
            self._unsaved = True
        if self._unsaved:
            self._save()

    def _save(self) -> None:
        if self._rank == 0:
            self._unsaved = True  # stays set if the disk refuses; the next call tries again
            write_json(self._folder / "run.json", self.manifest)
        self._unsaved = False
