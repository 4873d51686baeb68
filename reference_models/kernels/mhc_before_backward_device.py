"""What of the backward of `mhc_before` runs on the device: the coefficients' chain, then dx and dφ in one pass."""

# Bodies of kernels are Triton's language: tuples grow, arguments are pointers.
# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment"

import triton
import triton.language as tl

from geodiag.reference_models.kernels.sinkhorn import project_vjp

# T tokens, N streams, C channels, K = N² + 2N coefficients, KP their padded number, P partial sums


@triton.jit
def inner_to_pre(x_ptr, d_inner_ptr, d_pre_ptr, N: tl.constexpr, C: tl.constexpr, BL: tl.constexpr, VEC: tl.constexpr):
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
    coef_ptr,
    small_ptr,
    T,
    eps,
    ITERATIONS: tl.constexpr,
    ROWS_FIRST: tl.constexpr,
    N: tl.constexpr,
    C: tl.constexpr,
    KP: tl.constexpr,
    BT: tl.constexpr,
):
    """coef[t] = [∂L/∂(x·φ) | ∂L/∂(Σx²)·2 | 0 …]; small[p] = this program's share of ∂L/∂bias and ∂L/∂alpha·."""
    K: tl.constexpr = N * N + 2 * N
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    n = tl.arange(0, N)
    live = t < T
    live_TN = tl.broadcast_to(live[:, None], (BT, N))
    live_TNN = tl.broadcast_to(live[:, None, None], (BT, N, N))
    tn = t[:, None] * N + n[None, :]
    tnn = tn[:, :, None] * N + n[None, None, :]
    nn = 2 * N + n[None, :, None] * N + n[None, None, :]

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

    gate = tl.sigmoid(a_pre * h_pre + tl.load(bias_ptr + n)[None, :])
    d_pre = d_pre * gate * (1 - gate)
    gate = tl.sigmoid(a_post * h_post + tl.load(bias_ptr + N + n)[None, :])
    d_post = d_post * 2 * gate * (1 - gate)
    logits = a_res * h_res + tl.load(bias_ptr + nn)
    d_res = tl.zeros((BT, N, N), tl.float32)
    if d_res_ptr is not None:
        d_res = project_vjp(logits, tl.load(d_res_ptr + tnn, live_TNN, 0.0), eps, ITERATIONS, ROWS_FIRST)
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
    along = tl.sum(d_pre * h_pre, 1) + tl.sum(d_post * h_post, 1) + tl.sum(tl.sum(d_res * h_res, 2), 1)
    along *= -rms * rms / (N * C)
    coef = coef_ptr + t * KP
    tl.store(coef[:, None] + n[None, :], d_pre * rms[:, None], live_TN)
    tl.store(coef[:, None] + N + n[None, :], d_post * rms[:, None], live_TN)
    tl.store(coef[:, None, None] + nn, d_res * rms[:, None, None], live_TNN)
    k = tl.arange(0, KP)
    rest = tl.where(k[None, :] == K, along[:, None], 0.0)
    tl.store(coef[:, None] + k[None, :], rest, live[:, None] & (k >= K)[None, :])


@triton.jit(do_not_specialize=["T", "CHUNK"])
def dx_dphi(
    x_ptr,
    phi_ptr,
    pre_ptr,
    coef_ptr,
    d_inner_ptr,
    d_link_ptr,
    dx_ptr,
    dphi_ptr,
    T,
    CHUNK,
    N: tl.constexpr,
    C: tl.constexpr,
    KP: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    TWO_PARTS: tl.constexpr,
):
    """dx of a block of one stream's channels for a chunk of tokens, and the chunk's share of dφ: one read of x."""
    K: tl.constexpr = N * N + 2 * N
    W: tl.constexpr = N * C
    # Neighbouring programs are the N streams of the same channels: they share d_inner through the cache.
    j = tl.program_id(0) % N
    c = (tl.program_id(0) // N) * BC + tl.arange(0, BC)
    k = tl.arange(0, KP)
    w = j * C + c
    start = tl.program_id(1).to(tl.int64) * CHUNK
    stop = tl.minimum(start + CHUNK, T)
    phi = tl.load(phi_ptr + w[:, None] * K + k[None, :], (c < C)[:, None] & (k < K)[None, :], 0.0).to(tl.float32)
    dphi = tl.zeros((BC, KP), tl.float32)
    # Not pipelined: copies ahead through shared memory were measured slower than three programs taking turns.
    for t0 in tl.range(start, stop, BT, num_stages=1):
        t = t0 + tl.arange(0, BT)
        live = (t < stop)[:, None]
        inside = live & (c < C)[None, :]
        coef = tl.load(coef_ptr + t[:, None] * KP + k[None, :], live, 0.0)
        along = tl.load(coef_ptr + t[:, None] * KP + K, live, 0.0)
        x = tl.load(x_ptr + t[:, None] * W + w[None, :], inside, 0.0)
        # All loads stand before the products: none would be moved above them.
        if d_inner_ptr is not None:
            pre = tl.load(pre_ptr + t[:, None] * N + j, live, 0.0)
            d_inner = tl.load(d_inner_ptr + t[:, None] * C + c[None, :], inside, 0.0)
        if d_link_ptr is not None:
            d_link = tl.load(d_link_ptr + t[:, None] * W + w[None, :], inside, 0.0)
        wide = x.to(tl.float32)
        if TWO_PARTS:
            dx = tl.dot(coef, tl.trans(phi), input_precision="tf32")
            high = coef.to(tl.bfloat16)
            low = (coef - high.to(tl.float32)).to(tl.bfloat16)
            dphi = tl.dot(tl.trans(x), low, dphi)
            dphi = tl.dot(tl.trans(x), high, dphi)
        else:
            dx = tl.dot(coef, tl.trans(phi), input_precision="tf32x3")
            dphi = tl.dot(tl.trans(wide), coef, dphi, input_precision="tf32x3")
        dx += along * wide
        if d_inner_ptr is not None:
            dx += pre * d_inner.to(tl.float32)
        if d_link_ptr is not None:
            dx += d_link.to(tl.float32)
        tl.store(dx_ptr + t[:, None] * W + w[None, :], dx, inside)
    out = dphi_ptr + tl.program_id(1).to(tl.int64) * W * K
    tl.store(out + w[:, None] * K + k[None, :], dphi, (c < C)[:, None] & (k < K)[None, :])


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
    """Partial sums in order: dφ over P chunks, by all programs but the last; dα and dbias over Q, by the last."""
    pid = tl.program_id(0)
    if pid < tl.num_programs(0) - 1:
        i = pid * BLOCK + tl.arange(0, BLOCK)
        total = tl.zeros((BLOCK,), tl.float32)
        part = dphi_part_ptr + i
        for _ in range(P):
            total += tl.load(part, i < SIZE, 0.0)
            part += SIZE
        tl.store(dphi_ptr + i, total, i < SIZE)
    else:
        K: tl.constexpr = N * N + 2 * N
        ROWS: tl.constexpr = 128
        k = tl.arange(0, KP)
        dbias = tl.zeros((ROWS, KP), tl.float32)
        dalpha = tl.zeros((ROWS, KP), tl.float32)
        for q0 in range(0, Q, ROWS):
            q = q0 + tl.arange(0, ROWS)
            row = small_ptr + q[:, None] * 2 * KP + k[None, :]
            inside = (q < Q)[:, None] & (k < K)[None, :]
            dbias += tl.load(row, inside, 0.0)
            dalpha += tl.load(row + KP, inside, 0.0)
        tl.store(dbias_ptr + k, tl.sum(dbias, 0), k < K)
        along = tl.sum(dalpha, 0)
        tl.store(dalpha_ptr, tl.sum(tl.where(k < N, along, 0.0), 0))
        tl.store(dalpha_ptr + 1, tl.sum(tl.where((k >= N) & (k < 2 * N), along, 0.0), 0))
        tl.store(dalpha_ptr + 2, tl.sum(tl.where(k >= 2 * N, along, 0.0), 0))
