"""Faults planted on purpose: each is a real change to the running training, written KIND@STEP[:LAYER][=MAGNITUDE]."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from geodiag.errors import GeodiagError
from geodiag.hooks.adapters.base import ExpertSite, Layout, Removable, RouterSite

LASTING = 10
"""Steps that a fault of the forward, the batch or the learning rate lasts; a fault of a weight is done once."""


@dataclass(frozen=True)
class Kind:
    """One kind of fault: what its magnitude means, and whether it belongs to a layer."""

    magnitude: float
    help: str
    layered: bool = True


KINDS = {
    "expert-scale": Kind(30.0, "one expert's gate and up weights times MAGNITUDE"),
    "gate-column": Kind(30.0, "one expert's row of the router times MAGNITUDE"),
    "router-shift": Kind(3.0, "MAGNITUDE standard deviations of noise added to the router's weights"),
    "router-permute": Kind(1.0, "the router's rows in another order"),
    "bias-kick": Kind(1.0, "MAGNITUDE added to one expert's balancing bias"),
    "residual-expand": Kind(1.5, f"H_res of both sites times MAGNITUDE for {LASTING} steps"),
    "block-scale": Kind(20.0, f"the feed-forward output times MAGNITUDE for {LASTING} steps"),
    "lr-shock": Kind(10.0, f"the learning rate times MAGNITUDE for {LASTING} steps", layered=False),
    "far-batch": Kind(1.0, f"batches of random tokens for {LASTING} steps", layered=False),
    "grad-scale": Kind(100.0, f"the layer's gradients times MAGNITUDE for {LASTING} steps"),
    "bit-flip": Kind(30.0, "bit MAGNITUDE of the largest weight of one expert flipped"),
}
"""Every kind of fault."""

_FORM = re.compile(r"^(?P<kind>[a-z-]+)@(?P<step>\d+)(:(?P<layer>\d+))?(=(?P<magnitude>[-+.\deE]+))?$")


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One planted fault."""

    kind: str
    step: int
    layer: int | None
    magnitude: float

    @classmethod
    def parse(cls, text: str) -> "Fault":
        """`KIND@STEP[:LAYER][=MAGNITUDE]`. GeodiagError where it is anything else."""
        match = _FORM.match(text)
        if match is None:
            raise GeodiagError(f"cannot read the fault {text!r}; write KIND@STEP[:LAYER][=MAGNITUDE]")
        kind = match["kind"]
        if kind not in KINDS:
            raise GeodiagError(f"unknown fault kind {kind!r}; one of {', '.join(KINDS)}")
        try:
            magnitude = float(match["magnitude"]) if match["magnitude"] else KINDS[kind].magnitude
        except ValueError:
            raise GeodiagError(f"{match['magnitude']!r} in {text!r} is no number") from None
        layer = int(match["layer"]) if match["layer"] else None
        return cls(kind=kind, step=int(match["step"]), layer=layer, magnitude=magnitude)

    @property
    def last_step(self) -> int:
        lasts = self.kind in ("residual-expand", "block-scale", "lr-shock", "far-batch", "grad-scale")
        return self.step + LASTING - 1 if lasts else self.step


class Faults:
    """Plants faults in a model that is being trained. Call `before_step` and `batch` before each step.

    GeodiagError where the model does not have what a fault needs.
    """

    def __init__(
        self,
        faults: Sequence[Fault],
        layout: Layout,
        optimizers: Sequence[Optimizer],
        tell: Callable[..., Any] = lambda *_a, **_k: None,
    ) -> None:
        self.faults = [self._placed(f, layout) for f in faults]
        self.layout, self.optimizers, self._tell = layout, optimizers, tell
        self._under_way: list[tuple[int, list[Removable]]] = []

    @property
    def lr_scale(self) -> float:
        """Factor on the learning rate of the step that `before_step` announced."""
        return self._lr_scale

    _lr_scale = 1.0
    _step = -1

    def before_step(self, step: int) -> None:
        """Plants what this step has coming and clears away what is over."""
        self._step, self._lr_scale = step, 1.0
        for last, handles in list(self._under_way):
            if step > last:
                for handle in handles:
                    handle.remove()
                self._under_way.remove((last, handles))
        for fault in self.faults:
            if fault.kind == "lr-shock" and fault.step <= step <= fault.last_step:
                self._lr_scale *= fault.magnitude
            if fault.step == step:
                self._plant(fault)

    def batch(self, token_ids: Tensor, vocab: int) -> Tensor:
        """This step's tokens: the loader's own, or noise while a `far-batch` lasts."""
        for fault in self.faults:
            if fault.kind == "far-batch" and fault.step <= self._step <= fault.last_step:
                generator = torch.Generator().manual_seed(self._step)
                return torch.randint(vocab, token_ids.shape, generator=generator).to(token_ids)
        return token_ids

    @staticmethod
    def _placed(fault: Fault, layout: Layout) -> Fault:
        """The fault with its layer: the one asked for, else the middle of those that have what it needs."""
        if not KINDS[fault.kind].layered:
            return fault
        if fault.kind in ("gate-column", "router-shift", "router-permute", "bias-kick"):
            able = [r.layer for r in layout.routers if not r.hashed]
        elif fault.kind in ("expert-scale", "bit-flip"):
            able = [e.layer for e in layout.experts]
        elif fault.kind == "residual-expand":
            able = sorted({s.layer for s in layout.sites if s.scale_res is not None})
        else:
            able = list(range(len(layout.layers)))
        if not able:
            raise GeodiagError(f"{fault.kind} cannot be planted: a {layout.family} model has no place for it")
        layer = able[len(able) // 2] if fault.layer is None else fault.layer
        if layer not in able:
            places = ", ".join(map(str, able))
            raise GeodiagError(f"{fault.kind} cannot be planted in layer {layer}; layers that can take it: {places}")
        return Fault(kind=fault.kind, step=fault.step, layer=layer, magnitude=fault.magnitude)

    @torch.no_grad()
    def _plant(self, fault: Fault) -> None:
        handles: list[Removable] = []
        expert: int | None = None
        if fault.kind in ("expert-scale", "bit-flip"):
            expert = self._hurt_expert(fault, next(e for e in self.layout.experts if e.layer == fault.layer))
        elif fault.kind in ("gate-column", "router-shift", "router-permute", "bias-kick"):
            expert = self._hurt_router(fault, next(r for r in self.layout.routers if r.layer == fault.layer))
        elif fault.kind == "residual-expand":
            sites = [s for s in self.layout.sites if s.layer == fault.layer and s.scale_res is not None]
            handles = [s.scale_res(fault.magnitude) for s in sites if s.scale_res is not None]
        elif fault.kind == "block-scale":
            site = [s for s in self.layout.sites if s.layer == fault.layer][-1]
            handles = [site.scale_branch(fault.magnitude)]
        elif fault.kind == "grad-scale":
            handles = [o.register_step_pre_hook(self._scale_gradients(fault)) for o in self.optimizers]
        if handles:
            self._under_way.append((fault.last_step, handles))
        data = {"kind": fault.kind, "magnitude": fault.magnitude, "last_step": fault.last_step}
        message = f"planted {fault.kind}: {KINDS[fault.kind].help.replace('MAGNITUDE', f'{fault.magnitude:g}')}"
        self._tell("fault", message, layer=fault.layer, expert=expert, data=data)

    def _hurt_expert(self, fault: Fault, site: ExpertSite) -> int:
        expert, weights = fault.step % site.experts, site.weights()
        if fault.kind == "expert-scale":
            for name in ("gate", "up"):
                weights[name][expert].mul_(fault.magnitude)
            return expert
        weight = weights["gate"][expert]
        place = weight.abs().argmax()
        bits = torch.int32 if weight.dtype == torch.float32 else torch.int16
        at = torch.unravel_index(place, weight.shape)
        value = weight[at].reshape(1).contiguous()
        mask = torch.tensor([1], dtype=bits, device=value.device) << int(fault.magnitude)
        weight[at] = (value.view(bits) ^ mask).view(weight.dtype)[0]
        return expert

    def _hurt_router(self, fault: Fault, site: RouterSite) -> int | None:
        weight, expert = site.weight().detach(), fault.step % site.experts
        generator = torch.Generator().manual_seed(fault.step)
        if fault.kind == "gate-column":
            weight[expert].mul_(fault.magnitude)
            return expert
        if fault.kind == "router-shift":
            noise = torch.randn(weight.shape, generator=generator).to(weight)
            weight.add_(noise * weight.std(), alpha=fault.magnitude)
        elif fault.kind == "router-permute":
            weight.copy_(weight[torch.randperm(len(weight), generator=generator).to(weight.device)])
        else:
            bias = site.bias()
            assert bias is not None, "a learned router that was found has a bias"
            bias[expert] += fault.magnitude
            return expert
        return None

    def _scale_gradients(self, fault: Fault) -> Callable[..., None]:
        assert fault.layer is not None
        mine = {id(p) for p in self.layout.layers[fault.layer].parameters()}

        def hook(optimizer: Optimizer, *_: Any) -> None:
            for group in optimizer.param_groups:
                for p in group["params"]:
                    if p.grad is not None and id(p) in mine:
                        p.grad.mul_(fault.magnitude)

        return hook
