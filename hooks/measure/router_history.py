"""What the routers were Δ steps ago, kept on the device, so that a router's own drift can be told
from its input's.
"""

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from geodiag.hooks.adapters.base import Layout, Removable, RouterSite
from geodiag.hooks.distributed.sharded_weights import is_dtensor
from geodiag.hooks.measure.forward_hooks import Taps

Snapshot = list[tuple[Tensor | None, Tensor | None]]


class RouterPast:
    """A ring of the last Δ router weights and biases; hands the oldest to the taps."""

    def __init__(self, layout: Layout, lag: int) -> None:
        self.layout, self.lag = layout, lag
        self._ring: deque[Snapshot] = deque()
        self.ready = False
        """Whether the step that just ended had weights of Δ steps ago to compare with."""
        self._spread = [is_dtensor(r.weight()) for r in layout.routers]
        self._used: dict[int, Tensor] = {}
        """What is spread over ranks between the steps is whole in a forward: taken there, nobody
        need be asked.
        """
        self._handles: list[Removable] = [
            r.module.register_forward_hook(self._take(place, r))
            for place, r in enumerate(layout.routers)
            if self._spread[place]
        ]
        self._remember()

    def remove(self) -> None:
        """Takes the hooks off."""
        for handle in self._handles:
            handle.remove()

    def _take(self, place: int, site: RouterSite) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: tuple, _output: Any) -> None:
            if torch.is_grad_enabled():
                self._used[place] = site.weight().detach().clone()

        return hook

    def remember(self, taps: Taps) -> None:
        """After a step: keeps today's routers, and gives the coming step those that are then Δ
        steps old.
        """
        self.ready = len(self._ring) > self.lag
        self._remember()
        if len(self._ring) > self.lag + 1:
            self._ring.popleft()
        if len(self._ring) > self.lag:
            for place, (weight, bias) in enumerate(self._ring[0]):
                # What a forward used is a step older than what stands at the step's end.
                taps.past_weights[place] = (
                    self._ring[1][place][0] if self._spread[place] else weight
                )
                taps.past_biases[place] = bias

    @torch.no_grad()
    def _remember(self) -> None:
        snapshot: Snapshot = []
        for place, router in enumerate(self.layout.routers):
            bias = router.bias()
            weight = (
                self._used.get(place) if self._spread[place] else router.weight().detach().clone()
            )
            snapshot.append((weight, None if bias is None else bias.clone()))
        self._ring.append(snapshot)
