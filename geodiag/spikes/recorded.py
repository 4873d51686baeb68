"""A run's spikes, as the detector said them while it trained; where it could not, as it says them
now.
"""

from dataclasses import dataclass, replace

from geodiag.events import details
from geodiag.health import SPIKES
from geodiag.run import Run
from geodiag.spikes.event import Spike


@dataclass(frozen=True, kw_only=True)
class Seen:
    """A spike, and the attempt that lived it; or a step that somebody asks about."""

    spike: Spike | None
    onset: int
    attempt: int | None
    """None for the newest."""


def spikes_of(run: Run) -> list[Seen]:
    """Spikes, divergences and non-finite losses of all attempts, in the order in which they were
    raised.
    """
    rows = run.read_arrow("events", ["kind", "step", "data", "attempt", "rank"]).to_pylist()
    found: dict[tuple, Seen] = {}
    newest: dict[tuple, tuple] = {}
    for row in rows:  # by attempt, then by step
        spike = _spike(details(row["data"]))
        if spike is None:
            continue
        same = spike.kind, spike.detected
        if row["kind"] in SPIKES:
            newest[same] = key = (row["attempt"], *same)
            found.setdefault(key, Seen(spike=spike, onset=spike.onset, attempt=row["attempt"]))
        elif row["kind"] == "recovered" and same in newest:
            # What training went back from is over in the attempt after it.
            found[newest[same]] = replace(found[newest[same]], spike=spike)
    return sorted(found.values(), key=lambda s: (s.attempt or 0, s.onset)) or _found_again(run)


def _spike(data: dict) -> Spike | None:
    """An event's details as the spike they tell of; None where they make no sense."""
    numbers = {n: data.get(n) for n in ("detected", "onset", "peak", "end")}
    if not all(v is None or isinstance(v, int) for v in numbers.values()):
        return None
    kind, score = data.get("kind"), data.get("score")
    if kind not in SPIKES or numbers["onset"] is None or numbers["detected"] is None:
        return None
    return Spike(kind=kind, score=float("inf") if score is None else float(score), **numbers)  # type: ignore[arg-type]


def _found_again(run: Run) -> list[Seen]:
    """Without events, the detector looks at the recorded loss."""
    from geodiag.errors import GeodiagError
    from geodiag.spikes.loss_curves import find_spikes, read_updates

    if len(run.read_arrow("events", ["step"])):
        return []
    try:
        found = find_spikes(read_updates(run.url))
    except GeodiagError:
        return []
    return [Seen(spike=s, onset=s.onset, attempt=None) for s in found if s.kind in SPIKES]
