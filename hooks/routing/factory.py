"""Create a routing variant by its name, as the command line gives it."""

from typing import Any

from torch import nn

from geodiag.errors import GeodiagError
from geodiag.hooks.routing.anticipatory import AnticipatoryRouting
from geodiag.hooks.routing.base import Rerouting
from geodiag.hooks.routing.router_lag import RouterLag

VARIANTS: dict[str, type[Rerouting]] = {
    variant.variant: variant for variant in (AnticipatoryRouting, RouterLag)
}


def create_routing(variant: str, model: nn.Module, delay_steps: int, **options: Any) -> Rerouting:
    """Return the routing variant of that name for `model`. GeodiagError for an unknown name."""
    if variant not in VARIANTS:
        raise GeodiagError(f"no routing variant {variant!r}; one of {', '.join(VARIANTS)}")
    if variant == RouterLag.variant:
        options.pop("forward", None)  # router-lag runs no forward of its own
    return VARIANTS[variant](model, delay_steps, **options)
