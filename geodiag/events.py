"""Events: one row of the table `events` each, with step, place, kind, message and details."""

import json
import time
from dataclasses import dataclass, field
from typing import Any

from geodiag.jsonable import jsonable

KINDS = {
    "spike": "the loss left its trend upwards and stayed",
    "outlier": "one or two updates left the trend and came back at once",
    "divergence": "the loss rises slowly and does not come back",
    "nonfinite": "the loss is NaN or infinite",
    "recovered": "a spike is over",
    "cascade": "where a spike began, how it spread, and what would have stopped it",
    "early_warning": "a layer or the batch left its range, and no spike was raised yet",
    "request": "somebody asked for another routing mode",
    "acknowledge": "the training obeyed a request",
    "routing": "anticipatory routing changed its state",
    "rollback": "training went back to a snapshot",
    "decision": "what the controller decided, or would have decided",
    "fault": "a fault was planted on purpose",
    "attempt": "training began, resumed or rolled back",
    "problem": "geodiag itself could not do something; training went on",
}
"""Kind of event → its meaning."""


@dataclass(frozen=True, kw_only=True)
class Event:
    """One row of the table `events`. `data` is any JSON-able detail."""

    step: int
    kind: str
    message: str
    layer: int | None = None
    site: str | None = None
    expert: int | None = None
    data: dict[str, Any] = field(default_factory=dict)
    time: float = field(default_factory=time.time)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"unknown event kind {self.kind!r}; known: {', '.join(KINDS)}")

    def columns(self) -> dict[str, list[Any]]:
        """Return the event as columns of one row, for `Run.append`."""
        row = {
            k: getattr(self, k)
            for k in ("step", "kind", "layer", "site", "expert", "message", "time")
        }
        return {k: [v] for k, v in row.items()} | {"data": [json.dumps(jsonable(self.data))]}


def details(data: str | None) -> dict[str, Any]:
    """Return an event's `data` as a dict; empty where it is absent or not valid JSON."""
    try:
        found = json.loads(data or "{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
