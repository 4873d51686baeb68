"""Muon for matrices stacked along a first dimension; torch's own takes two dimensions only."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer

_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalize(grad_ERC: Tensor, iterations: int = 5, eps: float = 1e-7) -> Tensor:
    """Return the nearest semi-orthogonal matrix of each matrix, approximately.

    Newton-Schulz: X ← aX + (bA + cA²)X with A = XXᵀ, five times (arXiv 2502.16982).
    """
    a, b, c = _NEWTON_SCHULZ
    x = grad_ERC.bfloat16() if grad_ERC.is_cuda else grad_ERC
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=eps)
    for _ in range(iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(grad_ERC.dtype)


class StackedMuon(Optimizer):
    """Nesterov momentum, orthogonalised for each matrix (arXiv 2502.16982).

    The update is scaled by 0.2·√max(rows, columns), to the RMS of AdamW's.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 1e-3,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p.grad)
                m = state["momentum"]
                m.lerp_(p.grad, 1 - group["momentum"])
                update = orthogonalize(p.grad.lerp(m, group["momentum"]))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * 0.2 * max(p.shape[-2:]) ** 0.5)
        return loss
