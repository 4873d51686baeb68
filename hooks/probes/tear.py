"""Tear: the jump of the expert block's output when only the choice of experts changes."""

from typing import NamedTuple

import torch
from torch import Tensor

from geodiag.hooks.adapters.base import ExpertSite
from geodiag.hooks.probes.expert_block import expert_block

# T tokens, M picked tokens, C channels, E experts

TOKENS = 64
"""Maximal number of flipped tokens per layer that are computed.

The mean over all flipped tokens is estimated from them.
"""
_SEED = 11


class FlippedTokens(NamedTuple):
    """One router's picked tokens, kept until the forward is over."""

    hidden_MC: Tensor
    now_ME: Tensor
    """Gate weights of today's choice."""
    then_ME: Tensor
    """Today's gate weights at the choice of the probe before."""
    flipped_M: Tensor
    """Which of the picked tokens have flipped: there may be fewer flips than picked tokens."""
    share: Tensor
    """Share of all tokens that have flipped."""


def pick_flipped(flipped_T: Tensor) -> Tensor:
    """Return the indices of `TOKENS` tokens: flipped ones first, in a fixed random order.

    Nothing is read on the host, so the number of picked tokens cannot depend on the flips.
    """
    generator = torch.Generator(flipped_T.device).manual_seed(_SEED)
    lot_T = torch.rand(len(flipped_T), generator=generator, device=flipped_T.device)
    return (flipped_T.float() + 0.5 * lot_T).topk(min(TOKENS, len(flipped_T))).indices


@torch.no_grad()
def tear(site: ExpertSite, tokens: FlippedTokens) -> tuple[Tensor, Tensor]:
    """Return the mean relative jump over all tokens, and over the flipped tokens.

    Without a flip the second value is NaN.
    """
    # The manifold is torn where the block's output jumps although its input does not:
    # ‖F(x; A) − F(x; A_then)‖ / ‖F(x; A)‖, which is 0 for a token whose choice A has not changed.
    choices = torch.stack([tokens.now_ME, tokens.then_ME])
    now_MC, then_MC = expert_block(site, tokens.hidden_MC, choices)
    jump_M = (now_MC - then_MC).norm(dim=-1) / now_MC.norm(dim=-1)

    count = tokens.flipped_M.sum()
    over_flipped = torch.where(tokens.flipped_M, jump_M, 0.0).sum() / count
    over_all = torch.where(count > 0, over_flipped * tokens.share, 0.0)
    return over_all, over_flipped
