"""What of the backward of `mhc_pre` runs on the device: the coefficients' chain, then dx and dφ
in one pass.
"""

# Bodies of kernels are Triton's language: tuples grow, arguments are pointers.
# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment"

import triton
import triton.language as tl

from geodiag.reference_models.kernels.autograd.sinkhorn import project_vjp
from geodiag.reference_models.kernels.device.math import sigmoid

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
    """∂L/∂pre of one token, Σ_c d_inner·x: one warp, whose lanes meet once at the end."""
    t = tl.program_id(0).to(tl.int64)
    sums = ()
    for _ in tl.static_range(N):
        sums = sums + (tl.zeros((BL,), tl.float32),)
    for c0 in range(0, C, BL * VEC):
        # Sums stay within a thread's own 16 bytes until the loop is over.
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
    """coef[t] = [∂L/∂(x·φ) | 0 …]; scalars[t] = [∂L/∂(Σx²)·2, 0 | pre | resᵀ]: all that dx takes of
    a token.

    small[p] = this program's share of ∂L/∂bias and ∂L/∂alpha·.
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
    # h = u·rms and rms = (Σx²/W + e)^(-1/2): the norm's gradient along x is -(Σ dh·h)·rms²/W.
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


@triton.jit
def tile(ptr, t0, j, c0, t, c, inside, N: tl.constexpr, C: tl.constexpr, TMA: tl.constexpr):
    """Tokens t of stream j, channels c: through a descriptor of (T, N·C), or by addresses."""
    if TMA:
        return ptr.load([t0, j * C + c0])
    else:
        return tl.load(ptr + (t[:, None] * N + j) * C + c[None, :], inside, 0.0)


@triton.jit
def first(pair):
    return (pair & 0xFFFFFFFF).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def second(pair):
    return (pair >> 32).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["T"])
def dx_dphi(
    x_ptr,
    phi_ptr,
    coef_ptr,
    pairs_ptr,
    d_inner_ptr,
    d_next_ptr,
    dx_ptr,
    dphi_ptr,
    T,
    N: tl.constexpr,
    J: tl.constexpr,
    C: tl.constexpr,
    KP: tl.constexpr,
    S: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    WIDE: tl.constexpr,
    TMA: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dx of J streams' block of channels for every so many blocks of tokens, and their share of dφ:
    one read of x.

    dx = coef·φᵀ + along·x + preᵀ d_inner + H_resᵀ d_next. The last three take 2 + 2N numbers a
    token and stream, and each load of a column of them costs as much as a tile's: two float32
    travel as one 64-bit integer.
    """
    K: tl.constexpr = N * N + 2 * N
    W: tl.constexpr = N * C
    # Neighbouring programs are the streams of the same channels: they share d_inner and d_next
    # through the cache.
    j0 = (tl.program_id(0) % (N // J)) * J
    c0 = (tl.program_id(0) // (N // J)) * BC
    c = c0 + tl.arange(0, BC)
    k = tl.arange(0, KP)
    chunk = tl.program_id(1)
    phis = ()
    dphis = ()
    for j in tl.static_range(J):
        offsets = ((j0 + j) * C + c)[:, None] * K + k[None, :]
        phi = tl.load(phi_ptr + offsets, (c < C)[:, None] & (k < K)[None, :], 0.0)
        phis = phis + (phi.to(tl.float32 if WIDE else tl.bfloat16),)
        dphis = dphis + (tl.zeros((BC, KP), tl.float32),)
    for block in tl.range(chunk, tl.cdiv(T, BT), tl.num_programs(1), num_stages=STAGES):
        t0 = block * BT
        t = t0 + tl.arange(0, BT).to(tl.int64)
        live = (t < T)[:, None]
        inside = live & (c < C)[None, :]
        row = pairs_ptr + t[:, None] * S
        if TMA:
            coef = coef_ptr.load([t0, 0])
        else:
            coef = tl.load(coef_ptr + t[:, None] * KP + k[None, :], live, 0.0)
        xs = ()
        for j in tl.static_range(J):
            xs = xs + (tile(x_ptr, t0, j0 + j, c0, t, c, inside, N, C, TMA),)
        if d_inner_ptr is not None:
            d_inner = tile(d_inner_ptr, t0, 0, c0, t, c, inside, 1, C, TMA)
        nexts = ()
        if d_next_ptr is not None:
            for i in tl.static_range(N):
                nexts = nexts + (tile(d_next_ptr, t0, i, c0, t, c, inside, N, C, TMA),)
        along = first(tl.load(row, live, 0))
        pres = ()
        if d_inner_ptr is not None:
            if J == 1:
                pair = tl.load(row + 1 + j0 // 2, live, 0)
                pres = pres + (tl.where(j0 % 2 == 0, first(pair), second(pair)),)
            else:
                for j in tl.static_range(0, J, 2):
                    pair = tl.load(row + 1 + (j0 + j) // 2, live, 0)
                    pres = pres + (first(pair), second(pair))
        added = ()
        for j in tl.static_range(J):
            if WIDE:
                added = added + (
                    tl.dot(
                        tl.trans(xs[j].to(tl.float32)), coef, dphis[j], input_precision="tf32x3"
                    ),
                )
                dx = tl.dot(coef, tl.trans(phis[j]), input_precision="tf32x3")
            else:
                added = added + (tl.dot(tl.trans(xs[j]), coef, dphis[j]),)
                dx = tl.dot(coef, tl.trans(phis[j]))
            dx += along * xs[j].to(tl.float32)
            if d_inner_ptr is not None:
                dx += pres[j] * d_inner.to(tl.float32)
            if d_next_ptr is not None:
                for i in tl.static_range(0, N, 2):
                    pair = tl.load(row + (2 + N + N % 2 + (j0 + j) * N + i) // 2, live, 0)
                    dx += first(pair) * nexts[i].to(tl.float32)
                    if i + 1 < N:
                        dx += second(pair) * nexts[i + 1].to(tl.float32)
            if TMA:
                dx_ptr.store([t0, (j0 + j) * C + c0], dx.to(xs[j].dtype))
            else:
                tl.store(dx_ptr + (t[:, None] * N + j0 + j) * C + c[None, :], dx, inside)
        dphis = added
    for j in tl.static_range(J):
        out = dphi_ptr + chunk.to(tl.int64) * W * K + ((j0 + j) * C + c)[:, None] * K + k[None, :]
        tl.store(out, dphis[j], (c < C)[:, None] & (k < K)[None, :])


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
    """Partial sums in order: dφ over P chunks, by all programs but two; dbias and dα over Q, by one
    each.
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
