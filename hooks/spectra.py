"""Spectral norms of the weights by power iteration that never starts over: one iteration a sampled step."""

from collections.abc import Callable

import torch
from torch import Tensor

from geodiag.hooks import metrics
from geodiag.hooks.adapters.base import Layout

_FIRST = 8
"""Iterations of the very first estimate, which has no vector to go on from."""


class WeightSpectra:
    """Top singular values of routers and experts; worst expert of a layer."""

    def __init__(self, layout: Layout, watched: Callable[[int], bool] = lambda _layer: True) -> None:
        self.layout, self._watched = layout, watched
        self._vectors: dict[tuple[str, int], Tensor] = {}
        self._generator = torch.Generator().manual_seed(0)  # the training's random state is not ours to use

    @torch.no_grad()
    def run(self) -> dict[str, Tensor]:
        """The estimates as they are now, one value a router or expert layer."""
        values = {}
        if self.layout.routers:
            norms = [self._norm("router", r.layer, r.weight().detach().unsqueeze(0)) for r in self.layout.routers]
            values["router/spectral_norm_router"] = torch.stack(norms)
        weights = [(site.layer, site.weights()) for site in self.layout.experts]
        for name in ("gate", "up", "down") if weights else ():
            norms = [self._norm(name, layer, each[name]) for layer, each in weights]
            values[f"act/spectral_norm_{name}"] = torch.stack(norms)
        return values

    def _norm(self, name: str, layer: int, weight_ERC: Tensor) -> Tensor:
        """Of the worst expert; NaN for a layer that is not watched."""
        if not self._watched(layer):
            return torch.full((), torch.nan, device=weight_ERC.device)
        key, iterations = (name, layer), 1
        if key not in self._vectors:
            start = torch.randn(weight_ERC.shape[0], weight_ERC.shape[-1], generator=self._generator)
            self._vectors[key] = torch.nn.functional.normalize(start, dim=-1).to(weight_ERC.device)
            iterations = _FIRST
        for _ in range(iterations):
            norm_E, self._vectors[key] = metrics.power_step(weight_ERC, self._vectors[key])
        return norm_E.amax()
