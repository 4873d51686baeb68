"""Damage to the weights of experts and routers: once, in place, reproducible from the step."""

import torch
from torch import Tensor

from geodiag.errors import GeodiagError
from geodiag.hooks.adapters.base import ExpertSite, RouterSite
from geodiag.hooks.distributed.sharded_weights import edit_full

# E experts, R × C the shape of one expert's weight, C channels of a router's row


def bit_of(index: float, dtype: torch.dtype) -> int:
    """Return the bit of a weight counted from its lowest; a negative `index` counts from the top.

    GeodiagError where `dtype` has no such bit.
    """
    bits = 8 * dtype.itemsize
    bit = int(index)
    if not -bits <= bit < bits:
        allowed = f"{-bits} to {bits - 1}"
        raise GeodiagError(
            f"bit-flip={bit} flips nothing: the weights have {bits} bits; pass {allowed}"
        )
    return bit % bits


@torch.no_grad()
def to_expert(kind: str, site: ExpertSite, step: int, magnitude: float) -> int:
    """Damage the weights of one expert and return its index."""
    expert = step % site.experts
    weights = site.weights()

    def scale(weight_ERC: Tensor) -> None:
        weight_ERC[expert].mul_(magnitude)

    def flip(weight_ERC: Tensor) -> None:
        weight = weight_ERC[expert]
        largest = torch.unravel_index(weight.abs().argmax(), weight.shape)
        weight[largest] = _flipped(weight[largest], bit_of(magnitude, weight.dtype))

    if kind == "expert-scale":
        for name in ("gate", "up"):
            edit_full(weights[name], scale)
    else:
        edit_full(weights["gate"], flip)
    return expert


def _flipped(value: Tensor, bit: int) -> Tensor:
    """Return `value` with one bit of its floating-point representation flipped."""
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[value.dtype.itemsize]
    mask = torch.ones(1, dtype=integer, device=value.device) << bit
    return (value.reshape(1).contiguous().view(integer) ^ mask).view(value.dtype)[0]


@torch.no_grad()
def to_router(kind: str, site: RouterSite, step: int, magnitude: float) -> int | None:
    """Damage a router; return the expert if the damage concerns one expert, else None."""
    expert = step % site.experts
    generator = torch.Generator().manual_seed(step)

    if kind == "bias-kick":
        bias = site.bias()
        assert bias is not None, "the fault was placed at a router that has a bias"
        bias.detach()[expert] += magnitude
        return expert

    def scale(weight_EC: Tensor) -> None:
        weight_EC[expert].mul_(magnitude)

    def shift(weight_EC: Tensor) -> None:
        noise = torch.randn(weight_EC.shape, generator=generator).to(weight_EC)
        weight_EC.add_(noise * weight_EC.std(), alpha=magnitude)

    def permute(weight_EC: Tensor) -> None:
        # A cycle through the experts in random order, so that no row keeps its place.
        order = torch.randperm(len(weight_EC), generator=generator).to(weight_EC.device)
        weight_EC[order] = weight_EC[order.roll(1)]

    change = {"gate-column": scale, "router-shift": shift, "router-permute": permute}[kind]
    edit_full(site.weight().detach(), change)
    return expert if kind == "gate-column" else None
