"""Traced tokens: which few of the probe's tokens are followed through the layers, and where they
stand.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from geodiag.errors import GeodiagError

# T tokens of the probe, M traced tokens, R routers, D the size of a token's stream

TRACED = 8
Trace = Literal["flipped", "margin"] | Sequence[int]
"""By itself those that flipped most, those of the worst margin, or the places of tokens in the
probe batch.
"""

_SEED = 31


def choose(
    trace: Trace,
    flips_RT: Tensor | None,
    margins_RT: Tensor | None,
    tokens: int,
    device: torch.device,
) -> Tensor:
    """The places (M) of the tokens to follow, in ascending order. ValueError for a place outside
    the batch.
    """
    if not isinstance(trace, str):
        outside = [t for t in trace if not 0 <= t < tokens]
        if outside:
            raise ValueError(
                f"the probe batch has {tokens} tokens and no token {outside[0]}; pass 0 to {tokens - 1}"
            )
        return torch.tensor(sorted(set(trace)), device=device)
    few = min(TRACED, tokens)
    worst = torch.zeros(tokens, device=device) if margins_RT is None else margins_RT.amin(0)
    if trace == "margin" or flips_RT is None:
        return (-worst).topk(few).indices.sort().values
    # Flips first; among equals, whose choice is nearest to flipping.
    near = 1e-2 / (1 + worst.clamp_min(0))
    return (flips_RT.sum(0) + near).topk(few).indices.sort().values


def parse_trace(text: str) -> Trace:
    """`flipped`, `margin` or places like `0,5,9`. GeodiagError for anything else."""
    if text in ("flipped", "margin"):
        return "flipped" if text == "flipped" else "margin"
    places = text.split(",")
    if not all(p.strip().isdecimal() for p in places):
        raise GeodiagError(
            f"--trace {text} names no tokens; pass flipped, margin, or places in the probe, e.g. 0,5,9"
        )
    return [int(p) for p in places]


class Projection:
    """Two fixed random directions of length 1 at a right angle; each token's norm and place along
    them.
    """

    def __init__(self) -> None:
        self._directions: Tensor | None = None

    def __call__(self, x_TD: Tensor) -> Tensor:
        """(T, 3): norm, first and second projection."""
        x = x_TD.detach().to(torch.promote_types(x_TD.dtype, torch.float32))
        if self._directions is None:
            drawn = torch.randn(
                x.shape[1], 2, generator=torch.Generator().manual_seed(_SEED), dtype=torch.float64
            )
            self._directions = torch.linalg.qr(drawn).Q.to(x)
        return torch.cat([x.norm(dim=1, keepdim=True), x @ self._directions], 1)
