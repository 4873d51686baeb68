"""What the routers were Δ steps ago, kept on the device, so that a router's own drift can be told from its input's."""

from collections import deque

import torch
from torch import Tensor

from geodiag.hooks.adapters.base import Layout
from geodiag.hooks.taps import Taps

Snapshot = list[tuple[Tensor, Tensor | None]]


class RouterPast:
    """A ring of the last Δ router weights and biases; hands the oldest to the taps."""

    def __init__(self, layout: Layout, lag: int) -> None:
        self.layout, self.lag = layout, lag
        self._ring: deque[Snapshot] = deque()
        self.ready = False
        """Whether the step that just ended had weights of Δ steps ago to compare with."""
        self._remember()

    def remember(self, taps: Taps) -> None:
        """After a step: keeps today's routers, and gives the coming step those that are then Δ steps old."""
        self.ready = len(self._ring) > self.lag
        self._remember()
        if len(self._ring) > self.lag + 1:
            self._ring.popleft()
        if len(self._ring) > self.lag:
            for place, (weight, bias) in enumerate(self._ring[0]):
                taps.past_weights[place], taps.past_biases[place] = weight, bias

    @torch.no_grad()
    def _remember(self) -> None:
        snapshot: Snapshot = []
        for router in self.layout.routers:
            bias = router.bias()
            snapshot.append((router.weight().detach().clone(), None if bias is None else bias.clone()))
        self._ring.append(snapshot)
