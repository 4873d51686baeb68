"""How far apart two tensors are, for the tests of the reference models."""

import math

from torch import Tensor


def error(a: Tensor, b: Tensor) -> float:
    """‖a − b‖ / ‖b‖ in float64; NaN counts as infinitely wrong."""
    a, b = a.detach().double(), b.detach().double()
    e = ((a - b).norm() / b.norm()).item()
    return math.inf if math.isnan(e) else e
