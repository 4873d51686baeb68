"""A run is a directory: training writes it, everything else reads it, and one small file goes back."""

import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa

from geodiag import control
from geodiag.errors import GeodiagError
from geodiag.events import Event
from geodiag.metrics.schema import SCHEMA_VERSION, SCHEMAS
from geodiag.store import heartbeat as alive
from geodiag.store import manifest
from geodiag.store.files import Folder, write_json
from geodiag.store.merge_ranks import incomplete_ranks, key_names, merge_ranks
from geodiag.store.reader import Steps, read_keys, read_table
from geodiag.store.writer import Writer

if TYPE_CHECKING:  # `import geodiag` stays light; pandas comes with the first `read`
    import pandas as pd

Status = Literal["running", "finished", "failed", "interrupted"]


class Run:
    """A run directory, opened for reading by `Run.open` or for writing by `Run.create`."""

    def __init__(self, folder: Folder, said: dict[str, Any], writer: Writer | None = None) -> None:
        self._store, self.manifest, self._writer = folder, said, writer
        self._unsaved = False
        self._turn = threading.RLock()
        self.problems: dict[str, str] = {}
        """Pieces that could not be read, and why; they are skipped."""

    # -- opening -----------------------------------------------------------------------------

    @classmethod
    def open(cls, path: str | os.PathLike) -> "Run":
        """Opens a run for reading; `path` may be any fsspec URL. GeodiagError where there is none."""
        store = Folder.of(path)
        said = store.read_json("run.json")
        if isinstance(said, dict):
            run = cls(store, said)
            version = said.get("schema_version")
            if isinstance(version, int) and version > SCHEMA_VERSION:
                run.problems["run.json"] = (
                    "written by a newer geodiag; upgrade geodiag to see all of it"
                )
            return run
        if not looks_like_a_run(store):
            inside = [n for n in store.names() if looks_like_a_run(store, n)]
            what = (
                "is a folder of runs"
                if inside
                else "has no run.json"
                if store.exists()
                else "does not exist"
            )
            example = f"{store.url.rstrip('/')}/{inside[0]}" if inside else "sample_runs/mhc-tear"
            raise GeodiagError(f"{path} {what}; pass a run directory, e.g. {example}")
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
        attempt: int | None = None,
    ) -> "Run":
        """Begins a run in `path`, or the next attempt of the run that is there.

        Rank 0 writes the manifest; the other ranks pass the `attempt` that rank 0 got.
        GeodiagError where `path` cannot be written, or is being written by another process.
        """
        folder = Path(path)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            writer = Writer(folder, rank, 0)
            store = Folder.of(folder)
            old = store.read_json("run.json")
            if not isinstance(old, dict):
                old = manifest.recovered([read_keys(store, t) for t in SCHEMAS])
            writer.attempt = manifest.next_attempt(old, rank) if attempt is None else attempt
            said = manifest.begin(
                old, writer.attempt, found or {}, config or {}, counterfactual, world_size
            )
            writer.last_step = said["last_step"]
            run = cls(store, said, writer)
            if rank == 0:
                (folder / "control.json").unlink(
                    missing_ok=True
                )  # it asked a training that is no more
            run._save()
            writer.heartbeat(writer.last_step, force=True)
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
        """Appends rows; see `geodiag.store.writer.to_batch` for what `columns` may hold. Any thread
        may call it.

        OSError on a full disk: the rows are kept, and written with the next ones that fit.
        """
        with self._turn:
            writer = self._need_writer()
            # The rows come before the note of where the attempt began: a reader can tell that from
            # the rows.
            writer.append(table, columns)
            if table == "steps":
                self._note_attempt(writer)

    def event(self, event: Event) -> None:
        """Appends one row to `events`."""
        self.append("events", event.columns())

    def heartbeat(self, step: int) -> None:
        """Says that the training lives and where it is; at most once a second reaches the disk."""
        with self._turn:
            self._need_writer().heartbeat(step)

    def next_attempt(self) -> int:
        """After a rollback: rows appended from here on belong to the next attempt, whose number is
        returned.
        """
        with self._turn:
            writer = self._need_writer()
            writer.attempt += 1
            self.manifest["attempt"] = writer.attempt
            self._save()
            return writer.attempt

    def close(self, status: Status = "finished") -> None:
        """Turns journals into parts and says how the run ended. Closing twice does nothing.

        OSError where the disk refuses; what is in the journals is safe there, and closing may be
        tried again.
        """
        with self._turn:
            if self._writer is None:
                return
            try:
                self._writer.close()
            finally:
                self.manifest |= {"status": status, "last_step": self._writer.last_step}
                self._save()
            self._writer = None

    def _note_attempt(self, writer: Writer) -> None:
        """Notes in the manifest where the attempt began, once it did."""
        if (
            writer.attempt not in manifest.known_starts(self.manifest)
            and writer.first_step is not None
        ):
            self.manifest["attempts"] = [
                *self.manifest["attempts"],
                manifest.entry(writer.attempt, writer.first_step),
            ]
            self._unsaved = True
        if self._unsaved:
            self._save()

    def _need_writer(self) -> Writer:
        if self._writer is None:
            raise ValueError("this run is open for reading only; Run.create opens one for writing")
        return self._writer

    def _save(self) -> None:
        writer = self._need_writer()
        if writer.rank == 0:
            self._unsaved = True
            write_json(writer.folder / "run.json", self.manifest)
        self._unsaved = False

    # -- reading -----------------------------------------------------------------------------

    @property
    def url(self) -> str:
        return self._store.url

    @property
    def name(self) -> str:
        return self._store.root.rsplit("/", 1)[-1]

    @property
    def address(self) -> str:
        """Protocol and absolute path: the same, however the run was spelt."""
        return self._store.fs.unstrip_protocol(self._store.root)

    def read_arrow(
        self,
        table: str,
        columns: Sequence[str] | None = None,
        steps: Steps | None = None,
        attempt: int | Literal["newest", "all"] | None = None,
        ranks: Literal["each", "merged"] = "each",
    ) -> pa.Table:
        """Rows of `table`: closed parts and journal, all ranks; `merged` puts them together as the
        registry says.

        `steps=(a, b)` keeps a ≤ step < b, either end None for open. `attempt` None is the newest,
        except for `events`, whose trail is kept whole. Unreadable pieces are skipped and named in
        `problems`, and so is a rank that left too few rows. GeodiagError for an unknown table or
        column.
        """
        starts = manifest.known_starts(self.manifest)
        which = attempt if attempt is not None else ("all" if table == "events" else "newest")
        world = self.manifest.get("world_size")
        if not isinstance(world, int) or world < 2:
            return read_table(self._store, table, columns, steps, starts, which, self.problems)
        needed = columns if columns is None else list(dict.fromkeys([*columns, *key_names(table)]))
        rows = read_table(self._store, table, needed, steps, starts, which, self.problems)
        if table == "steps" and steps is None:
            self.problems |= incomplete_ranks(rows, world, running=self.status() == "running")
        rows = merge_ranks(rows, table) if ranks == "merged" else rows
        return rows if columns is None else rows.select(columns)

    def read(
        self,
        table: str,
        columns: Sequence[str] | None = None,
        steps: Steps | None = None,
        attempt: int | Literal["newest", "all"] | None = None,
        ranks: Literal["each", "merged"] = "each",
    ) -> "pd.DataFrame":
        """`read_arrow` as a pandas DataFrame; dictionary columns become categoricals."""
        return self.read_arrow(table, columns, steps, attempt, ranks).to_pandas()

    def refresh(self) -> "Run":
        """The run as it is on disk now."""
        return self if self._writer else Run.open(self._store.url)

    def status(self) -> Status:
        """How the run stands now; a `running` whose process is gone is `interrupted`."""
        now = self.manifest if self._writer else self._store.read_json("run.json")
        said = now.get("status") if isinstance(now, dict) else None
        ended: tuple[Status, ...] = ("finished", "failed", "interrupted")
        for status in ended:
            if said == status:
                return status
        return "running" if alive.lives(self._store.read_json("heartbeat.json")) else "interrupted"

    def last_step(self) -> int | None:
        """The newest step on record."""
        steps = self.read_arrow("steps", ["step"])["step"]
        return steps[-1].as_py() if len(steps) else None

    # -- control -----------------------------------------------------------------------------

    def request(
        self, routing: str, delay_steps: int | None = None, by: str = "cli"
    ) -> control.Request:
        """Asks the training for routing `off`, `auto` or `on`. It obeys at its next step and says
        so in `events`.

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
            raise GeodiagError(
                f"cannot ask {self.url}: {e.strerror or e}; check the folder's rights"
            ) from None
        return request

    def pending(self) -> control.Request | None:
        """The newest request, while the training has not yet acknowledged it."""
        request = control.read_request(self._store)
        if request is None:
            return None
        events = self.read_arrow("events", ["kind", "data"]).to_pylist()
        answers = [e["data"] for e in events if e["kind"] == "acknowledge"]
        return None if control.acknowledged(answers, request.id) else request


def open_run(path: str | os.PathLike) -> Run:
    """Opens a run for reading: `open_run("runs/a").read("steps", ["loss"], steps=(0, 100))`."""
    return Run.open(path)


def looks_like_a_run(store: Folder, sub: str = "") -> bool:
    """Whether a run lies in `sub`, be it one that lost its manifest."""
    return bool(set(store.names(sub)) & {"run.json", "journal", "steps"})


def find_runs(path: str | os.PathLike) -> list[Run]:
    """The run at `path`, or every run in that folder. GeodiagError where there is none."""
    store = Folder.of(path)
    if looks_like_a_run(store):
        return [Run.open(path)]
    names = [n for n in store.names() if looks_like_a_run(store, n)]
    if not names:
        what = "holds no runs" if store.exists() else "does not exist"
        raise GeodiagError(
            f"{path} {what}; pass a run directory or a folder of them, e.g. sample_runs"
        )
    return [Run.open(f"{store.url.rstrip('/')}/{n}") for n in names]
