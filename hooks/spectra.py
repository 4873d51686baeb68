"""Spectral norms of the weights by power iteration that never starts over: one iteration a sampled step."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from geodiag.hooks import metrics
from geodiag.hooks.adapters.base import ExpertSite, Layout, RouterSite
from geodiag.hooks.sharded import gathered

_NAMES = ("gate", "up", "down")
_FIRST = 8
"""Iterations of the very first estimate, which has no vector to go on from."""


class WeightSpectra:
    """Top singular values of routers and experts; worst expert of a layer."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self._vectors: dict[tuple[str, int], Tensor] = {}

    @torch.no_grad()
    def run(self) -> dict[str, Tensor]:
        """The estimates as they are now, one value a router or expert layer."""
        values = {}
        if self.layout.routers:
            values["router/spectral_norm_router"] = torch.stack([self._router(site) for site in self.layout.routers])
        if self.layout.experts:
            norms_L3 = torch.stack([self._experts(site) for site in self.layout.experts])
            values |= dict(zip((f"act/spectral_norm_{n}" for n in _NAMES), norms_L3.unbind(1), strict=True))
        return values

    def _router(self, site: RouterSite) -> Tensor:
        with self._whole(site.layer):
            return self._norm("router", site.layer, site.weight().detach().unsqueeze(0))

    def _experts(self, site: ExpertSite) -> Tensor:
        with self._whole(site.layer):
            weights = site.weights()
            return torch.stack([self._norm(name, site.layer, weights[name]) for name in _NAMES])

    def _whole(self, layer: int) -> AbstractContextManager[None]:
        return gathered(self.layout.layers[layer]) if self.layout.watches(layer) else nullcontext()

    def _norm(self, name: str, layer: int, weight_ERC: Tensor) -> Tensor:
        """Of the worst expert; NaN for a layer that is not watched."""
        if not self.layout.watches(layer):
            return torch.full((), torch.nan, device=weight_ERC.device)
        key, iterations = (name, layer), 1
        if key not in self._vectors:
            # The training's random state is not ours to use; and a layer's start is its own, whatever else is watched.
            generator = torch.Generator().manual_seed(layer)
            start = torch.randn(weight_ERC.shape[0], weight_ERC.shape[-1], generator=generator)
            self._vectors[key] = torch.nn.functional.normalize(start, dim=-1).to(weight_ERC.device)
            iterations = _FIRST
        for _ in range(iterations):
            norm_E, self._vectors[key] = metrics.power_step(weight_ERC, self._vectors[key])
        return norm_E.amax()
