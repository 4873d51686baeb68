"""StepWriter: from one step's values on the host to what the run directory holds of the step.

All of it runs in the writer's thread: the exchange with the other ranks, the spike detector and the
stage scores, then rows, events and the heartbeat.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from geodiag.events import Event
from geodiag.hooks.adapters.base import Layout
from geodiag.hooks.distributed.rank_exchange import Ranks
from geodiag.hooks.distributed.rank_messages import RankMessage, RankMessages
from geodiag.hooks.failure_guard import FailureGuard
from geodiag.hooks.record import probe_table_rows, table_rows
from geodiag.hooks.record.cascade_recorder import CascadeRecorder
from geodiag.hooks.record.rank_sums import RankSums
from geodiag.hooks.record.step_observer import Observation, Observer
from geodiag.hooks.record.table_rows import Columns, Host, Places
from geodiag.run import Run
from geodiag.spikes.event import Spike


@dataclass(kw_only=True)
class StepMetadata:
    """What is recorded of a step without reading a value from the device."""

    step: int
    lr: float | None = None
    routing_mode: str = "off"
    routing_lag: int = 0
    step_seconds: float | None = None
    record_seconds: float | None = None
    absent: tuple[str, ...] = ()
    """Metrics that could not be measured at this step."""
    probe_seconds: Callable[[], float] | None = None
    """Returns the duration of the probes, once the device has finished them."""
    domains: tuple[str, ...] | None = None
    """The domain of each of the step's sequences."""
    probe_domains: tuple[str, ...] | None = None
    """The domain of each of the probe's sequences."""
    message: RankMessage = field(default_factory=RankMessage)
    """What this rank sends to the other ranks beside the step's values."""


@dataclass
class StepValues:
    """One step's values, packed into one flat tensor on its way to the host."""

    shapes: list[tuple[str, torch.Size]]
    flat: Tensor
    ready: torch.cuda.Event | None = None
    """Recorded behind the copy from a GPU."""

    def unpack(self) -> Host:
        """Wait for the copy and return the values by name; a 0-d tensor becomes 1 element."""
        if self.ready is not None:
            self.ready.synchronize()
        host: Host = {}
        flat = self.flat.numpy()
        start = 0
        for name, shape in self.shapes:
            host[name] = flat[start : start + shape.numel()].reshape(shape or (1,))
            start += shape.numel()
        return host


class StepWriter:
    """Writes one step after another. What fails is reported; the rest of the step is written."""

    def __init__(
        self, run: Run, layout: Layout, ranks: Ranks, guard: FailureGuard, cascades: CascadeRecorder
    ) -> None:
        self._run = run
        self._layout = layout
        self._ranks = ranks
        self._guard = guard
        self._cascades = cascades
        self._places = Places.of(layout)
        self._sums = RankSums(layout)
        self._world = 1 if ranks.single_process else ranks.world
        hashed = frozenset(r.layer for r in layout.routers if r.hashed)
        self.observer = Observer(self._places, hashed)
        self.last: Observation | None = None
        """The newest observation."""

    @property
    def writes_shared_events(self) -> bool:
        """True on the one rank that records what all ranks observe alike."""
        return self._ranks.rank == 0 or self._ranks.single_process

    def write(self, metadata: StepMetadata, values: StepValues | None) -> Observation | None:
        """Record one step and return what all ranks together observed at it.

        `values` is None if nothing could be measured. The exchange takes place all the same,
        because the other ranks block until every rank has sent its message.
        """
        host: Host = {}
        if values is not None:
            host = self._guard.run("a step's values", values.unpack, host)
        messages = self._exchange(metadata, host)
        reached = 0 if self._ranks.connection_error else self._world
        self._guard.run("sums over ranks", lambda: self._sums.apply(host, messages.sums, reached))
        seen = self._guard.run(
            "the detector", lambda: self.observer.observe(metadata.step, host, messages)
        )
        if "steps.loss" in host:
            self._guard.run("rows", lambda: self._append(metadata, host, seen))
        self.last = seen
        return seen

    def _exchange(self, metadata: StepMetadata, host: Host) -> RankMessages:
        unknown = np.full(self._sums.size, np.nan)
        sums = self._guard.run(
            "sums over ranks", lambda: self._sums.estimate(host, self._world), unknown
        )
        score = partial(self.observer.score, metadata.step, host, metadata.absent)
        nothing: tuple[dict[str, float], dict[str, Any]] = ({}, {})
        numbers, note = self._guard.run("stage scores", score, nothing)
        message = RankMessage(
            numbers=numbers | metadata.message.numbers,
            sums=sums,
            note=metadata.message.note | note,
        )
        return self._ranks.exchange(message)

    def _append(self, metadata: StepMetadata, host: Host, seen: Observation | None) -> None:
        # The row of `steps` is written last: a reader that finds it finds the rest of the step too.
        tables = [*self._tables(metadata, host), ("steps", _step_row(metadata, host, seen))]
        shared = seen if self.writes_shared_events else None
        if shared is not None:
            for event in events_of(shared):
                self._guard.run("events", partial(self._run.event, event))
        for table, columns in tables:
            # One guard a table: a disk that is too full for one table's rows may have room for the
            # next table's.
            rows = {"step": metadata.step, **columns}
            self._guard.run(f"rows of {table}", partial(self._run.append, table, rows))
        if shared is not None:
            self._cascades.observe(shared)
        self._run.heartbeat(metadata.step)

    def _tables(self, metadata: StepMetadata, host: Host) -> list[tuple[str, Columns]]:
        """Return the rows of all tables but `steps`; tables without values are left out."""
        layers = table_rows.layer_rows(host, self._places)
        table_rows.hide(layers, *metadata.absent)
        table_rows.hide_inapplicable(layers, self._layout, self._places)
        measured = [
            ("layers", layers if len(layers) > len(table_rows.LAYER_KEYS) else None),
            ("experts", table_rows.expert_rows(host, self._places)),
            ("matrices", table_rows.matrix_rows(host, self._places)),
            ("tokens", probe_table_rows.token_rows(host, self._places)),
        ]
        found = [(table, self._places.of_watched(rows)) for table, rows in measured if rows]
        domains = self._guard.run(
            "domains",
            lambda: probe_table_rows.domain_rows(host, metadata.domains, metadata.probe_domains),
        )
        return found if domains is None else [*found, ("domains", domains)]


def _step_row(metadata: StepMetadata, host: Host, seen: Observation | None) -> Columns:
    row: Columns = {
        "step": [metadata.step],
        "loss": host["steps.loss"],
        "grad_norm": host.get("steps.grad_norm"),
        "lr": metadata.lr,
        "tokens": host.get("steps.tokens"),
        "step_seconds": metadata.step_seconds,
        "record_seconds": metadata.record_seconds,
        "probe_seconds": metadata.probe_seconds() if metadata.probe_seconds else None,
        "data_shift": host.get("steps.data_shift"),
        "routing_mode": metadata.routing_mode,
        "routing_lag": metadata.routing_lag,
    }
    if seen is not None:
        row["spike_score"] = _or_null(seen.verdict.score)
        row |= {f"stage{stage}_score": _or_null(z) for stage, z in seen.stages.items()}
    return row


def _or_null(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def events_of(seen: Observation) -> list[Event]:
    """Return the events of an observation: a spike raised or over, an early warning."""
    events = []
    raised = seen.verdict.raised
    ended = seen.verdict.ended
    warning = seen.warning
    if raised is not None:
        message = _spike_message(raised)
        events.append(
            Event(step=seen.step, kind=raised.kind, message=message, data=_details(raised))
        )
    if ended is not None and ended.kind != "outlier":
        message = (
            f"{ended.kind} since step {ended.onset} is over; its peak was at step {ended.peak}"
        )
        events.append(
            Event(step=seen.step, kind="recovered", message=message, data=_details(ended))
        )
    if warning is not None:
        events.append(
            Event(
                step=seen.step,
                kind="early_warning",
                message=str(warning),
                layer=warning.layer,
                site=warning.site,
                data=warning.details(),
            )
        )
    return events


def _details(spike: Spike) -> dict[str, Any]:
    names = ("kind", "detected", "onset", "peak", "end", "score")
    return {name: getattr(spike, name) for name in names}


def _spike_message(spike: Spike) -> str:
    if spike.kind == "nonfinite":
        return f"the loss is not finite since step {spike.onset}"
    above = f"{spike.score:.1f} robust σ above it"
    return f"{spike.kind}: the loss left its trend at step {spike.onset}, {above}"
