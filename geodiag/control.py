"""The one small file that goes back: a request for the training, and whether it was obeyed."""

import time
import uuid
from dataclasses import asdict, dataclass, field
from pathlib import Path

from geodiag.defaults import MAX_DELAY_STEPS
from geodiag.events import details
from geodiag.store.files import Folder, write_json

MODES = ("off", "auto", "on")


@dataclass(frozen=True, kw_only=True)
class Request:
    """Somebody wants the training to change its routing policy."""

    routing: str
    delay_steps: int | None = None
    by: str = "cli"
    id: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    time: float = field(default_factory=time.time)

    def __post_init__(self) -> None:
        if self.routing not in MODES:
            raise ValueError(f"routing is one of {', '.join(MODES)}, not {self.routing!r}")
        if self.delay_steps is not None and not 0 <= self.delay_steps <= MAX_DELAY_STEPS:
            raise ValueError(f"delay_steps is 0 to {MAX_DELAY_STEPS}, not {self.delay_steps}")


def write_request(folder: Path, request: Request) -> None:
    """Leaves `request` for the training; a newer one replaces an older one."""
    write_json(folder / "control.json", asdict(request))


def read_request(store: Folder) -> Request | None:
    """The newest request, or None where nobody asked or the file makes no sense."""
    data = store.read_json("control.json")
    try:
        return Request(**data) if isinstance(data, dict) else None
    except (TypeError, ValueError):
        return None


class RequestWatch:
    """Sees a new request once. Costs one `stat` a look while nothing changes.

    `Run.create` removes what was asked of an earlier training, so a request that is there already
    when the watch begins is meant for this one.
    """

    def __init__(self, folder: Path) -> None:
        self._path, self._store = folder / "control.json", Folder.of(folder)
        self._seen: tuple[int, int] | None = None
        self._last: str | None = None

    def _stamp(self) -> tuple[int, int] | None:
        try:
            s = self._path.stat()
        except OSError:
            return None
        return s.st_mtime_ns, s.st_ino

    def poll(self) -> Request | None:
        """The request that arrived since the last look, if any."""
        stamp = self._stamp()
        if stamp is None or stamp == self._seen:
            return None
        self._seen = stamp
        request = read_request(self._store)
        if request is None or request.id == self._last:
            return None
        self._last = request.id
        return request


def acknowledged(events_data: list[str], request_id: str) -> bool:
    """Whether one of the `acknowledge` events' data names the request."""
    return any(details(d).get("request") == request_id for d in events_data)
