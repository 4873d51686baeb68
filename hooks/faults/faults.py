"""Faults planted on purpose: each is a real change to the running training, written
KIND@STEP[:LAYER][=MAGNITUDE].

KIND@FIRST-LAST[:LAYER][=MAGNITUDE] is one that grows: it is planted at each of these steps, on top
of itself.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from geodiag.errors import GeodiagError
from geodiag.hooks.adapters import find_layout
from geodiag.hooks.adapters.base import Layout, Removable
from geodiag.hooks.faults import weight_damage as damage

LASTING = 10
"""Steps that a fault of the forward, the gradients, the batch or the learning rate lasts; one of a
weight stays.
"""


@dataclass(frozen=True)
class Kind:
    """One kind of fault: what its magnitude means, and where it can be planted."""

    magnitude: float | None
    """Unless another is given; None where there is nothing to give."""
    help: str
    place: str | None
    """What a layer must have: experts, router, bias, res or block. None for faults of no layer."""
    lasts: bool = False
    grows: bool = True
    """Whether planting it once more makes more of it."""


KINDS = {
    "expert-scale": Kind(30.0, "one expert's gate and up weights times MAGNITUDE", "experts"),
    "gate-column": Kind(30.0, "one expert's row of the router times MAGNITUDE", "router"),
    "router-shift": Kind(
        3.0, "MAGNITUDE standard deviations of noise added to the router's weights", "router"
    ),
    "router-permute": Kind(None, "the router's rows in another order", "router", grows=False),
    "bias-kick": Kind(1.0, "MAGNITUDE added to one expert's balancing bias", "bias"),
    "residual-expand": Kind(1.5, "H_res of the layer's sites times MAGNITUDE", "res", lasts=True),
    "block-scale": Kind(20.0, "the feed-forward output times MAGNITUDE", "block", lasts=True),
    "lr-shock": Kind(10.0, "the learning rate times MAGNITUDE", None, lasts=True),
    "far-batch": Kind(None, "batches of random tokens", None, lasts=True, grows=False),
    "grad-scale": Kind(
        100.0, "the layer's gradients, before clipping, times MAGNITUDE", "block", lasts=True
    ),
    "bit-flip": Kind(
        -2.0,
        "bit MAGNITUDE of the largest gate weight of one expert flipped; -1 is its sign, -2 the bit below",
        "experts",
        grows=False,
    ),
}
"""Every kind of fault."""

FORM = "KIND@STEP[-LAST][:LAYER][=MAGNITUDE]"
_FORM = re.compile(
    r"(?P<kind>[a-z-]+)@(?P<step>\d+)(-(?P<until>\d+))?(:(?P<layer>\d+))?(=(?P<magnitude>.+))?",
    re.ASCII,
)


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One planted fault."""

    kind: str
    step: int
    layer: int | None
    magnitude: float | None
    until: int | None = None
    """The last step at which it grows; None for one that does not."""

    @classmethod
    def parse(cls, text: str) -> "Fault":
        """`KIND@STEP[-LAST][:LAYER][=MAGNITUDE]`. GeodiagError where it is anything else."""
        match = _FORM.fullmatch(text)
        if match is None:
            raise GeodiagError(f"cannot read the fault {text!r}; write {FORM}")
        name, layer, magnitude = match["kind"], match["layer"], match["magnitude"]
        if name not in KINDS:
            raise GeodiagError(f"unknown fault kind {name!r}; one of {', '.join(KINDS)}")
        kind = KINDS[name]
        if layer is not None and kind.place is None:
            raise GeodiagError(f"{name} belongs to no layer; write {name}@{match['step']}")
        if magnitude is not None and kind.magnitude is None:
            raise GeodiagError(f"{name} has no magnitude; leave out ={magnitude}")
        step, until = int(match["step"]), None if match["until"] is None else int(match["until"])
        if until is not None and not kind.grows:
            raise GeodiagError(f"{name} cannot grow; write {name}@{step}")
        if until is not None and until <= step:
            raise GeodiagError(
                f"{name}@{step}-{until} ends before it grows; write FIRST-LAST, e.g. {step}-{step + 30}"
            )
        size = kind.magnitude if magnitude is None else _number(magnitude, whole=name == "bit-flip")
        fault = cls(
            kind=name,
            step=step,
            layer=None if layer is None else int(layer),
            magnitude=size,
            until=until,
        )
        if kind.lasts and not math.isfinite(fault.strength(fault.last_step)):
            raise GeodiagError(
                f"{text} grows beyond all numbers; pass a smaller MAGNITUDE, or fewer steps"
            )
        return fault

    @property
    def planted(self) -> range:
        """The steps at which it is planted: one, or all those at which it grows."""
        return range(self.step, (self.step if self.until is None else self.until) + 1)

    @property
    def last_step(self) -> int:
        """The last step that is disturbed; of a fault that stays, the last that it is planted at."""
        return self.planted[-1] + LASTING - 1 if KINDS[self.kind].lasts else self.planted[-1]

    def strength(self, step: int) -> float:
        """How much a fault that lasts amounts to at `step`: MAGNITUDE times itself for each step
        that it has grown.
        """
        try:
            return (self.magnitude or 0.0) ** (min(step, self.planted[-1]) - self.step + 1)
        except OverflowError:
            return math.inf

    @property
    def said(self) -> str:
        """What is done, in words."""
        what = KINDS[self.kind].help
        if self.magnitude is not None:
            what = what.replace("MAGNITUDE", f"{self.magnitude:g}")
        grows = "" if self.until is None else f", again at every step to {self.until}"
        return f"{what}{grows} for {LASTING} steps" if KINDS[self.kind].lasts else f"{what}{grows}"


def _number(text: str, whole: bool) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or (whole and value != int(value)):
        raise GeodiagError(f"the magnitude {text!r} is no {'whole' if whole else 'finite'} number")
    return value


class Faults:
    """Plants faults in a model that is being trained. Call `before_step` before each step, `batch`
    on its tokens.

    Each fault is planted once, even where a training goes back to its step.
    GeodiagError where the model does not have what a fault needs.
    """

    def __init__(
        self,
        faults: Sequence[Fault],
        layout: Layout,
        tell: Callable[..., Any] = lambda *_a, **_k: None,
    ) -> None:
        self.faults = [_placed(f, layout) for f in faults]
        self.layout, self._tell = layout, tell
        self._coming = list(self.faults)
        self._step = 0
        self._under_way: list[tuple[Fault, list[Removable]]] = []

    @property
    def lr_scale(self) -> float:
        """Factor on the learning rate of the step that `before_step` announced."""
        return math.prod(f.strength(self._step) for f, _ in self._under_way if f.kind == "lr-shock")

    def before_step(self, step: int) -> None:
        """Plants what this step has coming and clears away what is over.

        A training that resumes within the steps of a fault that lasts has the rest of it.
        """
        self._step = step
        for fault, handles in list(self._under_way):
            over = not fault.step <= step <= fault.last_step
            if over or step in fault.planted:
                for handle in handles:
                    handle.remove()
                handles.clear()
            if over:
                self._under_way.remove((fault, handles))
            elif step in fault.planted:
                handles += self._plant(fault)[0]
        for fault in list(self._coming):
            if fault.step <= step <= fault.last_step:
                self._coming.remove(fault)
                handles, expert = self._plant(fault)
                self._say(fault, expert)
                if fault.last_step > fault.step:
                    self._under_way.append((fault, handles))

    def batch(self, step: int, token_ids: Tensor, vocab: int) -> Tensor:
        """A step's tokens, all its micro-batches: the loader's own, or noise while a `far-batch`
        lasts.

        By the step they belong to, not by the step under way: batches may be fetched long before
        they are trained on.
        """
        if not any(f.kind == "far-batch" and f.step <= step <= f.last_step for f in self.faults):
            return token_ids
        generator = torch.Generator().manual_seed(step)
        return torch.randint(vocab, token_ids.shape, generator=generator).to(token_ids)

    def state_dict(self) -> dict[str, Any]:
        """Which faults are still to come, or to go on."""
        left = [*self._coming, *(fault for fault, _ in self._under_way)]
        return {"left": [self.faults.index(f) for f in left]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """For a training that goes on in another process, with the same faults."""
        self._coming = [f for i, f in enumerate(self.faults) if i in state["left"]]

    def remove(self) -> None:
        """Takes back what would still last; what was done to a weight stays."""
        for _, handles in self._under_way:
            for handle in handles:
                handle.remove()
        self._under_way.clear()

    @torch.no_grad()
    def _plant(self, fault: Fault) -> tuple[list[Removable], int | None]:
        """What can be taken back of it, and the expert that is hurt."""
        place, layer, size = KINDS[fault.kind].place, fault.layer, fault.magnitude or 0.0
        if place == "experts":
            site = next(e for e in self.layout.experts if e.layer == layer)
            return [], damage.to_expert(fault.kind, site, fault.step, size)
        if place in ("router", "bias"):
            router = next(r for r in self.layout.routers if r.layer == layer)
            return [], damage.to_router(fault.kind, router, fault.step, size)
        if layer is None:
            return [], None
        return self._disturb(fault.kind, layer, fault.strength(self._step)), None

    def _say(self, fault: Fault, expert: int | None) -> None:
        data = {"kind": fault.kind, "magnitude": fault.magnitude, "last_step": fault.last_step}
        self._tell(
            "fault",
            f"planted {fault.kind}: {fault.said}",
            layer=fault.layer,
            expert=expert,
            data=data,
        )

    def _disturb(self, kind: str, layer: int, magnitude: float) -> list[Removable]:
        """Hooks that last until they are removed."""
        sites = [s for s in self.layout.sites if s.layer == layer]
        if kind == "residual-expand":
            return [s.scale_res(magnitude) for s in sites if s.scale_res is not None]
        if kind == "block-scale":
            return [sites[-1].scale_branch(magnitude)]
        # On the leaves: clipping and whoever measures the gradients see them as the optimizer does.
        parameters = [p for p in self.layout.layers[layer].parameters() if p.requires_grad]
        return [p.register_hook(lambda grad: grad * magnitude) for p in parameters]


def plant(
    model: nn.Module, *faults: str, tell: Callable[..., Any] = lambda *_a, **_k: None
) -> Faults:
    """Faults for anyone's training, written as `--inject` takes them: `plant(model,
    "expert-scale@120:3=30")`.

    Call `before_step(step)` before each step, and `batch(step, token_ids, vocab)` on its tokens
    where a `far-batch` is among them; multiply the learning rate by `lr_scale` where an `lr-shock`
    is. `tell` is called with each fault as it is planted: pass `run.event` to have it on record.
    GeodiagError where the model lacks what a fault needs.
    """
    return Faults([Fault.parse(f) for f in faults], find_layout(model), tell)


def _placed(fault: Fault, layout: Layout) -> Fault:
    """The fault with its layer: the one asked for, else the middle of those that have what it
    needs.
    """
    place = KINDS[fault.kind].place
    if place is None:
        return fault
    able = {
        "experts": [e.layer for e in layout.experts],
        "router": [r.layer for r in layout.routers if not r.hashed],
        "bias": [r.layer for r in layout.routers if not r.hashed and r.bias() is not None],
        "res": sorted({s.layer for s in layout.sites if s.scale_res is not None}),
        "block": list(range(len(layout.layers))),
    }[place]
    if not able:
        raise GeodiagError(
            f"{fault.kind} cannot be planted: a {layout.family} model has no place for it"
        )
    layer = able[len(able) // 2] if fault.layer is None else fault.layer
    if layer not in able:
        places = ", ".join(map(str, able))
        raise GeodiagError(
            f"{fault.kind} cannot be planted in layer {layer}; layers that can take it: {places}"
        )
    if fault.kind == "bit-flip":
        site = next(e for e in layout.experts if e.layer == layer)
        damage.bit_of(fault.magnitude or 0.0, site.weights()["gate"].dtype)
    return replace(fault, layer=layer)


def page() -> str:
    """docs/faults.md, printed from `KINDS` so that the two cannot differ."""
    head = f"""# Faults to plant

Printed from `hooks/faults/faults.py` by `python -m geodiag.hooks.faults.faults`. Written `{FORM}`, several
times if need be: `geodiag train --inject expert-scale@120:3=30`. Without a layer it is the middle one of those that
have what the fault needs; the expert is STEP modulo the number of experts. A fault of a weight stays; the others last
{LASTING} steps and are then taken back. Each is an event of kind `fault` with its layer, expert and magnitude.

With FIRST-LAST it grows: `residual-expand@120-150:2=1.1` is planted at each of these steps, on top of itself, in the
same layer and expert, and 1.1 to the 31st power at the last. What lasts does so for {LASTING} steps from LAST on.

| kind | what is done | MAGNITUDE unless given | needs | lasts | grows |
|---|---|---|---|---|---|"""
    needs = {
        "experts": "experts",
        "router": "a learned router",
        "bias": "a balancing bias",
        "res": "hyper-connections",
    }
    rows = [
        f"| `{name}` | {k.help} | {'–' if k.magnitude is None else f'{k.magnitude:g}'} "
        f"| {needs.get(k.place or '', 'nothing')} | {f'{LASTING} steps' if k.lasts else 'stays'} "
        f"| {'yes' if k.grows else 'no'} |"
        for name, k in KINDS.items()
    ]
    return "\n".join([head, *rows]) + "\n"


if __name__ == "__main__":
    print(page(), end="")
