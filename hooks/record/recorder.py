"""The recorder: one asynchronous copy a step off the device, one thread that turns it into rows.

The thread owns the run directory: rows, events and heartbeats are all written there, in order. On a
CPU the caller waits for it, so a step that returned is on record. On a GPU the training is at most
one step ahead.
"""

import sys
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from geodiag.events import Event
from geodiag.hooks.adapters.base import Layout
from geodiag.hooks.distributed.rank_exchange import Ranks
from geodiag.hooks.distributed.rank_messages import RankMessage
from geodiag.hooks.record import probe_table_rows as probe_rows
from geodiag.hooks.record import table_rows as rows
from geodiag.hooks.record.cascade_recorder import Teller
from geodiag.hooks.record.rank_sums import Sums
from geodiag.hooks.record.serial_worker import Worker
from geodiag.hooks.record.step_observer import Observation, Observer
from geodiag.hooks.record.table_rows import Host, Places
from geodiag.run import Run, Status
from geodiag.spikes.detector import Spike

Packed = list[tuple[str, torch.Size]]


@dataclass(kw_only=True)
class Facts:
    """What the host knows of a step without asking the device."""

    step: int
    lr: float | None
    routing_mode: str
    routing_lag: int
    step_seconds: float | None
    record_seconds: float | None
    absent: tuple[str, ...] = ()
    """Metrics that this step could not measure."""
    probe_seconds: Callable[[], float] | None = None
    """To be asked when the device is through."""
    domains: tuple[str, ...] | None = None
    """The domain of each of the step's sequences."""
    probe_domains: tuple[str, ...] | None = None
    said: RankMessage = field(default_factory=RankMessage)
    """What this rank has to say to the others, beside the step's values."""


@dataclass
class _Step:
    facts: Facts
    names: Packed
    flat: Tensor
    ready: Any = field(default=None)


class Recorder:
    """`push` a step's device values; `observed` gives back what is known of the steps that are
    through.
    """

    def __init__(
        self, run: Run, layout: Layout, device: torch.device, ranks: Ranks | None = None
    ) -> None:
        self.run, self.layout, self.places = run, layout, Places.of(layout)
        self.ranks, self._sums = ranks or Ranks(), Sums(layout)
        self.ranks.sum_count = self._sums.size
        self._world = 1 if self.ranks.single_process else self.ranks.world
        self.observer = Observer(
            self.places, frozenset(r.layer for r in layout.routers if r.hashed)
        )
        self.last: Observation | None = None
        self._behind = 1 if device.type == "cuda" else 0
        self._writer = Worker("geodiag-writer")
        self._under_way: deque[Future[Observation | None]] = deque()
        self._pushed: int | None = None
        self._complained: set[str] = set()
        self._teller = Teller(run, partial(self.complain, "the cascade behind a spike"))

    # -- on the training thread ----------------------------------------------------------------

    def push(self, values: dict[str, Tensor], facts: Facts) -> None:
        """Starts the copy of one step's values and hands it to the writer."""
        names = [(n, v.shape) for n, v in values.items()]
        flat = torch.cat([v.detach().reshape(-1).float() for v in values.values()])
        step = _Step(facts, names, flat)
        if flat.is_cuda:
            step.flat = torch.empty(flat.shape, pin_memory=True)
            step.flat.copy_(flat, non_blocking=True)
            step.ready = torch.cuda.Event()
            step.ready.record()
        self._submit(step.facts, step)

    def ensure(self, step: int) -> None:
        """Where nothing of `step` could be pushed: the other ranks wait for this one's word all the
        same.
        """
        if self._pushed != step:
            nothing = Facts(
                step=step,
                lr=None,
                routing_mode="off",
                routing_lag=0,
                step_seconds=None,
                record_seconds=None,
            )
            self._submit(nothing, None)

    def _submit(self, facts: Facts, step: _Step | None) -> None:
        self._pushed = facts.step
        self._under_way.append(self._writer.submit(lambda: self._write(facts, step)))

    def observed(self) -> list[Observation]:
        """Steps that have come through since the last call: on a CPU all, on a GPU all but the
        newest.
        """
        through = []
        while len(self._under_way) > self._behind:
            seen = self._under_way.popleft().result()
            if seen is not None:
                through.append(seen)
        return through

    def wait(self) -> None:
        """Waits until everything under way is on record."""
        for future in self._under_way:
            future.result()

    def settle(self) -> None:
        """`wait`; and what that showed is not handed out any more."""
        self.wait()
        self._under_way.clear()

    def next_attempt(self) -> int:
        """Rows from here on belong to the next attempt, whose number is returned."""

        def begin() -> int:
            self._teller.tell()
            return self.run.next_attempt()

        return self._writer.submit(begin).result()

    def event(self, event: Event) -> None:
        """Records an event after the rows that are already under way. What all ranks know, rank 0
        writes down.
        """
        if not self._speaks and event.kind != "problem":
            return
        written = self._writer.submit(
            lambda: self._guarded("events", lambda: self.run.event(event))
        )
        if not self._behind:
            written.result()

    @property
    def _speaks(self) -> bool:
        return self.ranks.rank == 0 or self.ranks.single_process

    def complain(self, what: str, error: BaseException, step: int) -> None:
        """Says once that geodiag itself failed at something; training goes on."""
        if what in self._complained:
            return
        self._complained.add(what)
        line = f"{what}: {type(error).__name__}: {error}".splitlines()[0]
        print(
            f"geodiag could not record {line}; training goes on without it",
            file=sys.stderr,
            flush=True,
        )
        event = Event(step=step, kind="problem", message=f"could not record {line}")
        self._writer.submit(lambda: self._quiet(lambda: self.run.event(event)))

    def close(self, status: Status) -> None:
        """Waits for everything under way and closes the run."""
        self.settle()
        self._writer.submit(
            self._teller.close
        ).result()  # what fails there is among what the writer has yet to write
        self._writer.submit(
            lambda: self._guarded("closing the run", lambda: self.run.close(status))
        )
        self._writer.stop()

    # -- in the writer's thread ----------------------------------------------------------------

    def _guarded(self, what: str, work: Callable[[], Any]) -> Any:
        try:
            return work()
        except Exception as e:  # a full disk, a vanished folder: said once; training goes on
            if what not in self._complained:
                self._complained.add(what)
                print(
                    f"geodiag: {what}: {type(e).__name__}: {e}; training goes on",
                    file=sys.stderr,
                    flush=True,
                )
            return None

    def _quiet(self, work: Callable[[], Any]) -> None:
        try:
            work()
        except Exception:  # the complaint was printed already; there is nowhere left to write it
            return

    def _write(self, facts: Facts, step: _Step | None) -> Observation | None:
        host: Host = self._guarded("a step's values", lambda: _unpacked(step)) or {}
        sums = self._guarded("sums over ranks", lambda: self._sums.estimated(host, self._world))
        say = partial(self.observer.say, facts.step, host, facts.absent)
        numbers, note = self._guarded("stage scores", say) or ({}, {})
        # Outside of any guard: whatever failed on this rank, the others wait for its word.
        said = RankMessage(
            numbers=numbers | facts.said.numbers, sums=sums, note=facts.said.note | note
        )
        heard = self.ranks.exchange(said)
        ranks = 0 if self.ranks.connection_error else self._world
        self._guarded("sums over ranks", lambda: self._sums.into(host, heard.sums, ranks))
        seen = self._guarded("the detector", lambda: self.observer.observe(facts.step, host, heard))
        if "loss" in host:
            self._guarded("rows", lambda: self._append(facts, host, seen))
        self.last = seen
        return seen

    def _append(self, facts: Facts, host: Host, seen: Observation | None) -> None:
        # The step's own row goes last: who sees it may count on the rest of the step being there.
        tables = [*self._tables(facts, host), ("steps", self._step_row(facts, host, seen))]
        for event in events_of(seen) if seen and self._speaks else []:
            self._guarded("events", partial(self.run.event, event))
        for table, columns in tables:
            # Each by itself: a disk that is too full for one table's rows may have room for the
            # next's.
            self._guarded(
                f"rows of {table}", partial(self.run.append, table, {"step": facts.step, **columns})
            )
        if seen and self._speaks:
            self._teller.see(seen)
        self.run.heartbeat(facts.step)

    def _tables(self, facts: Facts, host: Host) -> list[tuple[str, rows.Columns]]:
        """Rows of what the step's values hold; what was not due is not among them."""
        layers = rows.layer_rows(host, self.places)
        rows.hide(layers, *facts.absent)
        rows.hide_inapplicable(layers, self.layout, self.places)
        measured = [
            ("layers", layers if len(layers) > len(rows.LAYER_KEYS) else None),
            ("experts", rows.expert_rows(host, self.places)),
            ("matrices", rows.matrix_rows(host, self.places)),
            ("tokens", probe_rows.token_rows(host, self.places)),
        ]
        found = [(table, self.places.of_watched(columns)) for table, columns in measured if columns]
        named = self._guarded(
            "domains", lambda: probe_rows.domain_rows(host, facts.domains, facts.probe_domains)
        )
        return found if named is None else [*found, ("domains", named)]

    def _step_row(self, facts: Facts, host: Host, seen: Observation | None) -> rows.Columns:
        row: rows.Columns = {
            "step": [facts.step],
            "loss": host["loss"],
            "grad_norm": host.get("grad_norm"),
            "lr": facts.lr,
            "tokens": host.get("tokens"),
            "step_seconds": facts.step_seconds,
            "record_seconds": facts.record_seconds,
            "probe_seconds": facts.probe_seconds() if facts.probe_seconds else None,
            "data_shift": host.get("data_shift"),
            "routing_mode": facts.routing_mode,
            "routing_lag": facts.routing_lag,
        }
        if seen is not None:
            row |= {"spike_score": _or_null(seen.verdict.score)}
            row |= {f"stage{s}_score": _or_null(z) for s, z in seen.stages.items()}
        return row


def _unpacked(step: _Step | None) -> Host:
    if step is None:
        return {}
    if step.ready is not None:
        step.ready.synchronize()
    host: Host = {}
    start, flat = 0, step.flat.numpy()
    for name, shape in step.names:
        host[name] = flat[start : start + shape.numel()].reshape(shape or (1,))
        start += shape.numel()
    return host


def _or_null(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def events_of(seen: Observation) -> list[Event]:
    """What the detector and the early warning said of this step, as events."""
    events = []
    raised, ended = seen.verdict.raised, seen.verdict.ended
    if raised is not None:
        events.append(
            Event(step=seen.step, kind=raised.kind, message=_said(raised), data=_data(raised))
        )
    if ended is not None and ended.kind != "outlier":
        message = (
            f"{ended.kind} since step {ended.onset} is over; its peak was at step {ended.peak}"
        )
        events.append(Event(step=seen.step, kind="recovered", message=message, data=_data(ended)))
    if (w := seen.warning) is not None:
        said = Event(
            step=seen.step,
            kind="early_warning",
            message=str(w),
            layer=w.layer,
            site=w.site,
            data=w.details(),
        )
        events.append(said)
    return events


def _data(spike: Spike) -> dict[str, Any]:
    names = ("kind", "detected", "onset", "peak", "end", "score")
    return {n: getattr(spike, n) for n in names}


def _said(spike: Spike) -> str:
    if spike.kind == "nonfinite":
        return f"the loss is not finite since step {spike.onset}"
    return f"{spike.kind}: the loss left its trend at step {spike.onset}, {spike.score:.1f} robust σ above it"
