"""Spectral norms of router and expert weights, by power iteration that continues across probes.

The weights change little between two probes, so the last singular vector is a good start, and one
iteration per probe tracks the norm.
"""

import torch
from torch import Tensor

from geodiag.hooks.adapters.base import Layout
from geodiag.hooks.distributed.sharded_weights import for_each_gathered
from geodiag.hooks.measure import formulas
from geodiag.hooks.measure.metric_group import MetricGroup

# E matrices (experts, or one router), R rows, C columns

SPECTRA = MetricGroup("spectra")

_EXPERT_WEIGHTS = ("gate", "up", "down")
_FIRST_ITERATIONS = 8
"""Iterations of the first estimate, which starts from a random vector."""


class WeightSpectra:
    """Largest singular values of routers and experts; of a layer's experts the largest."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self._vectors: dict[tuple[str, int], Tensor] = {}
        """Current right singular vectors (E, C), by name and layer."""

    @torch.no_grad()
    def run(self) -> dict[str, dict[int, Tensor]]:
        """Return weight (router, gate, up, down) → layer → estimate, for recorded layers."""
        recorded = [(i, m) for i, m in enumerate(self.layout.layers) if self.layout.watches(i)]
        result: dict[str, dict[int, Tensor]] = {}
        for layer, norms in for_each_gathered(recorded, self._norms).items():
            for weight, norm in norms.items():
                result.setdefault(weight, {})[layer] = norm
        return result

    def _norms(self, layer: int) -> dict[str, Tensor]:
        norms = {}
        for router in (r for r in self.layout.routers if r.layer == layer):
            norms["router"] = self._norm("router", layer, router.weight().detach().unsqueeze(0))
        for expert in (e for e in self.layout.experts if e.layer == layer):
            weights = expert.weights()
            norms |= {name: self._norm(name, layer, weights[name]) for name in _EXPERT_WEIGHTS}
        return norms

    def _norm(self, name: str, layer: int, weight_ERC: Tensor) -> Tensor:
        """Return the largest spectral norm of the matrices after one more power iteration."""
        # v ← normalize(Wᵀ W v) converges to the first right singular vector, and ‖W v‖ approaches
        # σ₁ = ‖W‖₂ from below.
        key = (name, layer)
        iterations = 1
        if key not in self._vectors:
            self._vectors[key] = _random_unit_vectors(weight_ERC, layer)
            iterations = _FIRST_ITERATIONS
        for _ in range(iterations):
            norm_E, self._vectors[key] = formulas.power_step(weight_ERC, self._vectors[key])
        return norm_E.amax()


@SPECTRA.per_step(
    "layers.spectral_norm_router",
    *(f"layers.spectral_norm_{weight}" for weight in _EXPERT_WEIGHTS),
)
def spectral_norms(spectra: WeightSpectra) -> list[Tensor | None]:
    """Return one value per router or expert layer; NaN for a layer that is not recorded."""
    norms = spectra.run()
    routers = [r.layer for r in spectra.layout.routers]
    experts = [e.layer for e in spectra.layout.experts]
    return [
        formulas.in_order(routers if weight == "router" else experts, norms[weight])
        if weight in norms
        else None
        for weight in ("router", *_EXPERT_WEIGHTS)
    ]


def _random_unit_vectors(weight_ERC: Tensor, seed: int) -> Tensor:
    """Return one start vector per matrix, (E, C).

    They come from a generator of their own, since the training's random state must not change; the
    seed is the layer, so that they do not depend on which other layers are recorded.
    """
    generator = torch.Generator(weight_ERC.device).manual_seed(seed)
    shape = weight_ERC.shape[0], weight_ERC.shape[-1]
    start_EC = torch.randn(shape, generator=generator, device=weight_ERC.device)
    return torch.nn.functional.normalize(start_EC, dim=-1)
