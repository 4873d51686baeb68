"""Sinkhorn-Knopp in plain torch, with its own backward."""

from typing import Any

import torch
from torch import Tensor

# T tokens (any leading shape), N streams


def coefficient_dtype(x: Tensor) -> torch.dtype:
    """Return the type of coefficients: float32, or float64 for float64 streams."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def sinkhorn(
    logits_TNN: Tensor, iterations: int = 20, eps: float = 0.0, order: str = "columns-first"
) -> Tensor:
    """Project exp(logits) towards the doubly stochastic matrices by Sinkhorn-Knopp.

    M⁽⁰⁾ = exp(logits), M⁽ᵗ⁾ = rows(columns(M⁽ᵗ⁻¹⁾)) (arXiv 2512.24880 eq. 9). The side that comes
    last sums to 1 exactly, the other up to the truncation error. The first normalisation is a
    softmax, so that large logits cannot overflow.
    """
    # Tokens last: every step of the iteration then runs over contiguous memory.
    logits_NNT = logits_TNN.flatten(0, -3).permute(1, 2, 0).contiguous()
    m_NNT = _Sinkhorn.apply(
        logits_NNT.to(coefficient_dtype(logits_NNT)),
        iterations,
        eps,
        0 if order == "columns-first" else 1,
    )
    return m_NNT.permute(2, 0, 1).reshape(logits_TNN.shape).contiguous()


class _Sinkhorn(torch.autograd.Function):
    """The iterations and their derivative, step by step.

    For m' = m / s with s = Σm + ε, dm = (dm' − Σ dm'·m') / s. Autograd computes the same in three
    times as many passes.
    """

    @staticmethod
    def forward(ctx: Any, logits_NNT: Tensor, iterations: int, eps: float, first: int) -> Tensor:
        start = torch.softmax(logits_NNT, dim=first)
        m = start + eps
        history = [start]
        ctx.sides = [1 - first] + [first, 1 - first] * (iterations - 1)
        for side in ctx.sides:
            total = m.sum(side, keepdim=True) + eps
            m = m / total
            history += [m, total]
        ctx.first = first
        ctx.save_for_backward(*history)
        return m

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        start, *history = ctx.saved_tensors
        for side, m, total in zip(reversed(ctx.sides), history[-2::-2], history[::-2], strict=True):
            grad = (grad - (grad * m).sum(side, keepdim=True)) / total
        grad = start * (grad - (grad * start).sum(ctx.first, keepdim=True))
        return grad, None, None, None
