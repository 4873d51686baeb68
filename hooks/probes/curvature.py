"""Curvature: how much of the expert block's answer to a small change is of second order."""

import torch
from torch import Tensor

from geodiag.hooks.adapters.base import ExpertSite
from geodiag.hooks.probes.expert_block import expert_block

# T tokens, C channels, E experts

EPSILON = 1e-2
"""Length of the change, as a share of the token's norm."""
_SEED = 7


def directions(tokens: int, channels: int, device: torch.device) -> Tensor:
    """A random unit vector for each token, (T, C): the same ones every time."""
    generator = torch.Generator(device).manual_seed(_SEED)
    drawn = torch.randn(tokens, channels, generator=generator, device=device)
    return torch.nn.functional.normalize(drawn, dim=-1)


@torch.no_grad()
def curvature(site: ExpertSite, x_TC: Tensor, gates_TE: Tensor, v_TC: Tensor) -> Tensor:
    """Each token's ‖f(x+εv) − 2f(x) + f(x−εv)‖ / ‖f(x+εv) − f(x−εv)‖, its experts and gate weights
    held.
    """
    x = x_TC.to(torch.promote_types(x_TC.dtype, torch.float32))
    step = EPSILON * x.norm(dim=-1, keepdim=True) * v_TC.to(x)
    there, here, back = expert_block(
        site, torch.cat([x + step, x, x - step]), gates_TE.repeat(3, 1)[None]
    )[0].chunk(3)
    return (there - 2 * here + back).norm(dim=-1) / (there - back).norm(dim=-1)
