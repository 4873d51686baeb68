"""Attention logits of transformers' DeepSeek-V4, recomputed for sampled queries in a probe."""

from typing import Any

import torch
from torch import Tensor

from geodiag.hooks.adapters.base import AttentionSite
from geodiag.hooks.adapters.module_hooks import on_input, sampled_queries

# B sequences, S positions, H heads, Q sampled queries, K keys, D head dim, C channels,
# R rotated pairs


def attention_site(layer: int, attention: Any) -> AttentionSite:
    """Return the attention of one layer.

    The keys are also the values, with one head for all queries. Compressed entries of the distant
    past follow the keys of the window.
    """
    return AttentionSite(
        layer=layer,
        watch_logits=on_input(
            attention, lambda args, kwargs: _largest_logit(attention, args, kwargs)
        ),
    )


def _largest_logit(attention: Any, args: tuple, kwargs: dict) -> Tensor:
    x_BSC = args[0] if args else kwargs["hidden_states"]
    cos_BSR, sin_BSR = kwargs["position_embeddings"][attention.rope_layer_type]
    at = sampled_queries(x_BSC.shape[1], x_BSC.device)

    low_rank = attention.q_a_norm(attention.q_a_proj(x_BSC))
    q_BQHD = attention.q_b_proj(low_rank[:, at]).unflatten(-1, (-1, attention.head_dim))
    q_BHQD = attention.q_b_norm(q_BQHD.transpose(1, 2))
    q_BHQD = _rotated(q_BHQD, cos_BSR[:, at], sin_BSR[:, at])
    k_B1KD = attention.kv_norm(attention.kv_proj(x_BSC)).unsqueeze(1)
    k_B1KD = _rotated(k_B1KD, cos_BSR, sin_BSR)

    window_mask = kwargs["attention_mask"]
    compressed_mask = None
    if attention.compressor is not None:
        # No cache, even if the training has one: a probe starts at the first token and must not
        # leave entries in a cache.
        compressed, compressed_mask = attention.compressor(
            x_BSC, low_rank, kwargs["position_ids"], None, attention.layer_idx
        )
        k_B1KD = torch.cat([k_B1KD, compressed], 2)

    logits_BHQK = q_BHQD.float() @ k_B1KD.float().mT * attention.scaling
    if window_mask is not None:
        logits_BHQK[..., : window_mask.shape[-1]] += window_mask[..., at, :]
    if compressed_mask is not None:
        logits_BHQK[..., -compressed_mask.shape[-1] :] += compressed_mask[..., at, :]
    return logits_BHQK.amax()


def _rotated(x_BHSD: Tensor, cos_BSR: Tensor, sin_BSR: Tensor) -> Tensor:
    """Rotate the last 2R channels of every head, pair by pair, by their position's angles."""
    pairs = 2 * cos_BSR.shape[-1]
    a, b = x_BHSD[..., -pairs:].float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos_BSR.unsqueeze(1), sin_BSR.unsqueeze(1)
    rotated = torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)
    return torch.cat([x_BHSD[..., :-pairs], rotated.to(x_BHSD.dtype)], -1)
