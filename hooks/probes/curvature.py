"""Curvature: the second-order part of an expert block's response to a small change of its input."""

import torch
from torch import Tensor

from geodiag.hooks.adapters.base import ExpertSite
from geodiag.hooks.probes.expert_block import expert_block

# T tokens, C channels, E experts

EPSILON = 1e-2
"""Length of the change, relative to the token's norm."""
_SEED = 7


def directions(tokens: int, channels: int, device: torch.device) -> Tensor:
    """Return a random unit vector for each token, (T, C): the same vectors in every call."""
    generator = torch.Generator(device).manual_seed(_SEED)
    drawn = torch.randn(tokens, channels, generator=generator, device=device)
    return torch.nn.functional.normalize(drawn, dim=-1)


@torch.no_grad()
def curvature(site: ExpertSite, x_TC: Tensor, gates_TE: Tensor, v_TC: Tensor) -> Tensor:
    """Return each token's curvature (T), with its experts and gate weights held fixed.

    ‖f(x+εv) − 2f(x) + f(x−εv)‖ / ‖f(x+εv) − f(x−εv)‖
    """
    # Central differences: the numerator is ε²‖f''(v, v)‖, the denominator 2ε‖f'(v)‖, up to higher
    # orders. The ratio is 0 for a linear block; large values mean that a first-order step, such as
    # the optimizer's, overshoots.
    x = x_TC.to(torch.promote_types(x_TC.dtype, torch.float32))
    step = EPSILON * x.norm(dim=-1, keepdim=True) * v_TC.to(x)
    inputs = torch.cat([x + step, x, x - step])
    forward, center, backward = expert_block(site, inputs, gates_TE.repeat(3, 1)[None])[0].chunk(3)
    second_order = (forward - 2 * center + backward).norm(dim=-1)
    first_order = (forward - backward).norm(dim=-1)
    return second_order / first_order
