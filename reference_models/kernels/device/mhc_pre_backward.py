"""Backward of `mhc_pre` on the device, per token: the gradient of the coefficients.

∂L/∂pre needs all channels of a token (`inner_to_pre`), Sinkhorn's backward needs the whole map
(`coefficients`), and only then can dx start (`mhc_pre_dx_dphi`). `add_up` ends the reductions over
tokens in a fixed order, so that gradients repeat bit for bit.
"""

# Kernel bodies are Triton code: tuples grow by concatenation, and arguments are pointers.
# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment"

import triton
import triton.language as tl

from geodiag.reference_models.kernels.device.math import sigmoid
from geodiag.reference_models.kernels.device.sinkhorn import project_vjp

# T tokens, N streams, C channels, K = N² + 2N coefficients, KP their padded number, P partial sums


@triton.jit
def inner_to_pre(
    x_ptr,
    d_inner_ptr,
    d_pre_ptr,
    N: tl.constexpr,
    C: tl.constexpr,
    BL: tl.constexpr,
    VEC: tl.constexpr,
):
    """∂L/∂pre_n = Σ_c d_inner_c · x_nc of one token.

    One warp serves a token: its lanes exchange their sums once, after the last channel.
    """
    t = tl.program_id(0).to(tl.int64)
    sums = ()
    for _ in tl.static_range(N):
        sums = sums + (tl.zeros((BL,), tl.float32),)
    for c0 in range(0, C, BL * VEC):
        # Each lane sums its own 16 bytes; lanes exchange their sums after the loop.
        c = c0 + (tl.arange(0, BL) * VEC)[:, None] + tl.arange(0, VEC)[None, :]
        d = tl.load(d_inner_ptr + t * C + c, c < C, 0.0).to(tl.float32)
        added = ()
        for j in tl.static_range(N):
            x = tl.load(x_ptr + (t * N + j) * C + c, c < C, 0.0).to(tl.float32)
            added = added + (sums[j] + tl.sum(d * x, 1),)
        sums = added
    for j in tl.static_range(N):
        tl.store(d_pre_ptr + t * N + j, tl.sum(sums[j], 0))


@triton.jit(do_not_specialize=["T"])
def coefficients(
    alpha_ptr,
    bias_ptr,
    h_ptr,
    rms_ptr,
    inner_d_pre_ptr,
    d_pre_ptr,
    d_post_ptr,
    d_res_ptr,
    d_logits_ptr,
    pre_ptr,
    res_ptr,
    coef_ptr,
    scalars_ptr,
    small_ptr,
    T,
    eps,
    ITERATIONS: tl.constexpr,
    ROWS_FIRST: tl.constexpr,
    N: tl.constexpr,
    C: tl.constexpr,
    KP: tl.constexpr,
    S: tl.constexpr,
    BT: tl.constexpr,
):
    """The chain rule from gates and map back to the projections, BT tokens a program.

    coef[t] = [∂L/∂(x·φ) | 0 …] and scalars[t] = [2·∂L/∂(Σx²), 0 | pre | H_resᵀ] are all that dx
    needs of a token; small[p] is this program's share of ∂L/∂bias and ∂L/∂α.

    With σ' = σ(1 − σ): dh_pre = α d_pre σ', dh_post = 2α d_post σ', and dh_res is α times
    Sinkhorn's backward (arXiv 2512.24880 eq. 8, differentiated).
    """
    K: tl.constexpr = N * N + 2 * N
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    n = tl.arange(0, N)
    live = t < T
    live_TN = tl.broadcast_to(live[:, None], (BT, N))
    live_TNN = tl.broadcast_to(live[:, None, None], (BT, N, N))
    tn = t[:, None] * N + n[None, :]
    tnn = tn[:, :, None] * N + n[None, None, :]
    nn = 2 * N + n[None, :, None] * N + n[None, None, :]

    scalars = scalars_ptr + t * 2 * S
    tl.store(scalars[:, None] + 2 + n[None, :], tl.load(pre_ptr + tn, live_TN, 0.0), live_TN)
    if res_ptr is not None:
        transposed = 2 + N + N % 2 + n[None, None, :] * N + n[None, :, None]
        tl.store(
            scalars[:, None, None] + transposed, tl.load(res_ptr + tnn, live_TNN, 0.0), live_TNN
        )

    d_pre = tl.zeros((BT, N), tl.float32)
    if inner_d_pre_ptr is not None:
        d_pre += tl.load(inner_d_pre_ptr + tn, live_TN, 0.0)
    if d_pre_ptr is not None:
        d_pre += tl.load(d_pre_ptr + tn, live_TN, 0.0)
    d_post = tl.zeros((BT, N), tl.float32)
    if d_post_ptr is not None:
        d_post += tl.load(d_post_ptr + tn, live_TN, 0.0)

    h = h_ptr + t * K
    h_pre = tl.load(h[:, None] + n[None, :], live_TN, 0.0)
    h_post = tl.load(h[:, None] + N + n[None, :], live_TN, 0.0)
    h_res = tl.load(h[:, None, None] + nn, live_TNN, 0.0)
    rms = tl.load(rms_ptr + t, live, 1.0)
    a_pre, a_post, a_res = tl.load(alpha_ptr), tl.load(alpha_ptr + 1), tl.load(alpha_ptr + 2)

    gate = sigmoid(a_pre * h_pre + tl.load(bias_ptr + n)[None, :])
    d_pre = d_pre * gate * (1 - gate)
    gate = sigmoid(a_post * h_post + tl.load(bias_ptr + N + n)[None, :])
    d_post = d_post * 2 * gate * (1 - gate)
    logits = a_res * h_res + tl.load(bias_ptr + nn)
    d_res = tl.zeros((BT, N, N), tl.float32)
    if d_res_ptr is not None:
        d_res = project_vjp(
            logits, tl.load(d_res_ptr + tnn, live_TNN, 0.0), eps, ITERATIONS, ROWS_FIRST
        )
    if d_logits_ptr is not None:
        d_res += tl.load(d_logits_ptr + tnn, live_TNN, 0.0)

    small = small_ptr + tl.program_id(0) * 2 * KP
    tl.store(small + n, tl.sum(d_pre, 0))
    tl.store(small + N + n, tl.sum(d_post, 0))
    tl.store(small + tl.sum(nn, 0), tl.sum(d_res, 0))
    small += KP
    tl.store(small + n, tl.sum(d_pre * h_pre, 0))
    tl.store(small + N + n, tl.sum(d_post * h_post, 0))
    tl.store(small + tl.sum(nn, 0), tl.sum(d_res * h_res, 0))

    d_pre *= a_pre
    d_post *= a_post
    d_res *= a_res
    # h = u·rms with rms = (Σx²/W + e)^(-1/2): the norm's gradient along x is -(Σ dh·h)·rms²/W.
    along = (
        tl.sum(d_pre * h_pre, 1) + tl.sum(d_post * h_post, 1) + tl.sum(tl.sum(d_res * h_res, 2), 1)
    )
    along *= -rms * rms / (N * C)
    coef = coef_ptr + t * KP
    tl.store(coef[:, None] + n[None, :], d_pre * rms[:, None], live_TN)
    tl.store(coef[:, None] + N + n[None, :], d_post * rms[:, None], live_TN)
    tl.store(coef[:, None, None] + nn, d_res * rms[:, None, None], live_TNN)
    k = tl.arange(0, KP)
    tl.store(
        coef[:, None] + k[None, :],
        tl.zeros((BT, KP), tl.float32),
        live[:, None] & (k >= K)[None, :],
    )
    tl.store(scalars, along, live)


@triton.jit(do_not_specialize=["SIZE", "P", "Q"])
def add_up(
    dphi_part_ptr,
    small_ptr,
    dphi_ptr,
    dalpha_ptr,
    dbias_ptr,
    SIZE,
    P,
    Q,
    N: tl.constexpr,
    KP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add partial sums in a fixed order: no atomics, so gradients repeat bit for bit.

    All programs but two add dφ over P chunks; the last two add dα and dbias over Q programs.
    """
    pid = tl.program_id(0)
    last = tl.num_programs(0) - 1
    if pid < last - 1:
        i = pid * BLOCK + tl.arange(0, BLOCK)
        total = tl.zeros((BLOCK,), tl.float32)
        part = dphi_part_ptr + i
        for _ in range(P):
            total += tl.load(part, i < SIZE, 0.0)
            part += SIZE
        tl.store(dphi_ptr + i, total, i < SIZE)
    else:
        K: tl.constexpr = N * N + 2 * N
        ROWS: tl.constexpr = 8192 // KP
        k = tl.arange(0, KP)
        wants_alpha = last - pid == 0
        sums = tl.zeros((ROWS, KP), tl.float32)
        row = (
            small_ptr
            + wants_alpha.to(tl.int32) * KP
            + tl.arange(0, ROWS)[:, None] * 2 * KP
            + k[None, :]
        )
        for q0 in range(0, Q, ROWS):
            inside = (q0 + tl.arange(0, ROWS) < Q)[:, None] & (k < K)[None, :]
            sums += tl.load(row + q0 * 2 * KP, inside, 0.0)
        along = tl.sum(sums, 0)
        if wants_alpha:
            tl.store(dalpha_ptr, tl.sum(tl.where(k < N, along, 0.0), 0))
            tl.store(dalpha_ptr + 1, tl.sum(tl.where((k >= N) & (k < 2 * N), along, 0.0), 0))
            tl.store(dalpha_ptr + 2, tl.sum(tl.where(k >= 2 * N, along, 0.0), 0))
        else:
            tl.store(dbias_ptr + k, along, k < K)
