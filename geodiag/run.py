"""A run is a directory: training writes it, everything else reads it, one small file goes back.

The file that goes back is control.json, a request to the training (`geodiag.control`).
"""

import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa

from geodiag import control
from geodiag.errors import GeodiagError
from geodiag.events import Event
from geodiag.metrics.schema import SCHEMA_VERSION
from geodiag.store.files import Folder
from geodiag.store.heartbeat import is_alive
from geodiag.store.manifest import known_starts
from geodiag.store.merge_ranks import incomplete_ranks, key_names, merge_ranks
from geodiag.store.reader import Steps, read_table
from geodiag.store.run_folder import looks_like_a_run, not_a_run, run_names
from geodiag.store.run_writer import RunWriter

if TYPE_CHECKING:  # `import geodiag` stays light; pandas is loaded by the first `read`
    import pandas as pd

Status = Literal["running", "finished", "failed", "interrupted"]
_ENDED: tuple[Status, ...] = ("finished", "failed", "interrupted")


class Run:
    """A run directory, opened for reading by `Run.open` or for writing by `Run.create`."""

    def __init__(
        self, folder: Folder, manifest: dict[str, Any], writer: RunWriter | None = None
    ) -> None:
        self.manifest = manifest
        """Content of run.json."""
        self.problems: dict[str, str] = {}
        """Pieces that could not be read and were skipped, each with the reason."""
        self._store = folder
        self._writer = writer
        self._lock = threading.RLock()
        self._as_of: int | None = None

    # -- opening -----------------------------------------------------------------------------

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "Run":
        """Open the run at `path`, any fsspec URL, for reading. GeodiagError where there is none."""
        store = Folder.of(path)
        manifest = store.read_json("run.json")
        if isinstance(manifest, dict):
            run = cls(store, manifest)
            version = manifest.get("schema_version")
            if isinstance(version, int) and version > SCHEMA_VERSION:
                problem = "written by a newer geodiag; upgrade geodiag to see all of it"
                run.problems["run.json"] = problem
            return run
        if not looks_like_a_run(store):
            raise not_a_run(store, path)
        run = cls(store, {})
        run.problems["run.json"] = "missing or unreadable; the tables are read without it"
        return run

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        *,
        found: Mapping[str, Any] | None = None,
        config: Mapping[str, Any] | None = None,
        counterfactual: Sequence[str] = (),
        rank: int = 0,
        world_size: int = 1,
        attempt: int | None = None,
    ) -> "Run":
        """Begin a run in `path`, or the next attempt of the run that is there.

        Args:
            path: a folder on this machine.
            found: sites, routers and experts of the model, for the manifest.
            config: configuration of the training, for the manifest.
            counterfactual: names of metrics that the model does not use itself.
            rank: rank of this process; rank 0 writes the manifest.
            world_size: number of ranks.
            attempt: the attempt that rank 0 got; the other ranks pass it.

        GeodiagError where `path` cannot be written, or is being written by another process.
        """
        try:
            writer = RunWriter.begin(
                Path(path),
                found=found or {},
                config=config or {},
                counterfactual=counterfactual,
                rank=rank,
                world_size=world_size,
                attempt=attempt,
            )
        except OSError as e:
            raise GeodiagError(
                f"cannot write a run to {path}: {e.strerror or e}; pass a folder you may write"
            ) from None
        return cls(Folder.of(path), writer.manifest, writer)

    # -- writing -----------------------------------------------------------------------------

    @property
    def attempt(self) -> int:
        """The attempt that rows are appended to."""
        return self._need_writer().attempt

    def append(self, table: str, columns: Mapping[str, Any]) -> None:
        """Append rows; `geodiag.store.writer.to_batch` describes `columns`. Thread-safe.

        OSError on a full disk: the rows are kept, and written with the next ones that fit.
        """
        with self._lock:
            self._need_writer().append(table, columns)

    def event(self, event: Event) -> None:
        """Append one row to `events`."""
        self.append("events", event.columns())

    def heartbeat(self, step: int) -> None:
        """Note on disk that the training is alive at `step`, at most once a second."""
        with self._lock:
            self._need_writer().heartbeat(step)

    def next_attempt(self) -> int:
        """Start the next attempt after a rollback and return its number."""
        with self._lock:
            return self._need_writer().next_attempt()

    def close(self, status: Status = "finished") -> None:
        """Turn journals into parts and write how the run ended. Closing twice does nothing.

        OSError where the disk refuses; the rows are safe in the journals, and closing may be tried
        again.
        """
        with self._lock:
            if self._writer is not None:
                self._writer.close(status)
                self._writer = None

    def _need_writer(self) -> RunWriter:
        if self._writer is None:
            raise ValueError("this run is open for reading only; Run.create opens one for writing")
        return self._writer

    # -- reading -----------------------------------------------------------------------------

    @property
    def url(self) -> str:
        """The path or URL that the run was opened with."""
        return self._store.url

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self._store.root.rsplit("/", 1)[-1]

    @property
    def address(self) -> str:
        """Protocol and absolute path: the same for every spelling of the path."""
        return str(self._store.fs.unstrip_protocol(self._store.root))

    def read_arrow(
        self,
        table: str,
        columns: Sequence[str] | None = None,
        steps: Steps | None = None,
        attempt: int | Literal["newest", "all"] | None = None,
        ranks: Literal["each", "merged"] = "each",
    ) -> pa.Table:
        """Return rows of `table`, from closed parts and journals of all ranks.

        Args:
            table: name of the table.
            columns: names of the columns, None for all.
            steps: `(a, b)` for a ≤ step < b; None at either end leaves it open.
            attempt: None is the newest, except for `events`, of which all attempts are kept.
            ranks: `merged` reduces the ranks to one row each; see `geodiag.store.merge_ranks`.

        Unreadable pieces are skipped and entered in `problems`, and so is a rank with too few rows.
        GeodiagError for an unknown table or column.
        """
        starts = known_starts(self.manifest)
        which = attempt if attempt is not None else ("all" if table == "events" else "newest")
        written = self.manifest.get("world_size")
        world_size = written if isinstance(written, int) else 1
        one_rank = world_size < 2
        needed = columns
        if columns is not None and not one_rank:
            needed = list(dict.fromkeys([*columns, *key_names(table)]))

        rows = read_table(
            self._store, table, needed, steps, starts, which, self.problems, self._as_of
        )
        if one_rank:
            return rows
        if table == "steps" and steps is None:
            running = self.status() == "running"
            self.problems |= incomplete_ranks(rows, world_size, running)
        if ranks == "merged":
            rows = merge_ranks(rows, table)
        return rows if columns is None else rows.select(columns)

    def read(
        self,
        table: str,
        columns: Sequence[str] | None = None,
        steps: Steps | None = None,
        attempt: int | Literal["newest", "all"] | None = None,
        ranks: Literal["each", "merged"] = "each",
    ) -> "pd.DataFrame":
        """Return `read_arrow` as a pandas DataFrame; dictionary columns become categoricals."""
        frame: pd.DataFrame = self.read_arrow(table, columns, steps, attempt, ranks).to_pandas()
        return frame

    def as_of_attempt(self, attempt: int) -> "Run":
        """Return the run, for reading, as it was when `attempt` was the newest one.

        A spike that was rolled back is found among the steps of its own attempt. `events` are
        complete, and so is what is read with an explicit `attempt`.
        """
        view = Run(self._store, dict(self.manifest))
        view.problems = self.problems
        view._as_of = attempt
        return view

    def refresh(self) -> "Run":
        """Return the run as it is on disk now."""
        if self._writer is not None:
            return self
        fresh = Run.open(self._store.url)
        return fresh if self._as_of is None else fresh.as_of_attempt(self._as_of)

    def status(self) -> Status:
        """Return the status; a `running` run whose process has ended is `interrupted`."""
        manifest = self.manifest if self._writer else self._store.read_json("run.json")
        written = manifest.get("status") if isinstance(manifest, dict) else None
        for status in _ENDED:
            if written == status:
                return status
        return "running" if is_alive(self._store.read_json("heartbeat.json")) else "interrupted"

    def last_step(self) -> int | None:
        """Return the newest recorded step, or None where there is none."""
        steps = self.read_arrow("steps", ["step"])["step"]
        return int(steps[-1].as_py()) if len(steps) else None

    # -- control -----------------------------------------------------------------------------

    def request(
        self, routing: str, delay_steps: int | None = None, by: str = "cli"
    ) -> control.Request:
        """Ask the training for routing `off`, `auto` or `on`, and return the request.

        The training acknowledges it at its next step, by an event. GeodiagError for an unknown
        mode, or where the run is not on a local disk.
        """
        try:
            request = control.Request(routing=routing, delay_steps=delay_steps, by=by)
        except ValueError as e:
            raise GeodiagError(str(e)) from None
        control.write_request(self._store, request)
        return request

    def pending(self) -> control.Request | None:
        """Return the newest request until the training has acknowledged it, then None."""
        request = control.read_request(self._store)
        if request is None:
            return None
        events = self.read_arrow("events", ["kind", "data"]).to_pylist()
        answers = [e["data"] for e in events if e["kind"] == "acknowledge"]
        return None if control.acknowledged(answers, request.id) else request


def open_run(path: str | os.PathLike[str]) -> Run:
    """Open a run for reading: `open_run("runs/a").read("steps", ["loss"], steps=(0, 100))`."""
    return Run.open(path)


def find_runs(path: str | os.PathLike[str]) -> list[Run]:
    """Open the run at `path`, or every run in that folder. GeodiagError where there is none."""
    store = Folder.of(path)
    if looks_like_a_run(store):
        return [Run.open(path)]
    names = run_names(store)
    if not names:
        what = "holds no runs" if store.exists() else "does not exist"
        raise GeodiagError(
            f"{path} {what}; pass a run directory or a folder of them, e.g. sample_runs"
        )
    return [Run.open(f"{store.url.rstrip('/')}/{name}") for name in names]
