"""Tear: the jump that another choice of experts makes in the block's output, at the same input."""

from typing import NamedTuple

import torch
from torch import Tensor

from geodiag.hooks.adapters.base import ExpertSite
from geodiag.hooks.probes.expert_block import expert_block

# T tokens, M picked tokens, C channels, E experts

TOKENS = 64
"""Flipped tokens of a layer at most that are worked out; the others are taken to be like them."""
_SEED = 11


class FlippedTokens(NamedTuple):
    """What is kept of one router's flipped tokens until the forward is over."""

    hidden_MC: Tensor
    now_ME: Tensor
    then_ME: Tensor
    flipped_M: Tensor
    """Which of the picked tokens really flipped: there may be fewer than places."""
    share: Tensor
    """Of all tokens, those that flipped."""


def pick_flipped(flipped_T: Tensor) -> Tensor:
    """`TOKENS` tokens, flipped ones first, a fixed random choice among them; nothing is read on the
    host.
    """
    generator = torch.Generator(flipped_T.device).manual_seed(_SEED)
    lot_T = torch.rand(len(flipped_T), generator=generator, device=flipped_T.device)
    return (flipped_T.float() + 0.5 * lot_T).topk(min(TOKENS, len(flipped_T))).indices


@torch.no_grad()
def tear(site: ExpertSite, torn: FlippedTokens) -> tuple[Tensor, Tensor]:
    """Mean of ‖F(x; A) − F(x; A_then)‖ / ‖F(x; A)‖ over all tokens (0 where A stayed), and over the
    flipped ones.

    Without a flip the second is NaN: there is nothing to say.
    """
    now, then = expert_block(site, torn.hidden_MC, torch.stack([torn.now_ME, torn.then_ME]))
    jump_M = (now - then).norm(dim=-1) / now.norm(dim=-1)
    count = torn.flipped_M.sum()
    flipped = torch.where(torn.flipped_M, jump_M, 0.0).sum() / count
    return torch.where(count > 0, flipped * torn.share, 0.0), flipped
