"""A cascade as an event: the row of kind `cascade` that a training leaves for each of its spikes."""

from geodiag.cascade.explain import explain
from geodiag.events import Event
from geodiag.run import open_run
from geodiag.spikes.event import Spike
from geodiag.spikes.recorded import Seen

_COLUMNS = ("layer", "site", "expert", "words")
"""What an event has a column for."""


def told(url: str, spike: Spike, attempt: int, step: int) -> Event:
    """The cascade behind a spike that an attempt lived, as far as it is on record by now, told at
    `step`.
    """
    found = explain(open_run(url), Seen(spike=spike, onset=spike.onset, attempt=attempt))
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
