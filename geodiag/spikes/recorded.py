"""The spikes of a recorded run: from its events, or from its loss if it has no events."""

from dataclasses import dataclass, replace
from typing import Any

from geodiag.errors import GeodiagError
from geodiag.events import details
from geodiag.health import SPIKES
from geodiag.run import Run
from geodiag.spikes.event import Spike
from geodiag.spikes.loss_curves import find_spikes, read_updates


@dataclass(frozen=True, kw_only=True)
class RecordedSpike:
    """A spike of a run with its attempt, or a step to explain at which there is no spike."""

    spike: Spike | None
    """None for a step without a spike."""
    onset: int
    """The first step of the spike, or the step to explain."""
    attempt: int | None
    """The attempt that recorded the spike; None for the newest."""


def spikes_of(run: Run) -> list[RecordedSpike]:
    """Return the spikes, divergences and non-finite losses of all attempts, in order.

    They come from the events that the detector left during training. If the run has no events at
    all, the detector runs over the recorded loss.
    """
    rows = run.read_arrow("events", ["kind", "step", "data", "attempt", "rank"]).to_pylist()
    found: dict[tuple[int, str, int], RecordedSpike] = {}
    newest: dict[tuple[str, int], tuple[int, str, int]] = {}
    for row in rows:  # by attempt, then by step
        spike = _spike_from_details(details(row["data"]))
        if spike is None:
            continue
        same = spike.kind, spike.detected
        if row["kind"] in SPIKES:
            key = (row["attempt"], *same)
            newest[same] = key
            recorded = RecordedSpike(spike=spike, onset=spike.onset, attempt=row["attempt"])
            found.setdefault(key, recorded)
        elif row["kind"] == "recovered" and same in newest:
            # After a rollback, the attempt that follows records the end of the spike.
            found[newest[same]] = replace(found[newest[same]], spike=spike)
    ordered = sorted(found.values(), key=lambda s: (s.attempt or 0, s.onset))
    return ordered or _spikes_from_loss(run)


def _spike_from_details(data: dict[str, Any]) -> Spike | None:
    """Return the spike described by an event's details; None if they are not valid."""
    numbers = {n: data.get(n) for n in ("detected", "onset", "peak", "end")}
    if not all(v is None or isinstance(v, int) for v in numbers.values()):
        return None
    kind = data.get("kind")
    score = data.get("score")
    if kind not in SPIKES or numbers["onset"] is None or numbers["detected"] is None:
        return None
    return Spike(kind=kind, score=float("inf") if score is None else float(score), **numbers)  # type: ignore[arg-type]


def _spikes_from_loss(run: Run) -> list[RecordedSpike]:
    """Run the detector over the recorded loss, for a run without events."""
    if len(run.read_arrow("events", ["step"])):
        return []
    try:
        found = find_spikes(read_updates(run.url))
    except GeodiagError:
        return []
    return [RecordedSpike(spike=s, onset=s.onset, attempt=None) for s in found if s.kind in SPIKES]
