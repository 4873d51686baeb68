"""Plant faults in a running training: real changes of weights, activations, gradients or data."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from geodiag.errors import GeodiagError
from geodiag.hooks.adapters import find_layout
from geodiag.hooks.adapters.base import Layout, Removable
from geodiag.hooks.faults import weight_damage
from geodiag.hooks.faults.spec import KINDS, Fault


def _ignore(*_args: Any, **_kwargs: Any) -> None:
    """Record nothing."""


class Faults:
    """Plant faults in a model that is being trained.

    Call `before_step` before each step and `batch` on the step's tokens. Each fault is planted
    once, even where a training goes back to its step. `tell` receives an event for each planted
    fault. GeodiagError where the model does not have what a fault needs.
    """

    def __init__(
        self,
        faults: Sequence[Fault],
        layout: Layout,
        tell: Callable[..., Any] = _ignore,
    ) -> None:
        self.faults = [_resolve_layer(f, layout) for f in faults]
        self.layout = layout
        self._record_event = tell
        self._pending = list(self.faults)
        self._step = 0
        self._active: list[tuple[Fault, list[Removable]]] = []

    @property
    def lr_scale(self) -> float:
        """Factor on the learning rate of the step that `before_step` announced."""
        return math.prod(f.strength(self._step) for f, _ in self._active if f.kind == "lr-shock")

    def before_step(self, step: int) -> None:
        """Plant the faults of this step and remove the faults that are over.

        A training that resumes within the steps of a lasting fault gets the rest of the fault.
        """
        self._step = step
        self._update_active(step)
        for fault in list(self._pending):
            if fault.step <= step <= fault.last_step:
                self._pending.remove(fault)
                handles, expert = self._plant(fault)
                self._record(fault, expert)
                if fault.last_step > fault.step:
                    self._active.append((fault, handles))

    def _update_active(self, step: int) -> None:
        """Remove the faults that are over, and plant again the faults that grow at `step`."""
        for fault, handles in list(self._active):
            over = not fault.step <= step <= fault.last_step
            grows = step in fault.planted
            if over or grows:
                for handle in handles:
                    handle.remove()
                handles.clear()
            if over:
                self._active.remove((fault, handles))
            elif grows:
                handles += self._plant(fault)[0]

    def batch(self, step: int, token_ids: Tensor, vocab: int) -> Tensor:
        """Return the tokens of all micro-batches of `step`: unchanged, or noise during `far-batch`.

        `step` is the step that trains on the tokens, which may come long after the batch was
        fetched.
        """
        if not any(f.kind == "far-batch" and f.step <= step <= f.last_step for f in self.faults):
            return token_ids
        generator = torch.Generator().manual_seed(step)
        return torch.randint(vocab, token_ids.shape, generator=generator).to(token_ids)

    def state_dict(self) -> dict[str, Any]:
        """Return the indices of the faults that are still to come, or still active."""
        left = [*self._pending, *(fault for fault, _ in self._active)]
        return {"left": [self.faults.index(f) for f in left]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue in another process that was given the same faults."""
        self._pending = [f for i, f in enumerate(self.faults) if i in state["left"]]

    def remove(self) -> None:
        """Remove the active faults; what was done to a weight stays."""
        for _, handles in self._active:
            for handle in handles:
                handle.remove()
        self._active.clear()

    @torch.no_grad()
    def _plant(self, fault: Fault) -> tuple[list[Removable], int | None]:
        """Plant `fault`; return the handles that remove it, and the damaged expert."""
        place = KINDS[fault.kind].place
        layer = fault.layer
        magnitude = fault.magnitude or 0.0

        if place == "experts":
            site = next(e for e in self.layout.experts if e.layer == layer)
            return [], weight_damage.to_expert(fault.kind, site, fault.step, magnitude)
        if place in ("router", "bias"):
            router = next(r for r in self.layout.routers if r.layer == layer)
            return [], weight_damage.to_router(fault.kind, router, fault.step, magnitude)
        if layer is None:
            return [], None
        return self._disturb(fault.kind, layer, fault.strength(self._step)), None

    def _record(self, fault: Fault, expert: int | None) -> None:
        data = {"kind": fault.kind, "magnitude": fault.magnitude, "last_step": fault.last_step}
        message = f"planted {fault.kind}: {fault.description}"
        self._record_event("fault", message, layer=fault.layer, expert=expert, data=data)

    def _disturb(self, kind: str, layer: int, magnitude: float) -> list[Removable]:
        """Add hooks that disturb the layer until they are removed."""
        sites = [s for s in self.layout.sites if s.layer == layer]
        if kind == "residual-expand":
            return [s.scale_res(magnitude) for s in sites if s.scale_res is not None]
        if kind == "block-scale":
            return [sites[-1].scale_branch(magnitude)]

        # Hooks on the parameters themselves: gradient clipping and geodiag's gradient norms then
        # get the same scaled gradients as the optimizer.
        parameters = [p for p in self.layout.layers[layer].parameters() if p.requires_grad]
        return [p.register_hook(lambda grad: grad * magnitude) for p in parameters]


def plant(model: nn.Module, *faults: str, tell: Callable[..., Any] = _ignore) -> Faults:
    """Plant faults in any training: `plant(model, "expert-scale@120:3=30")`.

    faults: each as `--inject` takes it, KIND@STEP[-LAST][:LAYER][=MAGNITUDE]. tell: called with
    each fault when it is planted; pass `run.event` to record the faults as events.

    On the result, call `before_step(step)` before each step, and `batch(step, token_ids, vocab)` on
    the tokens if there is a `far-batch`; multiply the learning rate by `lr_scale` if there is an
    `lr-shock`. GeodiagError where the model lacks what a fault needs.
    """
    return Faults([Fault.parse(f) for f in faults], find_layout(model), tell)


def _resolve_layer(fault: Fault, layout: Layout) -> Fault:
    """Return the fault with its layer: as given, else the middle one of the layers that fit."""
    place = KINDS[fault.kind].place
    if place is None:
        return fault

    layers = _layers_with(place, layout)
    if not layers:
        raise GeodiagError(
            f"{fault.kind} cannot be planted: a {layout.family} model has no place for it"
        )
    layer = layers[len(layers) // 2] if fault.layer is None else fault.layer
    if layer not in layers:
        places = ", ".join(map(str, layers))
        raise GeodiagError(
            f"{fault.kind} cannot be planted in layer {layer}; layers that can take it: {places}"
        )
    if fault.kind == "bit-flip":
        site = next(e for e in layout.experts if e.layer == layer)
        weight_damage.bit_of(fault.magnitude or 0.0, site.weights()["gate"].dtype)
    return replace(fault, layer=layer)


def _layers_with(place: str, layout: Layout) -> list[int]:
    """Return the layers that have what a fault of this place needs."""
    learned = [r for r in layout.routers if not r.hashed]
    return {
        "experts": [e.layer for e in layout.experts],
        "router": [r.layer for r in learned],
        "bias": [r.layer for r in learned if r.bias() is not None],
        "res": sorted({s.layer for s in layout.sites if s.scale_res is not None}),
        "block": list(range(len(layout.layers))),
    }[place]
