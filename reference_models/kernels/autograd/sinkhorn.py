"""Sinkhorn-Knopp in registers: exact forward and backward, no history in device memory."""

# Bodies of kernels are Triton's language: tuples grow, arguments are pointers.
# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment"

import torch
import triton
import triton.language as tl
from torch import Tensor

from geodiag.reference_models.kernels.autograd.launch import STREAMS, cdiv
from geodiag.reference_models.kernels.autograd.operation import operation
from geodiag.reference_models.kernels.device.math import exp, inverse

# T tokens, N streams; a tile is (BT, N, N)


@triton.jit
def half_step(m, eps, AXIS: tl.constexpr):
    """One side normalised, and what it was divided by."""
    d = tl.sum(m, AXIS) + eps
    return m * tl.expand_dims(inverse(d), AXIS), d


@triton.jit
def softmax(logits, AXIS: tl.constexpr):
    m = exp(logits - tl.expand_dims(tl.max(logits, AXIS), AXIS))
    return m * tl.expand_dims(inverse(tl.sum(m, AXIS)), AXIS)


@triton.jit
def project(logits, eps, ITERATIONS: tl.constexpr, ROWS_FIRST: tl.constexpr):
    """`reference.sinkhorn` of one tile."""
    FIRST: tl.constexpr = 2 if ROWS_FIRST else 1
    m = softmax(logits, FIRST) + eps
    m, _ = half_step(m, eps, 3 - FIRST)
    for _ in range(ITERATIONS - 1):
        m, _ = half_step(m, eps, FIRST)
        m, _ = half_step(m, eps, 3 - FIRST)
    return m


@triton.jit
def half_step_vjp(m, gm, d, AXIS: tl.constexpr):
    """Undoes one half step, from the divisor that was kept: the matrix before it, and its gradient
    times it.
    """
    return m * tl.expand_dims(d, AXIS), gm - m * tl.expand_dims(tl.sum(gm, AXIS), AXIS)


@triton.jit
def project_vjp(logits, g, eps, ITERATIONS: tl.constexpr, ROWS_FIRST: tl.constexpr):
    """Gradient of `project` with respect to the logits.

    Every iterate is a diagonal scaling of the next, so the 2·ITERATIONS divisors (N numbers each)
    replay the whole history backwards from the final matrix. Unrolled, they live in registers. What
    is carried is not the gradient but its product with the matrix, element by element, for which a
    half step has no division.
    """
    FIRST: tl.constexpr = 2 if ROWS_FIRST else 1
    p = softmax(logits, FIRST)
    m, d = half_step(p + eps, eps, 3 - FIRST)
    divisors = (d,)
    for _ in tl.static_range(ITERATIONS - 1):
        m, first = half_step(m, eps, FIRST)
        m, second = half_step(m, eps, 3 - FIRST)
        divisors = divisors + (first, second)
    gm = g * m
    for i in tl.static_range(ITERATIONS - 1):
        m, gm = half_step_vjp(m, gm, divisors[2 * (ITERATIONS - 1 - i)], 3 - FIRST)
        m, gm = half_step_vjp(m, gm, divisors[2 * (ITERATIONS - 1 - i) - 1], FIRST)
    m, gm = half_step_vjp(m, gm, divisors[0], 3 - FIRST)
    if eps != 0:
        gm *= p * inverse(p + eps)
    return gm - p * tl.expand_dims(tl.sum(gm, FIRST), FIRST)


@triton.jit
def _tile(T, N: tl.constexpr, BT: tl.constexpr):
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    n = tl.arange(0, N)
    offsets = (t[:, None] * N + n[None, :])[:, :, None] * N + n[None, None, :]
    return offsets, tl.broadcast_to((t < T)[:, None, None], (BT, N, N))


@triton.jit(do_not_specialize=["T"])
def _sinkhorn_fwd(
    logits_ptr,
    out_ptr,
    T,
    eps,
    ITERATIONS: tl.constexpr,
    ROWS_FIRST: tl.constexpr,
    N: tl.constexpr,
    BT: tl.constexpr,
):
    offsets, live = _tile(T, N, BT)
    logits = tl.load(logits_ptr + offsets, live, 0.0).to(tl.float32)
    tl.store(out_ptr + offsets, project(logits, eps, ITERATIONS, ROWS_FIRST), live)


@triton.jit(do_not_specialize=["T"])
def _sinkhorn_bwd(
    logits_ptr,
    grad_ptr,
    out_ptr,
    T,
    eps,
    ITERATIONS: tl.constexpr,
    ROWS_FIRST: tl.constexpr,
    N: tl.constexpr,
    BT: tl.constexpr,
):
    offsets, live = _tile(T, N, BT)
    logits = tl.load(logits_ptr + offsets, live, 0.0).to(tl.float32)
    grad = tl.load(grad_ptr + offsets, live, 0.0).to(tl.float32)
    tl.store(out_ptr + offsets, project_vjp(logits, grad, eps, ITERATIONS, ROWS_FIRST), live)


def _launch(
    logits: Tensor, iterations: int, order: str
) -> tuple[tuple[int], int, dict[str, int | bool]]:
    n = logits.shape[-1]
    tokens = logits.numel() // (n * n)
    # One warp a program, a token a quarter warp at N = 4: as many programs as the chip can hold.
    block = max(2048 // (n * n * 8), 1) if logits.is_cuda else 64
    meta = {"ITERATIONS": iterations, "ROWS_FIRST": order == "rows-first", "N": n, "BT": block}
    return (cdiv(tokens, block),), tokens, meta


def _forward(logits: Tensor, iterations: int, eps: float, order: str) -> Tensor:
    out = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
    grid, tokens, meta = _launch(logits, iterations, order)
    if tokens:
        _sinkhorn_fwd[grid](logits, out, tokens, eps, **meta, num_warps=1)
    return out


def _backward(logits: Tensor, grad: Tensor, iterations: int, eps: float, order: str) -> Tensor:
    out = torch.empty_like(logits)
    grid, tokens, meta = _launch(logits, iterations, order)
    if tokens:
        _sinkhorn_bwd[grid](logits, grad.contiguous(), out, tokens, eps, **meta, num_warps=1)
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
    if iterations < 1:
        raise ValueError(f"iterations is at least 1, not {iterations}")
    if order not in ("columns-first", "rows-first"):
        raise ValueError(f"order is 'columns-first' or 'rows-first', not {order!r}")


def sinkhorn(
    logits_TNN: Tensor, iterations: int = 20, eps: float = 0.0, order: str = "columns-first"
) -> Tensor:
    """`reference.sinkhorn` in one kernel each way.

    With eps = 0 a row or column whose logits are all 87 below the others' is NaN: float32 ends
    there, on a GPU.
    """
    check_sinkhorn(iterations, order)
    if logits_TNN.shape[-1] not in STREAMS or logits_TNN.shape[-1] != logits_TNN.shape[-2]:
        raise ValueError(
            f"logits are (…, N, N) with N one of {STREAMS}, not {tuple(logits_TNN.shape)}"
        )
    return _sinkhorn(logits_TNN.contiguous(), iterations, eps, order)
