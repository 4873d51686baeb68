"""Events on a time axis: spikes, warnings, rollbacks, attempts and spans of routing modes."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from geodiag.events import details
from geodiag.health import SPIKES
from geodiag.metrics.schema import ROUTING_MODES

_SPIKE_KINDS = (*SPIKES, "outlier")

MARK_HELP = {
    "spike": "the loss left its trend at this step",
    "early_warning": "a stage left its usual range before any spike was detected",
    "rollback": "the training went back to an earlier step",
    "attempt": "the training restarted at this step",
    "fault": "a fault was injected on purpose at this step",
}
"""Kind of event that is marked on every time axis → its meaning."""


@dataclass(frozen=True, kw_only=True)
class SpikeMark:
    """One detection of the spike detector, with its outcome as far as it is known."""

    kind: str
    onset: int
    detected: int
    peak: int | None = None
    end: int | None = None
    score: float | None = None
    message: str = ""
    attempt: int = 0
    """The attempt in which the spike happened."""


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
    """Return the detections; peak and end come from a later event with the same onset."""
    found: dict[int, SpikeMark] = {}
    for event in events:
        data = details(event["data"])
        if event["kind"] in _SPIKE_KINDS:
            onset = _number(data, "onset", event["step"])
            new = SpikeMark(
                kind=event["kind"],
                onset=onset,
                detected=event["step"],
                message=event["message"] or "",
                attempt=event.get("attempt") or 0,
            )
            found[onset] = _with_outcome(found.get(onset) or new, data)
        elif event["kind"] == "recovered" and found:
            onset = _number(data, "onset", max(found))
            if onset in found:
                found[onset] = _with_outcome(
                    found[onset], {"end": event["step"]} | {k: v for k, v in data.items() if v}
                )
    return [found[k] for k in sorted(found)]


def marks_from_events(
    events: Iterable[dict[str, Any]], detected_spikes: Sequence[SpikeMark]
) -> list[Mark]:
    """Return the marks in order of steps. The start of the first attempt is not marked."""
    out = [Mark(kind="spike", step=s.onset, message=s.message) for s in detected_spikes]
    for event in events:
        kind = event["kind"]
        first_start = kind == "attempt" and not event["attempt"]
        if kind in MARK_HELP and kind != "spike" and not first_start:
            out.append(Mark(kind=kind, step=event["step"], message=event["message"] or ""))
    return sorted(out, key=lambda m: m.step)


def routing_spans(step_S: np.ndarray, mode_S: np.ndarray) -> list[RoutingSpan]:
    """Return the spans of steps in which the routing mode was not off."""
    if not len(step_S):
        return []
    begins = np.flatnonzero(np.diff(mode_S, prepend=mode_S[0] - 1))
    ends = np.append(begins[1:], len(mode_S)) - 1
    return [
        RoutingSpan(mode=ROUTING_MODES[mode_S[a]], start=int(step_S[a]), end=int(step_S[b]))
        for a, b in zip(begins, ends, strict=True)
        if mode_S[a] > 0
    ]


def _with_outcome(spike: SpikeMark, data: dict[str, Any]) -> SpikeMark:
    outcome = {k: data[k] for k in ("peak", "end", "score") if isinstance(data.get(k), int | float)}
    if outcome.get("end", spike.onset) < spike.onset:
        del outcome["end"]  # the spike was rolled back: it has no end of its own
    return replace(spike, **outcome)


def _number(data: dict[str, Any], key: str, otherwise: int) -> int:
    value = data.get(key)
    return int(value) if isinstance(value, int | float) and value == value else otherwise
