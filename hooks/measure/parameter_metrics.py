"""Metrics of parameters, computed on the host from sums of squares over all ranks.

grad_norm     ‖g‖ of the layer's gradients, scaled back where the trainer clipped them
update_ratio  ‖Δθ‖ / ‖θ‖, Δθ the change of the weights in this optimizer step
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from geodiag.hooks.adapters.base import Layout
from geodiag.hooks.measure.metric_group import MetricGroup
from geodiag.hooks.measure.step_values import GRADIENT_SQUARES, UPDATE_SQUARES, WEIGHT_SQUARES

# O owners, L layers, R routers, X layers with experts

PARAMETERS = MetricGroup("parameters")

QUANTITIES = (GRADIENT_SQUARES, UPDATE_SQUARES, WEIGHT_SQUARES)
"""What is summed, each by owner."""


class Owners:
    """Which sums a parameter counts in: its layer's, and its router's or its layer's experts'."""

    def __init__(self, layout: Layout) -> None:
        self.layers = len(layout.layers)
        self.routers = len(layout.routers)
        self.expert_layers = len(layout.experts)
        self.outside = self.layers
        """The owner of what belongs to no layer."""
        self._owners: dict[int, list[int]] = {}
        self.first_router = self.layers + 1
        self.first_experts = self.first_router + self.routers
        for first, modules in (
            (0, layout.layers),
            (self.first_router, [r.module for r in layout.routers]),
            (self.first_experts, [e.module for e in layout.experts]),
        ):
            for i, module in enumerate(modules):
                for parameter in module.parameters():
                    self._owners.setdefault(id(parameter), []).append(first + i)

    @property
    def count(self) -> int:
        """Number of sums of one quantity."""
        return self.layers + 1 + self.routers + self.expert_layers

    def of(self, parameter: int) -> list[int]:
        """Return the sums that a parameter, given by its id, counts in."""
        owners = self._owners.get(parameter, [])
        in_layer = any(owner < self.layers for owner in owners)
        return owners if in_layer else [self.outside, *owners]


class ParameterTotals(NamedTuple):
    """Squares over all ranks of one step."""

    squares: Mapping[str, np.ndarray]
    """Quantity → (O,); only those that every rank measured."""
    owners: Owners
    clip: float
    """Norm before clipping over the norm that the optimizer received; 1 where it is unknown."""

    def of_layers(self, quantity: str) -> np.ndarray | None:
        """Return the squares of each layer, (L,); None if they were not measured."""
        found = self.squares.get(quantity)
        return None if found is None else found[: self.owners.layers]

    def of_routers(self, quantity: str) -> np.ndarray | None:
        """Return the squares of each router, (R,)."""
        found, first = self.squares.get(quantity), self.owners.first_router
        return None if found is None else found[first : first + self.owners.routers]

    def of_experts(self, quantity: str) -> np.ndarray | None:
        """Return the squares of each layer's routed experts, (X,)."""
        found = self.squares.get(quantity)
        return None if found is None else found[self.owners.first_experts :]


@PARAMETERS.per_step("layers.grad_norm")
def grad_norm(seen: ParameterTotals) -> np.ndarray | None:
    """An infinite norm over another one is NaN, and is recorded so."""
    squares = seen.of_layers(GRADIENT_SQUARES)
    return None if squares is None else np.sqrt(squares) * seen.clip


@PARAMETERS.per_step(
    "layers.update_ratio", "layers.update_ratio_router", "layers.update_ratio_experts"
)
def update_ratios(seen: ParameterTotals) -> tuple[np.ndarray | None, ...]:
    """‖Δθ‖ / ‖θ‖ = √(Σ Δθ² / Σ θ²), one value a layer, router and layer of experts."""
    groups = (seen.of_layers, seen.of_routers, seen.of_experts)
    return tuple(_ratio(group(UPDATE_SQUARES), group(WEIGHT_SQUARES)) for group in groups)


def _ratio(update: np.ndarray | None, weight: np.ndarray | None) -> np.ndarray | None:
    if update is None or weight is None or not len(weight):
        return None
    # A router by hash has no parameters: not applicable, which is null and not NaN.
    with np.errstate(invalid="ignore"):
        return np.ma.masked_where(weight == 0, np.sqrt(update / weight))
