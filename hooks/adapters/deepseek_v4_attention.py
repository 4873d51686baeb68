"""Attention logits of transformers' DeepSeek-V4: those of some queries are worked out beside it, at
a probe.
"""

from typing import Any

import torch
from torch import Tensor

from geodiag.hooks.adapters.base import AttentionSite, on_input, sampled_queries

# B sequences, S positions, H heads, Q sampled queries, K keys, D head dim, C channels, R rotated
# pairs


def attention_site(layer: int, attention: Any) -> AttentionSite:
    """Keys are the values too, one head for all; compressed entries of the past follow those of the
    window.
    """

    def largest(args: tuple, kwargs: dict) -> Tensor:
        x_BSC = args[0] if args else kwargs["hidden_states"]
        cos_BSR, sin_BSR = kwargs["position_embeddings"][attention.rope_layer_type]
        at = sampled_queries(x_BSC.shape[1], x_BSC.device)
        low = attention.q_a_norm(attention.q_a_proj(x_BSC))
        q_BHQD = (
            attention.q_b_proj(low[:, at]).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        )
        q_BHQD = _rotated(attention.q_b_norm(q_BHQD), cos_BSR[:, at], sin_BSR[:, at])
        k_B1KD = _rotated(
            attention.kv_norm(attention.kv_proj(x_BSC)).unsqueeze(1), cos_BSR, sin_BSR
        )
        mask, unseen = kwargs["attention_mask"], None
        if attention.compressor is not None:
            # Without a cache, whatever the training has: a probe begins at the first token and
            # leaves nothing behind.
            more, unseen = attention.compressor(
                x_BSC, low, kwargs["position_ids"], None, attention.layer_idx
            )
            k_B1KD = torch.cat([k_B1KD, more], 2)
        logits_BHQK = q_BHQD.float() @ k_B1KD.float().mT * attention.scaling
        if mask is not None:
            logits_BHQK[..., : mask.shape[-1]] += mask[..., at, :]
        if unseen is not None:
            logits_BHQK[..., -unseen.shape[-1] :] += unseen[..., at, :]
        return logits_BHQK.amax()

    return AttentionSite(layer=layer, watch_logits=on_input(attention, largest))


def _rotated(x_BHSD: Tensor, cos_BSR: Tensor, sin_BSR: Tensor) -> Tensor:
    """The last channels of every head, pair by pair, turned by their position's angles."""
    pairs = 2 * cos_BSR.shape[-1]
    a, b = x_BHSD[..., -pairs:].float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos_BSR.unsqueeze(1), sin_BSR.unsqueeze(1)
    turned = torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)
    return torch.cat([x_BHSD[..., :-pairs], turned.to(x_BHSD.dtype)], -1)
