"""Causal attention: RMS-normed queries and keys, rotary positions, torch's fused attention."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geodiag.reference_models.config import ModelConfig
from geodiag.reference_models.norm import RMSNorm

# B sequences, S positions, H heads, D head dim, C channels


def rotary_table(positions: int, head_dim: int, theta: float) -> Tensor:
    """Return cos and sin of each position's rotation: (2, positions, head_dim/2), float32."""
    speed = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angle = torch.outer(torch.arange(positions, dtype=torch.float32), speed)
    return torch.stack([angle.cos(), angle.sin()])


def rotate(x_BSHD: Tensor, table_2SD: Tensor) -> Tensor:
    """Rotate the two halves of every head by the position's angles (arXiv 2104.09864)."""
    # Angles stay float32: their bfloat16 rounding is larger than the step between two positions.
    cos, sin = table_2SD[:, : x_BSHD.shape[1], None, :]
    a, b = x_BSHD.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1).to(x_BSHD.dtype)


class Attention(nn.Module):
    """Causal self-attention of (B, S, C)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.head_dim = config.heads, config.head_dim
        width = config.heads * config.head_dim
        self.qkv = nn.Linear(config.channels, 3 * width, bias=False)
        self.out = nn.Linear(width, config.channels, bias=False)
        self.q_norm = RMSNorm(config.head_dim, eps=config.norm_eps)
        self.k_norm = RMSNorm(config.head_dim, eps=config.norm_eps)

    def forward(self, x_BSC: Tensor, rotary: Tensor) -> Tensor:
        q, k, v = self.qkv(x_BSC).unflatten(-1, (3, self.heads, self.head_dim)).unbind(-3)
        q, k = rotate(self.q_norm(q), rotary), rotate(self.k_norm(k), rotary)
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True
        )
        return self.out(y.transpose(1, 2).flatten(-2))
