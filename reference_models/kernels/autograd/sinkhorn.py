"""Sinkhorn-Knopp as an operation of torch: one kernel forward, one backward."""

# mypy: allow-untyped-defs

import torch
from torch import Tensor

from geodiag.reference_models.kernels.autograd.launch import STREAMS, cdiv
from geodiag.reference_models.kernels.autograd.operation import operation
from geodiag.reference_models.kernels.device.sinkhorn import sinkhorn_bwd, sinkhorn_fwd

# T tokens, N streams


def _launch(
    logits: Tensor, iterations: int, order: str
) -> tuple[tuple[int], int, dict[str, int | bool]]:
    n = logits.shape[-1]
    tokens = logits.numel() // (n * n)
    # One warp a program, a quarter warp a token at N = 4: as many programs as the GPU can hold.
    block = max(2048 // (n * n * 8), 1) if logits.is_cuda else 64
    meta = {"ITERATIONS": iterations, "ROWS_FIRST": order == "rows-first", "N": n, "BT": block}
    return (cdiv(tokens, block),), tokens, meta


def _forward(logits: Tensor, iterations: int, eps: float, order: str) -> Tensor:
    out = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
    grid, tokens, meta = _launch(logits, iterations, order)
    if tokens:
        sinkhorn_fwd[grid](logits, out, tokens, eps, **meta, num_warps=1)
    return out


def _backward(logits: Tensor, grad: Tensor, iterations: int, eps: float, order: str) -> Tensor:
    out = torch.empty_like(logits)
    grid, tokens, meta = _launch(logits, iterations, order)
    if tokens:
        sinkhorn_bwd[grid](logits, grad.contiguous(), out, tokens, eps, **meta, num_warps=1)
    return out


def _fake(logits, iterations, eps, order):
    return torch.empty(logits.shape, dtype=torch.float32, device=logits.device)


def _fake_backward(logits, grad, iterations, eps, order):
    return torch.empty_like(logits)


def _keep(ctx, inputs, output):
    logits, *ctx.rest = inputs
    ctx.save_for_backward(logits)


def _grad(ctx, grad):
    return _sinkhorn_backward(*ctx.saved_tensors, grad, *ctx.rest), None, None, None


_sinkhorn_backward = operation("sinkhorn_backward", _backward, _fake_backward)
_sinkhorn = operation("sinkhorn", _forward, _fake, _keep, _grad)


def check_sinkhorn(iterations: int, order: str) -> None:
    """Raise ValueError for a number of iterations or an order that does not exist."""
    if iterations < 1:
        raise ValueError(f"iterations is at least 1, not {iterations}")
    if order not in ("columns-first", "rows-first"):
        raise ValueError(f"order is 'columns-first' or 'rows-first', not {order!r}")


def sinkhorn(
    logits_TNN: Tensor, iterations: int = 20, eps: float = 0.0, order: str = "columns-first"
) -> Tensor:
    """`reference.sinkhorn` by Triton: one kernel forward, one backward.

    With eps = 0, a row or column whose logits are all 87 below the others' is NaN on a GPU, because
    e⁻⁸⁷ is the smallest normal float32.
    """
    check_sinkhorn(iterations, order)
    if logits_TNN.shape[-1] not in STREAMS or logits_TNN.shape[-1] != logits_TNN.shape[-2]:
        raise ValueError(
            f"logits are (…, N, N) with N one of {STREAMS}, not {tuple(logits_TNN.shape)}"
        )
    return _sinkhorn(logits_TNN.contiguous(), iterations, eps, order)
