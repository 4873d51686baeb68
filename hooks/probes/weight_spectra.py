"""Spectral norms of the weights by power iteration that never starts over: one iteration a sampled
step.
"""

import torch
from torch import Tensor

from geodiag.hooks.adapters.base import Layout
from geodiag.hooks.distributed.sharded_weights import for_each_gathered
from geodiag.hooks.measure import formulas
from geodiag.hooks.measure.metric_group import MetricGroup

SPECTRA = MetricGroup("spectra")

_EXPERT_WEIGHTS = ("gate", "up", "down")
_FIRST = 8
"""Iterations of the very first estimate, which has no vector to go on from."""


class WeightSpectra:
    """Top singular values of routers and experts; worst expert of a layer."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self._vectors: dict[tuple[str, int], Tensor] = {}

    @torch.no_grad()
    def run(self) -> dict[str, dict[int, Tensor]]:
        """Return weight (`router`, `gate`, `up`, `down`) → layer → the estimate as it is now, of the
        layers that are recorded.
        """
        layout = self.layout
        layers = [(i, layer) for i, layer in enumerate(layout.layers) if layout.watches(i)]
        of_layer = for_each_gathered(layers, self._norms)
        found: dict[str, dict[int, Tensor]] = {}
        for layer, norms in of_layer.items():
            for weight, norm in norms.items():
                found.setdefault(weight, {})[layer] = norm
        return found

    def _norms(self, layer: int) -> dict[str, Tensor]:
        norms = {}
        for router in (r for r in self.layout.routers if r.layer == layer):
            weight = router.weight().detach().unsqueeze(0)
            norms["router"] = self._norm("router", layer, weight)
        for expert in (e for e in self.layout.experts if e.layer == layer):
            weights = expert.weights()
            norms |= {w: self._norm(w, layer, weights[w]) for w in _EXPERT_WEIGHTS}
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
            norm_E, self._vectors[key] = formulas.power_step(weight_ERC, self._vectors[key])
        return norm_E.amax()


@SPECTRA.per_step(
    "layers.spectral_norm_router",
    *(f"layers.spectral_norm_{weight}" for weight in _EXPERT_WEIGHTS),
)
def spectral_norms(spectra: WeightSpectra) -> list[Tensor | None]:
    """One value a router or expert layer; NaN for a layer that is not recorded."""
    found = spectra.run()
    routers = [r.layer for r in spectra.layout.routers]
    experts = [e.layer for e in spectra.layout.experts]
    return [
        formulas.in_order(routers if weight == "router" else experts, found[weight])
        if weight in found
        else None
        for weight in ("router", *_EXPERT_WEIGHTS)
    ]
