"""control.json: a request for a routing mode, from a page or the CLI to the training."""

import time
import uuid
from dataclasses import asdict, dataclass, field
from pathlib import Path

from geodiag.defaults import MAX_DELAY_STEPS
from geodiag.errors import GeodiagError
from geodiag.events import details
from geodiag.store.files import Folder, write_json

MODES = ("off", "auto", "on")


@dataclass(frozen=True, kw_only=True)
class Request:
    """A request to the training to change its routing policy."""

    routing: str
    """`off`, `auto` or `on`."""
    delay_steps: int | None = None
    """Δ of anticipatory routing; None for the value of the training."""
    by: str = "cli"
    """What wrote the request."""
    id: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    time: float = field(default_factory=time.time)
    """Seconds since 1970."""

    def __post_init__(self) -> None:
        if self.routing not in MODES:
            raise ValueError(f"routing is one of {', '.join(MODES)}, not {self.routing!r}")
        if self.delay_steps is not None and not 0 <= self.delay_steps <= MAX_DELAY_STEPS:
            raise ValueError(f"delay_steps is 0 to {MAX_DELAY_STEPS}, not {self.delay_steps}")


def write_request(store: Folder, request: Request) -> None:
    """Write `request` for the training of the run in `store`; it replaces an older request.

    GeodiagError where the run is not on a local disk, or may not be written.
    """
    if not store.is_local:
        raise GeodiagError(f"{store.url} is not on this machine; ask where the training runs")
    try:
        write_json(Path(store.root) / "control.json", asdict(request))
    except OSError as e:
        raise GeodiagError(
            f"cannot ask {store.url}: {e.strerror or e}; check the folder's rights"
        ) from None


def read_request(store: Folder) -> Request | None:
    """Return the newest request, or None where there is none or the file is not valid."""
    data = store.read_json("control.json")
    try:
        return Request(**data) if isinstance(data, dict) else None
    except (TypeError, ValueError):
        return None


class RequestWatch:
    """Returns each new request once. A poll costs one `stat` while nothing changes.

    `Run.create` removes requests to an earlier training, so a request that exists when the watch
    begins is meant for this training.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / "control.json"
        self._store = Folder.of(folder)
        self._last_stamp: tuple[int, int] | None = None
        self._last_id: str | None = None

    def poll(self) -> Request | None:
        """Return the request that arrived since the last poll, if any."""
        stamp = self._stamp()
        if stamp is None or stamp == self._last_stamp:
            return None
        self._last_stamp = stamp
        request = read_request(self._store)
        if request is None or request.id == self._last_id:
            return None
        self._last_id = request.id
        return request

    def _stamp(self) -> tuple[int, int] | None:
        """Return what changes with every new file: modification time and inode."""
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_ino


def acknowledged(events_data: list[str], request_id: str) -> bool:
    """Return whether the data of one of the `acknowledge` events names the request."""
    return any(details(data).get("request") == request_id for data in events_data)
