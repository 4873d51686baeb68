"""A cascade as an event: the row of kind `cascade` that a training records for each spike."""

from geodiag.cascade.explain import explain
from geodiag.events import Event
from geodiag.run import open_run
from geodiag.spikes.event import Spike
from geodiag.spikes.recorded import RecordedSpike

_COLUMNS = ("layer", "site", "expert", "words")
"""Fields that have a column of their own in the table `events`."""


def cascade_event(url: str, spike: Spike, attempt: int, step: int) -> Event:
    """Explain a spike of an attempt from the rows recorded by now, as an event of step `step`."""
    recorded = RecordedSpike(spike=spike, onset=spike.onset, attempt=attempt)
    found = explain(open_run(url), recorded)
    data = {k: v for k, v in found.as_json().items() if k not in _COLUMNS}
    return Event(
        step=step,
        kind="cascade",
        message=found.words,
        layer=found.layer,
        site=found.site,
        expert=found.expert,
        data={"attempt": attempt, **data},
    )
