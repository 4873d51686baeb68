"""What happened, as places on a time axis: spikes, warnings, rollbacks, attempts, and spans of
routing modes.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from geodiag.events import details
from geodiag.health import SPIKES
from geodiag.metrics.schema import ROUTING_MODES

_RAISED = (*SPIKES, "outlier")

MARK_HELP = {
    "spike": "the loss left its trend here",
    "early_warning": "early warning: a stage left its range before a spike was raised",
    "rollback": "training went back to an earlier step",
    "attempt": "training began again here",
    "fault": "a fault was planted here on purpose",
}
"""What is marked on every time axis, and what it says."""


@dataclass(frozen=True, kw_only=True)
class SpikeMark:
    """One thing the detector raised, as far as it is known by now."""

    kind: str
    onset: int
    detected: int
    peak: int | None = None
    end: int | None = None
    score: float | None = None
    message: str = ""
    attempt: int = 0
    """The attempt that lived it."""


@dataclass(frozen=True, kw_only=True)
class RoutingSpan:
    """Steps start ≤ step ≤ end in one routing mode."""

    mode: str
    start: int
    end: int


@dataclass(frozen=True, kw_only=True)
class Mark:
    """One line across a time axis."""

    kind: str
    step: int
    message: str = ""


def spikes_from_events(events: Iterable[dict[str, Any]]) -> list[SpikeMark]:
    """The detector's events; what a later row says of the same onset (its peak, its end) is merged
    in.
    """
    found: dict[int, SpikeMark] = {}
    for event in events:
        data = details(event["data"])
        if event["kind"] in _RAISED:
            onset = _number(data, "onset", event["step"])
            old = found.get(onset)
            said = {
                "kind": event["kind"],
                "detected": event["step"],
                "message": event["message"] or "",
            }
            first = SpikeMark(onset=onset, attempt=event.get("attempt") or 0, **said)
            found[onset] = _told(old or first, data)
        elif event["kind"] == "recovered" and found:
            onset = _number(data, "onset", max(found))
            if onset in found:
                found[onset] = _told(
                    found[onset], {"end": event["step"]} | {k: v for k, v in data.items() if v}
                )
    return [found[k] for k in sorted(found)]


def marks_from_events(
    events: Iterable[dict[str, Any]], detected_spikes: Sequence[SpikeMark]
) -> list[Mark]:
    """Everything that gets a line, in time. The beginning of a run is none."""
    out = [Mark(kind="spike", step=s.onset, message=s.message) for s in detected_spikes]
    for event in events:
        kind, begins = event["kind"], event["kind"] == "attempt" and not event["attempt"]
        if kind in MARK_HELP and kind != "spike" and not begins:
            out.append(Mark(kind=kind, step=event["step"], message=event["message"] or ""))
    return sorted(out, key=lambda m: m.step)


def routing_spans(step_S: np.ndarray, mode_S: np.ndarray) -> list[RoutingSpan]:
    """Runs of steps in which routing was not off."""
    if not len(step_S):
        return []
    begins = np.flatnonzero(np.diff(mode_S, prepend=mode_S[0] - 1))
    ends = np.append(begins[1:], len(mode_S)) - 1
    return [
        RoutingSpan(mode=ROUTING_MODES[mode_S[a]], start=int(step_S[a]), end=int(step_S[b]))
        for a, b in zip(begins, ends, strict=True)
        if mode_S[a] > 0
    ]


def _told(spike: SpikeMark, data: dict[str, Any]) -> SpikeMark:
    told = {k: data[k] for k in ("peak", "end", "score") if isinstance(data.get(k), int | float)}
    if told.get("end", spike.onset) < spike.onset:
        del told["end"]  # it was rolled back: it has no end of its own
    return replace(spike, **told)


def _number(data: dict[str, Any], key: str, otherwise: int) -> int:
    value = data.get(key)
    return int(value) if isinstance(value, int | float) and value == value else otherwise
