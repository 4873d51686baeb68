"""StepMeasurement: hooks measure what is due during a step, probes at its end."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from geodiag.hooks.adapters import Layout
from geodiag.hooks.failure_guard import FailureGuard
from geodiag.hooks.measure.data_shift import DataShift
from geodiag.hooks.measure.device_timer import DeviceTimer
from geodiag.hooks.measure.forward_hooks import GROUPS, ForwardHooks
from geodiag.hooks.measure.parameter_norms import ParameterNorms
from geodiag.hooks.measure.router_history import RouterHistory
from geodiag.hooks.measure.step_buffers import StepBuffers
from geodiag.hooks.measure.step_values import Values, due_only
from geodiag.hooks.probes.runner import PROBES, Probes
from geodiag.hooks.probes.token_trace import Trace
from geodiag.metrics.cadence import Cadence
from geodiag.metrics.registry import due_groups


@dataclass(frozen=True, kw_only=True)
class MeasurementPlan:
    """What is measured when, and on which tokens."""

    cadence: Cadence
    sample: int = 1024
    """Tokens a micro-batch for per-token products."""
    micro_batches: int = 1
    probe: tuple | Mapping[str, Any] | None = None
    probe_domains: tuple[str, ...] | None = None
    """The domain of each of the probe's sequences."""
    trace: Trace = "flipped"


class StepMeasurement:
    """Hooks and probes of one model.

    `start_at` the first step; then, at the end of each step: `probe_values`, `step_values`, and
    `prepare` for the next one.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        layout: Layout,
        plan: MeasurementPlan,
        guard: FailureGuard,
        *,
        anticipatory: Callable[[], bool] = lambda: False,
        ranks: int = 1,
    ) -> None:
        """anticipatory: whether older weights choose the experts of the batch in the model now."""
        self.plan = plan
        self._layout = layout
        self._anticipatory = anticipatory
        self._guard = guard
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self.buffers = StepBuffers(device, plan.micro_batches, plan.sample)
        self._hooks = ForwardHooks(model, layout, self.buffers, guard, anticipatory)
        self._parameters = ParameterNorms(layout, optimizers, device, guard, ranks)
        self._shift = DataShift(model, layout, device, plan.micro_batches, guard)
        self._probes = Probes(
            model,
            layout,
            guard,
            batch=plan.probe,
            trace=plan.trace,
            by_domain=plan.probe_domains is not None,
        )
        self._timer = DeviceTimer(device)
        self._lag = plan.cadence.every["layers.flip_rate"]
        self._history = RouterHistory(layout, self._lag)
        self._due: frozenset[str] = frozenset()

    @property
    def probe_seconds(self) -> Callable[[], float] | None:
        """The device's time for this step's probes, to be called once the device has finished them;
        None without probes.
        """
        return self._timer.last

    def is_due(self, key: str) -> bool:
        """Return whether a metric, `table.name`, is recorded at this step."""
        return key in self._due

    def probe_values(self) -> Values:
        """Run the probes that are due. All ranks call this once a step, whatever else fails."""
        if not due_groups(PROBES, self._due):
            return {}
        return self._guard.run("probes", self._run_probes, Values())

    def _run_probes(self) -> Values:
        with self._timer:
            return due_only(self._probes.run(self._due), self._due)

    def step_values(self, grad_norm: Tensor | None) -> tuple[Values, tuple[str, ...]]:
        """Return what the hooks measured of this step, and the metrics that could not be measured.

        grad_norm: the norm of all gradients before clipping, where the trainer knows it.
        """
        values = self._guard.run("data shift", self._shift.values, Values())
        values |= self._parameters.values(grad_norm)
        if not self._hooks.due:
            return values, ()
        values.setdefault("steps.tokens", self.buffers.sum("tokens"))
        values |= self._guard.run("layers", self._hook_values, Values())
        absent = [] if self._history.ready else ["layers.flip_rate_router"]
        if not self._anticipatory():
            absent.append("layers.flip_rate_anticipatory")
        return values, tuple(absent)

    def _hook_values(self) -> Values:
        return due_only(self._hooks.summarise(), self._due)

    def prepare(self, next_step: int) -> None:
        """Finish this step and prepare the next one."""
        self._probes.finish_adoption()
        self._history.remember(self._hooks)
        self._clear(next_step)

    def start_at(self, step: int) -> None:
        """The model is in its state before `step`: there is no earlier step to compare with."""
        routers = len(self._layout.routers)
        self._hooks.past_weights = [None] * routers
        self._hooks.past_biases = [None] * routers
        self._history.remove()
        self._history = RouterHistory(self._layout, self._lag)
        self._probes.forget()
        self._clear(step)

    def _clear(self, step: int) -> None:
        """Forget the last step's values, so that none is recorded as this one's."""
        self._shift.clear()
        self.buffers.clear()
        self._timer.clear()
        self._due = self.plan.cadence.due(step)
        self._hooks.due = due_groups(GROUPS, self._due)
        self._parameters.prepare(self._due)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed training needs to measure as this one would have."""
        return {"shift": self._shift.state_dict(), "probe": self._probes.batch.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`."""
        self._shift.load_state_dict(state["shift"])
        self._probes.batch.load_state_dict(state["probe"])

    def remove(self) -> None:
        """Take every hook off."""
        for part in (self._hooks, self._parameters, self._history, self._shift, self._probes):
            part.remove()
