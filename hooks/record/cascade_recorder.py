"""The teller: the cascade behind each spike, as an event, while the training goes on.

A spike is explained `AFTER` steps after it was raised, when how far it reached is on record; sooner
where the training goes back or ends. It is read from the run like any reader reads it, on a thread
that nobody waits for until the end.
"""

from collections.abc import Callable
from functools import partial

from geodiag.cascade.event import told
from geodiag.cascade.explain import AFTER
from geodiag.health import SPIKES
from geodiag.hooks.record.serial_worker import Worker
from geodiag.hooks.record.step_observer import Observation
from geodiag.run import Run
from geodiag.spikes.detector import Spike


class Teller:
    """`see` every step's observation, `tell` what is left where an attempt ends; all from one
    thread.
    """

    def __init__(self, run: Run, complain: Callable[[Exception, int], None]) -> None:
        self._run, self._complain = run, complain
        # From the start: at an end without `close` a spike may still wait, and an ending
        # interpreter starts no thread.
        self._thread = Worker("geodiag-teller")
        self._waiting: list[Spike] = []
        self._step = 0

    def see(self, seen: Observation) -> None:
        """Remembers what was raised, and has explained what was raised long enough ago."""
        self._step = seen.step
        if seen.verdict.raised is not None and seen.verdict.raised.kind in SPIKES:
            self._waiting.append(seen.verdict.raised)
        if self._waiting and seen.step >= self._waiting[0].detected + AFTER:
            self._ask(self._waiting.pop(0))

    def tell(self) -> None:
        """What was raised is explained by what there is: its attempt is over."""
        while self._waiting:
            self._ask(self._waiting.pop(0))

    def close(self) -> None:
        """Waits until everything is told."""
        self.tell()
        self._thread.stop()

    def _ask(self, spike: Spike) -> None:
        self._thread.submit(partial(self._explain, spike, self._run.attempt, self._step))

    def _explain(self, spike: Spike, attempt: int, step: int) -> None:
        try:
            self._run.event(told(self._run.url, spike, attempt, step))
        except Exception as e:  # whatever a record may be like: said once; training goes on
            self._complain(e, step)
