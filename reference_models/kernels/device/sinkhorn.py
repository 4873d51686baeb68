"""Sinkhorn-Knopp in registers: exact forward and backward, without history in device memory.

M⁽⁰⁾ = exp(logits), M⁽ᵗ⁾ = rows(columns(M⁽ᵗ⁻¹⁾)), 20 times (arXiv 2512.24880 eq. 9). A map is 16
numbers, so all iterations run in registers and only logits and result touch memory.
"""

# Kernel bodies are Triton code: tuples grow by concatenation, and arguments are pointers.
# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment"

import triton
import triton.language as tl

from geodiag.reference_models.kernels.device.math import exp, inverse

# T tokens, N streams; a tile is (BT, N, N)


@triton.jit
def half_step(m, eps, AXIS: tl.constexpr):
    """Divide by the sums along AXIS, and return the divisors too."""
    d = tl.sum(m, AXIS) + eps
    return m * tl.expand_dims(inverse(d), AXIS), d


@triton.jit
def softmax(logits, AXIS: tl.constexpr):
    """exp and the first normalisation in one: large logits cannot overflow."""
    m = exp(logits - tl.expand_dims(tl.max(logits, AXIS), AXIS))
    return m * tl.expand_dims(inverse(tl.sum(m, AXIS)), AXIS)


@triton.jit
def project(logits, eps, ITERATIONS: tl.constexpr, ROWS_FIRST: tl.constexpr):
    """`reference.sinkhorn` of one tile (BT, N, N)."""
    FIRST: tl.constexpr = 2 if ROWS_FIRST else 1
    m = softmax(logits, FIRST) + eps
    m, _ = half_step(m, eps, 3 - FIRST)
    for _ in range(ITERATIONS - 1):
        m, _ = half_step(m, eps, FIRST)
        m, _ = half_step(m, eps, 3 - FIRST)
    return m


@triton.jit
def half_step_vjp(m, gm, d, AXIS: tl.constexpr):
    """Undo one half step: return the matrix before it, and (gradient × matrix) before it."""
    return m * tl.expand_dims(d, AXIS), gm - m * tl.expand_dims(tl.sum(gm, AXIS), AXIS)


@triton.jit
def project_vjp(logits, g, eps, ITERATIONS: tl.constexpr, ROWS_FIRST: tl.constexpr):
    """Gradient of `project` with respect to the logits.

    Each iterate is a diagonal scaling of the next one. The 2·ITERATIONS divisors (N numbers each)
    are therefore enough to run the history backwards from the final matrix; unrolled, they stay in
    registers. The loop carries gm = gradient × matrix, for which half a step needs no division:
    m' = m / d gives gm = gm' − m' Σ gm'.
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
def sinkhorn_fwd(
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
def sinkhorn_bwd(
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
