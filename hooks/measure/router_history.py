"""Router history: the routers' weights of the last Δ steps, on the device.

With them `flip_rate_router` separates flips that the router's own update causes from flips that its
input causes.
"""

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from geodiag.hooks.adapters.base import Layout, Removable, RouterSite
from geodiag.hooks.distributed.sharded_weights import is_dtensor
from geodiag.hooks.measure.forward_hooks import ForwardHooks

Snapshot = list[tuple[Tensor | None, Tensor | None]]


class RouterHistory:
    """The last Δ weights and biases of the routers; the oldest go to the forward hooks."""

    def __init__(self, layout: Layout, lag: int) -> None:
        self.layout, self.lag = layout, lag
        self._ring: deque[Snapshot] = deque()
        self.ready = False
        """Whether the step that just ended had weights of Δ steps ago to compare with."""
        self._sharded = [is_dtensor(r.weight()) for r in layout.routers]
        self._used: dict[int, Tensor] = {}
        """Sharded weights are whole during a forward: copied there, they need no collective."""
        self._handles: list[Removable] = [
            r.module.register_forward_hook(self._take(place, r))
            for place, r in enumerate(layout.routers)
            if self._sharded[place]
        ]
        self._remember()

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    def _take(self, place: int, site: RouterSite) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: tuple, _output: Any) -> None:
            if torch.is_grad_enabled():
                self._used[place] = site.weight().detach().clone()

        return hook

    def remember(self, hooks: ForwardHooks) -> None:
        """Keep this step's routers, and give the next step those that are Δ steps old then."""
        self.ready = len(self._ring) > self.lag
        self._remember()
        if len(self._ring) > self.lag + 1:
            self._ring.popleft()
        if len(self._ring) > self.lag:
            for place, (weight, bias) in enumerate(self._ring[0]):
                # Weights copied in a forward are a step older than those at the step's end.
                hooks.past_weights[place] = (
                    self._ring[1][place][0] if self._sharded[place] else weight
                )
                hooks.past_biases[place] = bias

    @torch.no_grad()
    def _remember(self) -> None:
        snapshot: Snapshot = []
        for place, router in enumerate(self.layout.routers):
            bias = router.bias()
            weight = (
                self._used.get(place) if self._sharded[place] else router.weight().detach().clone()
            )
            snapshot.append((weight, None if bias is None else bias.clone()))
        self._ring.append(snapshot)
