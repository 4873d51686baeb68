"""The path of one traced token through the residual sites of the model, at one step."""

from dataclasses import dataclass

import numpy as np

# P places: the sites that a token passes, in static order.


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """One token at one step, with a value for each site that it passes."""

    token: int
    place_P: tuple[str, ...]
    """`3.ffn`, in static order."""
    projection_P2: np.ndarray
    expert_P: np.ndarray
    """The first expert that the token was routed to; −1 where there is no router."""
    flipped_P: np.ndarray
    """Share of the experts that changed since the last sample; NaN where there is no router."""
    text: str = ""
