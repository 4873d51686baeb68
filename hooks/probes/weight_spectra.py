"""Spectral norms of the weights by power iteration that never starts over: one iteration a sampled
step.
"""

import torch
from torch import Tensor

from geodiag.hooks.adapters.base import Layout
from geodiag.hooks.distributed.sharded_weights import for_each_gathered
from geodiag.hooks.measure import formulas as metrics

_ROUTER = "router/spectral_norm_router"
_NAMES = ("spectral_norm_gate", "spectral_norm_up", "spectral_norm_down")
_FIRST = 8
"""Iterations of the very first estimate, which has no vector to go on from."""


class WeightSpectra:
    """Top singular values of routers and experts; worst expert of a layer."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self._vectors: dict[tuple[str, int], Tensor] = {}

    @torch.no_grad()
    def run(self) -> dict[str, Tensor]:
        """The estimates as they are now, one value a router or expert layer; NaN for a layer that
        is not watched.
        """
        lay = self.layout
        watched = [(i, layer) for i, layer in enumerate(lay.layers) if lay.watches(i)]
        found = for_each_gathered(watched, self._norms)
        owners = {_ROUTER: [r.layer for r in lay.routers]} | {
            f"act/{n}": [e.layer for e in lay.experts] for n in _NAMES
        }
        by_name = {
            name: {i: norms[name] for i, norms in found.items() if name in norms} for name in owners
        }
        return {
            name: metrics.in_order(owners[name], values)
            for name, values in by_name.items()
            if values
        }

    def _norms(self, layer: int) -> dict[str, Tensor]:
        norms = {}
        for router in (r for r in self.layout.routers if r.layer == layer):
            norms[_ROUTER] = self._norm(_ROUTER, layer, router.weight().detach().unsqueeze(0))
        for expert in (e for e in self.layout.experts if e.layer == layer):
            weights = expert.weights()
            norms |= {
                f"act/{n}": self._norm(n, layer, weights[n.removeprefix("spectral_norm_")])
                for n in _NAMES
            }
        return norms

    def _norm(self, name: str, layer: int, weight_ERC: Tensor) -> Tensor:
        """Of the worst expert."""
        key, iterations = (name, layer), 1
        if key not in self._vectors:
            # The training's random state is not ours to use; and a layer's start is its own,
            # whatever else is watched.
            generator = torch.Generator(weight_ERC.device).manual_seed(layer)
            shape = weight_ERC.shape[0], weight_ERC.shape[-1]
            start = torch.randn(shape, generator=generator, device=weight_ERC.device)
            self._vectors[key] = torch.nn.functional.normalize(start, dim=-1)
            iterations = _FIRST
        for _ in range(iterations):
            norm_E, self._vectors[key] = metrics.power_step(weight_ERC, self._vectors[key])
        return norm_E.amax()
