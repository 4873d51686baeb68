"""What a planted fault does to the weights of experts and routers: once, in place, the same for the
same step.
"""

import torch
from torch import Tensor

from geodiag.errors import GeodiagError
from geodiag.hooks.adapters.base import ExpertSite, RouterSite
from geodiag.hooks.distributed.sharded_weights import edit


def bit_of(place: float, dtype: torch.dtype) -> int:
    """Which bit of a weight is meant, counted from its lowest. GeodiagError where the type is not
    that wide.
    """
    bits, bit = 8 * dtype.itemsize, int(place)
    if not -bits <= bit < bits:
        raise GeodiagError(
            f"bit-flip={bit} flips nothing: the weights have {bits} bits; pass {-bits} to {bits - 1}"
        )
    return bit % bits


@torch.no_grad()
def to_expert(kind: str, site: ExpertSite, step: int, magnitude: float) -> int:
    """Hurts one expert, which is returned."""
    expert, weights = step % site.experts, site.weights()

    def scale(weight_ERC: Tensor) -> None:
        weight_ERC[expert].mul_(magnitude)

    def flip(weight_ERC: Tensor) -> None:
        weight = weight_ERC[expert]
        at = torch.unravel_index(weight.abs().argmax(), weight.shape)
        weight[at] = _flipped(weight[at], bit_of(magnitude, weight.dtype))

    for name in ("gate", "up") if kind == "expert-scale" else ("gate",):
        edit(weights[name], scale if kind == "expert-scale" else flip)
    return expert


def _flipped(value: Tensor, bit: int) -> Tensor:
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[value.dtype.itemsize]
    mask = torch.ones(1, dtype=whole, device=value.device) << bit
    return (value.reshape(1).contiguous().view(whole) ^ mask).view(value.dtype)[0]


@torch.no_grad()
def to_router(kind: str, site: RouterSite, step: int, magnitude: float) -> int | None:
    """Hurts a router; the expert is returned where it is one expert's place in it that is hurt."""
    expert = step % site.experts
    generator = torch.Generator().manual_seed(step)
    if kind == "bias-kick":
        bias = site.bias()
        assert bias is not None, "the fault was placed where there is one"
        bias.detach()[expert] += magnitude
        return expert

    def scale(weight_EC: Tensor) -> None:
        weight_EC[expert].mul_(magnitude)

    def shift(weight_EC: Tensor) -> None:
        noise = torch.randn(weight_EC.shape, generator=generator).to(weight_EC)
        weight_EC.add_(noise * weight_EC.std(), alpha=magnitude)

    def permute(weight_EC: Tensor) -> None:
        # A cycle through a random order: no row stays where it was.
        order = torch.randperm(len(weight_EC), generator=generator).to(weight_EC.device)
        weight_EC[order] = weight_EC[order.roll(1)]

    change = {"gate-column": scale, "router-shift": shift, "router-permute": permute}[kind]
    edit(site.weight().detach(), change)
    return expert if kind == "gate-column" else None
