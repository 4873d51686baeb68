"""Probes: metrics that are measured every few steps beside the training, always on the same tokens.

One forward of the probe batch serves flips, tear, curvature, attention logits, traced tokens and
domains. Perturbation growth runs a forward of its own; the norms of the weights need none. A probe
leaves no trace: it runs in eval mode without gradient, and restores random states, buffers and
modes.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from geodiag.hooks.adapters.base import Choice, Layout
from geodiag.hooks.failure_guard import FailureGuard
from geodiag.hooks.measure.metric_group import MetricGroup
from geodiag.hooks.measure.step_values import Values
from geodiag.hooks.probes.batch import ProbeBatch
from geodiag.hooks.probes.perturbation_growth import GROWTH, PerturbationGrowth
from geodiag.hooks.probes.probe_forward import ProbeForward
from geodiag.hooks.probes.probe_metrics import (
    COMPARED,
    DOMAINS,
    ON_PROBE_FORWARD,
    TOKENS,
    ProbeView,
    traced_tokens,
)
from geodiag.hooks.probes.token_trace import Trace
from geodiag.hooks.probes.weight_spectra import SPECTRA, WeightSpectra
from geodiag.metrics.metric import Group
from geodiag.metrics.registry import due_groups

PROBES: tuple[Group, ...] = (
    *(group.name for group in ON_PROBE_FORWARD),
    GROWTH.name,
    SPECTRA.name,
)
"""Groups of metrics that are measured by probes."""


class Probes:
    """`run` what is due; `remove` takes every hook off."""

    def __init__(
        self,
        model: nn.Module,
        layout: Layout,
        guard: FailureGuard,
        *,
        batch: tuple | Mapping[str, Any] | None = None,
        trace: Trace = "flipped",
        by_domain: bool = False,
    ) -> None:
        """batch: arguments of the probe batch; default: the first batch of the training.
        trace: which of its tokens are followed. by_domain: the domains of its sequences are known.
        """
        self.layout = layout
        self.trace = trace
        self.batch = ProbeBatch(model, batch)
        self._by_domain = by_domain
        self._guard = guard
        self._forward = ProbeForward(self.batch, layout, guard)
        self._growth = PerturbationGrowth(self.batch, layout)
        self._spectra = WeightSpectra(layout)
        self._then: dict[int, Choice] = {}
        self._adoption = model.register_forward_pre_hook(self._adopt, with_kwargs=True)

    def _adopt(self, _: nn.Module, args: tuple, kwargs: dict[str, Any] | None = None) -> None:
        # Torch leaves the kwargs out for a hook that an earlier hook of the same call took off.
        if torch.is_grad_enabled() and kwargs is not None:
            self.batch.adopt_batch(args, kwargs)

    def finish_adoption(self) -> None:
        """Take off the hook that adopted the first batch. A compiled forward cannot take it off."""
        self._adoption.remove()

    def run(self, due: frozenset[str]) -> Values:
        """Measure the metrics that are due; the first probe has nothing to compare with."""
        groups = due_groups(PROBES, due)
        if not self._by_domain:
            groups -= {DOMAINS.name}
        values: Values = {}
        if SPECTRA.name in groups:
            work = partial(SPECTRA.step_values, self._spectra)
            values |= self._guard.run("weight spectra", work, Values())
        if self.batch.ready and GROWTH.name in groups:
            work = partial(GROWTH.step_values, self._growth)
            values |= self._guard.run("perturbation growth", work, Values())
        on_forward = groups - {SPECTRA.name, GROWTH.name}
        if self.batch.ready and on_forward:
            values |= self._guard.run("probe", partial(self._run_forward, on_forward), Values())
        return values

    def forget(self) -> None:
        """Drop the last probe's choices: the model went back to an earlier state."""
        self._then = {}

    def remove(self) -> None:
        """Take the hooks off."""
        self._adoption.remove()
        self._forward.remove()
        self._growth.remove()

    @torch.no_grad()
    def _run_forward(self, groups: frozenset[Group]) -> Values:
        # Each group is guarded by itself: on sharded weights every rank must take part in the
        # collectives of every group, whatever fails before.
        values: Values = {}
        with self._forward.run(groups, self._then) as result:
            view = ProbeView(self.layout, self.batch, result, self._then, self.trace)
            for group in ON_PROBE_FORWARD:
                if group.name in groups:
                    name = f"probe of {group.name}"
                    values |= self._guard.run(name, partial(_measured, group, view), Values())
            if groups & COMPARED:
                self._then = result.choices
        return values


def _measured(group: MetricGroup, view: ProbeView) -> Values:
    values = group.step_values(view)
    return values | traced_tokens(view) if group is TOKENS else values
