"""One step's measurement: what is due is watched while the step runs, and summed up or probed at
its end.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from geodiag.hooks.adapters import Layout
from geodiag.hooks.measure.data_shift import DataShift
from geodiag.hooks.measure.device_timer import Stopwatch
from geodiag.hooks.measure.forward_hooks import Report, Taps
from geodiag.hooks.measure.gradient_norms import GradientNorms
from geodiag.hooks.measure.metric_groups import PROBED, TAPPED, due_only, needed
from geodiag.hooks.measure.router_history import RouterPast
from geodiag.hooks.measure.step_buffers import Slots
from geodiag.hooks.measure.step_summary import summarise
from geodiag.hooks.probes.runner import Probes
from geodiag.hooks.probes.token_trace import Trace
from geodiag.metrics.cadence import Cadence

Values = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is measured when, and on which tokens."""

    cadence: Cadence
    sample: int = 1024
    """Tokens a micro-batch for per-token products."""
    micro_batches: int = 1
    probe: tuple | Mapping[str, Any] | None = None
    probe_domains: tuple[str, ...] | None = None
    """The domain of each of the probe's sequences."""
    trace: Trace = "flipped"


class Measurement:
    """`stand_before` the first step; then, at the end of each, `probed`, `values` and `turn_over`
    to the next one.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        layout: Layout,
        plan: Plan,
        report: Report,
        *,
        ranks: int = 1,
    ) -> None:
        self.layout, self.plan, self._report = layout, plan, report
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self.slots = Slots(device, plan.micro_batches, plan.sample)
        self._taps = Taps(model, layout, self.slots, report)
        self._gradients = GradientNorms(layout, optimizers, device, report, ranks)
        self._shift = DataShift(model, layout, device, plan.micro_batches, report)
        self._probes = Probes(
            model,
            layout,
            report,
            batch=plan.probe,
            trace=plan.trace,
            by_domain=plan.probe_domains is not None,
        )
        self._watch = Stopwatch(device)
        self._lag = plan.cadence.every["layers.flip_rate"]
        self._past = RouterPast(layout, self._lag)
        self._due: frozenset[str] = frozenset()

    @property
    def replaying(self) -> Callable[[], bool]:
        """Whether anticipatory routing chooses this batch's experts."""
        return self._taps.replaying

    @replaying.setter
    def replaying(self, ask: Callable[[], bool]) -> None:
        self._taps.replaying = ask

    @property
    def probe_seconds(self) -> Callable[[], float] | None:
        """Time that the device took for this step's probes, once it is through with them; None
        without probes.
        """
        return self._watch.last

    def probed(self) -> Values:
        """What the probes say at this step. Of several ranks each comes here once a step, whatever
        else fails.
        """
        return self._try("probes", self._timed_probes) if needed(PROBED, self._due) else {}

    def _timed_probes(self) -> Values:
        with self._watch:
            return due_only(self._probes.run(self._due), self._due)

    def values(self, grad_norm: Tensor | None) -> tuple[Values, tuple[str, ...]]:
        """What else is due at this step, and the metrics of it that could not be measured this
        time.
        """
        values = self._try("data shift", self._shift.values) | self._gradients.values(grad_norm)
        absent = []
        if self._taps.recording:
            values.setdefault("tokens", self.slots.sum("tokens"))
            values |= self._try("layers", lambda: due_only(summarise(self._taps), self._due))
            absent = [] if self._past.ready else ["flip_rate_router"]
            if not self.replaying():
                absent.append("flip_rate_anticipatory")
        return values, tuple(absent)

    def wants(self, metric: str) -> bool:
        """Whether a "table.metric" is due at this step."""
        return metric in self._due

    def turn_over(self, next_step: int) -> None:
        """Between two steps."""
        self._probes.finish_adoption()
        self._past.remember(self._taps)
        self._prepare(next_step)

    def stand_before(self, step: int) -> None:
        """The model is as it was before `step`: there is nothing earlier to compare with."""
        self._taps.past_weights = [None] * len(self.layout.routers)
        self._taps.past_biases = [None] * len(self.layout.routers)
        self._past.remove()
        self._past = RouterPast(self.layout, self._lag)
        self._probes.forget()
        self._prepare(step)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training needs to measure as this one would have."""
        return {"shift": self._shift.state_dict(), "probe": self._probes.batch.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._shift.load_state_dict(state["shift"])
        self._probes.batch.load_state_dict(state["probe"])

    def _prepare(self, step: int) -> None:
        """Nothing of an earlier step may be read as this one's; what is due now is watched."""
        self._shift.clear()
        self.slots.clear()
        self._gradients.clear()
        self._watch.clear()
        self._due = self.plan.cadence.due(step)
        groups = needed(TAPPED, self._due)
        self._taps.due = groups
        self._gradients.recording = "gradients" in groups

    def _try(self, what: str, measure: Callable[[], Values]) -> Values:
        """What `measure` gives, or nothing where it fails: the loss is on record all the same."""
        try:
            return measure()
        except Exception as e:  # monitoring must not end a training: said once
            self._report(what, e)
            return {}

    def remove(self) -> None:
        """Takes every hook off."""
        for part in (self._taps, self._gradients, self._past, self._shift, self._probes):
            part.remove()
