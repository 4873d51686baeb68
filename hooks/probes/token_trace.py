"""Traced tokens: a few tokens of the probe batch whose streams are recorded in every layer."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from geodiag.errors import GeodiagError

# T tokens of the probe, M traced tokens, R routers, D elements of a token's streams

TRACED = 8
"""Number of tokens that `flipped` and `margin` select."""
Trace = Literal["flipped", "margin"] | Sequence[int]
"""Tokens to trace.

`flipped`: those whose choice flipped in most routers; `margin`: those with the smallest margin; or
positions of tokens in the probe batch.
"""

_SEED = 31


def choose(
    trace: Trace,
    flips_RT: Tensor | None,
    margins_RT: Tensor | None,
    tokens: int,
    device: torch.device,
) -> Tensor:
    """Return the positions (M) of the traced tokens in ascending order.

    ValueError for a position outside the batch.
    """
    if not isinstance(trace, str):
        outside = [t for t in trace if not 0 <= t < tokens]
        if outside:
            raise ValueError(
                f"the probe batch has {tokens} tokens and no token {outside[0]}; "
                f"pass 0 to {tokens - 1}"
            )
        return torch.tensor(sorted(set(trace)), device=device)

    count = min(TRACED, tokens)
    margin_T = torch.zeros(tokens, device=device) if margins_RT is None else margins_RT.amin(0)
    if trace == "margin" or flips_RT is None:
        return (-margin_T).topk(count).indices.sort().values

    # Flips are multiples of 1/K, so a term of at most 0.01 only orders tokens with equal flips: the
    # token with the smaller margin comes first.
    closeness_T = 1e-2 / (1 + margin_T.clamp_min(0))
    return (flips_RT.sum(0) + closeness_T).topk(count).indices.sort().values


def parse_trace(text: str) -> Trace:
    """Parse `flipped`, `margin` or positions like `0,5,9`. GeodiagError for any other text."""
    if text in ("flipped", "margin"):
        return "flipped" if text == "flipped" else "margin"
    positions = text.split(",")
    if not all(p.strip().isdecimal() for p in positions):
        raise GeodiagError(
            f"--trace {text} names no tokens; "
            "pass flipped, margin, or places in the probe, e.g. 0,5,9"
        )
    return [int(p) for p in positions]


class Projection:
    """Projects each token's streams on two fixed random directions, orthogonal and of length 1."""

    def __init__(self) -> None:
        self._directions: Tensor | None = None

    def __call__(self, x_TD: Tensor) -> Tensor:
        """Return (T, 3): norm, first and second projection."""
        x = x_TD.detach().to(torch.promote_types(x_TD.dtype, torch.float32))
        if self._directions is None:
            generator = torch.Generator().manual_seed(_SEED)
            drawn = torch.randn(x.shape[1], 2, generator=generator, dtype=torch.float64)
            self._directions = torch.linalg.qr(drawn).Q.to(x)
        return torch.cat([x.norm(dim=1, keepdim=True), x @ self._directions], 1)
