"""A run is a directory: training writes it, everything else reads it, and one small file goes back."""

import os
import platform
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import pyarrow as pa

from geodiag import control
from geodiag.errors import GeodiagError
from geodiag.events import Event
from geodiag.files import Folder, write_json
from geodiag.reading import Steps, read_table
from geodiag.schema import SCHEMA_VERSION, SCHEMAS, registry
from geodiag.writing import Writer

Status = Literal["running", "finished", "failed", "interrupted"]
_SILENT_SECONDS = 60.0


class Run:
    """A run directory, opened for reading by `Run.open` or for writing by `Run.create`."""

    def __init__(self, folder: Folder, manifest: dict[str, Any], writer: Writer | None = None) -> None:
        self._store, self.manifest, self._writer = folder, manifest, writer
        self.problems: dict[str, str] = {}
        """Pieces that could not be read, and why; they are skipped."""

    # -- opening -----------------------------------------------------------------------------

    @classmethod
    def open(cls, path: str | os.PathLike) -> "Run":
        """Opens a run for reading; `path` may be any fsspec URL. GeodiagError where there is none."""
        store = Folder.of(path)
        manifest = store.read_json("run.json")
        if isinstance(manifest, dict):
            return cls(store, manifest)
        names = store.names()
        if not set(names) & {*SCHEMAS, "journal"}:
            what = "does not exist" if not store.fs.exists(store.root) else "has no run.json"
            raise GeodiagError(f"{path} {what}; pass a run directory, e.g. sample_runs/mhc-tear")
        run = cls(store, {})
        run.problems["run.json"] = "missing or unreadable; the tables are read without it"
        return run

    @classmethod
    def create(
        cls,
        path: str | os.PathLike,
        *,
        found: Mapping[str, Any] | None = None,
        config: Mapping[str, Any] | None = None,
        counterfactual: Sequence[str] = (),
        rank: int = 0,
        world_size: int = 1,
    ) -> "Run":
        """Begins a run in `path`, or a new attempt of the run that is there. GeodiagError where `path` cannot be written."""
        folder = Path(path)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            old = Folder.of(folder).read_json("run.json") or {}
            attempts = old.get("attempts", [])
            attempt = 1 + max((a["attempt"] for a in attempts), default=-1)
            writer = Writer(folder, rank, attempt)
            run = cls(Folder.of(folder), {}, writer)
            run.manifest = {
                "schema_version": SCHEMA_VERSION,
                "created": old.get("created", time.time()),
                "status": "running",
                "last_step": old.get("last_step"),
                "attempts": attempts,
                "found": dict(found or {}),
                "config": dict(config or {}),
                "world_size": world_size,
                "command": sys.argv,
                "versions": _versions(),
                "registry": registry(counterfactual),
            }
            run._save()
            writer.heartbeat(old.get("last_step") or 0, force=True)
        except OSError as e:
            raise GeodiagError(
                f"cannot write a run to {path}: {e.strerror or e}; pass a folder you may write"
            ) from None
        return run

    # -- writing -----------------------------------------------------------------------------

    @property
    def attempt(self) -> int:
        """The attempt that this writer appends to."""
        return self._need_writer().attempt

    def append(self, table: str, columns: Mapping[str, Any]) -> None:
        """Appends rows; see `geodiag.writing.to_batch` for what `columns` may hold. OSError on a full disk."""
        writer = self._need_writer()
        if table == "steps" and not self._attempt_began():
            self.manifest["attempts"] = [
                *self.manifest["attempts"],
                {"attempt": writer.attempt, "first_step": int(columns["step"][0]), "time": time.time()},
            ]
            self._save()
        writer.append(table, columns)

    def event(self, event: Event) -> None:
        """Appends one row to `events`."""
        self._need_writer().append("events", event.columns())

    def heartbeat(self, step: int) -> None:
        self._need_writer().heartbeat(step)

    def next_attempt(self) -> int:
        """After a rollback: rows from here on belong to the next attempt, whose number is returned."""
        writer = self._need_writer()
        writer.attempt += 1
        return writer.attempt

    def close(self, status: Status = "finished") -> None:
        """Turns journals into parts and says how the run ended. Closing twice does nothing."""
        if self._writer is None:
            return
        self._writer.close()
        self.manifest |= {"status": status, "last_step": self._writer.last_step}
        self._save()
        self._writer = None

    def _attempt_began(self) -> bool:
        return any(a["attempt"] == self.attempt for a in self.manifest["attempts"])

    def _need_writer(self) -> Writer:
        if self._writer is None:
            raise ValueError("this run is open for reading only; Run.create opens one for writing")
        return self._writer

    def _save(self) -> None:
        writer = self._need_writer()
        if writer.rank == 0:
            write_json(writer.folder / "run.json", self.manifest)

    # -- reading -----------------------------------------------------------------------------

    @property
    def url(self) -> str:
        return self._store.url

    @property
    def name(self) -> str:
        return self._store.root.rsplit("/", 1)[-1]

    def read_arrow(
        self,
        table: str,
        columns: Sequence[str] | None = None,
        steps: Steps | None = None,
        attempt: int | Literal["newest", "all"] | None = None,
    ) -> pa.Table:
        """Rows of `table`: closed parts and journal, all ranks.

        `steps=(a, b)` keeps a ≤ step < b, either end None for open. `attempt` None is the newest,
        except for `events`, whose trail is kept whole. Unreadable pieces are skipped and named in `problems`.
        GeodiagError for an unknown table or column.
        """
        starts = {a["attempt"]: a["first_step"] for a in self.manifest.get("attempts", [])}
        which = attempt if attempt is not None else ("all" if table == "events" else "newest")
        return read_table(self._store, table, columns, steps, starts, which, self.problems)

    def read(
        self,
        table: str,
        columns: Sequence[str] | None = None,
        steps: Steps | None = None,
        attempt: int | Literal["newest", "all"] | None = None,
    ) -> pd.DataFrame:
        """`read_arrow` as a pandas DataFrame; dictionary columns become categoricals."""
        return self.read_arrow(table, columns, steps, attempt).to_pandas()

    def refresh(self) -> "Run":
        """The run as it is on disk now."""
        return self if self._writer else Run.open(self._store.url)

    def heartbeat_age(self) -> float | None:
        """Seconds since the training last gave a sign of life."""
        beat = self._store.read_json("heartbeat.json") or {}
        return time.time() - beat["time"] if "time" in beat else None

    def status(self) -> Status:
        """How the run stands now; a `running` whose process is gone is `interrupted`."""
        said: Status = self.manifest.get("status", "interrupted")
        if said != "running":
            return said
        beat = self._store.read_json("heartbeat.json") or {}
        if beat.get("host") == socket.gethostname():
            return "running" if _alive(beat.get("pid", -1)) else "interrupted"
        age = self.heartbeat_age()
        return "running" if age is not None and age < _SILENT_SECONDS else "interrupted"

    def last_step(self) -> int | None:
        """The newest step on record."""
        steps = self.read_arrow("steps", ["step"])["step"]
        return steps[-1].as_py() if len(steps) else None

    # -- control -----------------------------------------------------------------------------

    def request(self, routing: str, delay_steps: int | None = None, by: str = "cli") -> control.Request:
        """Asks the training for routing `off`, `auto` or `on`. It obeys at its next step and says so in `events`.

        GeodiagError for an unknown mode, or where the run is not on a local disk.
        """
        try:
            request = control.Request(routing=routing, delay_steps=delay_steps, by=by)
        except ValueError as e:
            raise GeodiagError(str(e)) from None
        if not self._store.is_local:
            raise GeodiagError(f"{self.url} is not on this machine; ask where the training runs")
        try:
            control.write_request(Path(self._store.root), request)
        except OSError as e:
            raise GeodiagError(f"cannot ask {self.url}: {e.strerror or e}; check the folder's rights") from None
        return request

    def pending(self) -> control.Request | None:
        """The newest request, while the training has not yet acknowledged it."""
        request = control.read_request(self._store)
        if request is None:
            return None
        events = self.read_arrow("events", ["kind", "data"]).to_pylist()
        answers = [e["data"] for e in events if e["kind"] == "acknowledge"]
        return None if control.acknowledged(answers, request.id) else request


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return pid > 0


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for name in ("geodiag", "torch", "triton", "numpy", "pyarrow"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def open_run(path: str | os.PathLike) -> Run:
    """Opens a run for reading: `open_run("runs/a").read("steps", ["loss"], steps=(0, 100))`."""
    return Run.open(path)


def find_runs(path: str | os.PathLike) -> list[Run]:
    """The run at `path`, or every run in that folder. GeodiagError where there is none."""
    store = Folder.of(path)
    if store.fs.exists(store.path("run.json")):
        return [Run.open(path)]
    names = [n for n in store.names() if store.fs.exists(store.path(f"{n}/run.json"))]
    if not names:
        what = "holds no runs" if store.fs.exists(store.root) else "does not exist"
        raise GeodiagError(f"{path} {what}; pass a run directory or a folder of them, e.g. sample_runs")
    return [Run.open(f"{store.url.rstrip('/')}/{n}") for n in names]
