"""Routing in plain torch: affinities, choice and gate weights."""

import torch
import torch.nn.functional as F
from torch import Tensor

from geodiag.reference_models.kernels.reference.results import Routing

# T tokens, C channels, E experts, K experts per token


def router_logits(hidden_TC: Tensor, weight_EC: Tensor) -> Tensor:
    """Return the router's logits in float32: bfloat16 cannot separate neighbouring scores."""
    return hidden_TC.float() @ weight_EC.float().T


def affinity(hidden_TC: Tensor, weight_EC: Tensor) -> Tensor:
    """Return √softplus of the router logits, in float32 (arXiv 2606.19348)."""
    return _affinity(router_logits(hidden_TC, weight_EC))


def _affinity(logits_TE: Tensor) -> Tensor:
    # Below logits of -104 softplus underflows to 0, where the root's gradient would be 0 · ∞ = NaN.
    return F.softplus(logits_TE).clamp_min(torch.finfo(torch.float32).tiny).sqrt()


def route(
    logits_TE: Tensor, bias_E: Tensor, k: int, scale: float, given_TK: Tensor | None = None
) -> Routing:
    """Return affinities, the k best experts by biased score (or the given ones), and weights."""
    scores = _affinity(logits_TE)
    ids = choose(scores, bias_E, k) if given_TK is None else given_TK
    return Routing(scores, ids, weigh(scores, ids, scale), logits_TE)


def choose(scores_TE: Tensor, bias_E: Tensor, k: int) -> Tensor:
    """Return the ids of the k largest biased scores, largest first. The bias affects only the
    choice, not the gate weights (arXiv 2408.15664).
    """
    return (scores_TE.detach() + bias_E).topk(k, dim=-1).indices


def weigh(scores_TE: Tensor, expert_ids_TK: Tensor, scale: float) -> Tensor:
    """Return the gate weights of the chosen experts: their scores, normalised to sum to `scale`."""
    chosen = scores_TE.gather(-1, expert_ids_TK)
    return chosen / (chosen.sum(-1, keepdim=True) + 1e-20) * scale
