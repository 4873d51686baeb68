"""Forward of `mhc_pre` on the device: project the streams, then make gates, maps and block inputs.

The coefficients of a token come from x⃗·φ and ‖x⃗‖, sums over all N·C channels, so nothing can be
mixed before the whole token has been read once. Hence two passes over the streams:
`project_streams` computes the sums, `mix` turns them into coefficients in registers and reads the
streams again for the block's input (arXiv 2512.24880 eq. 7-8 and 3).
"""

# Kernel bodies are Triton code: tuples grow by concatenation, and arguments are pointers.
# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment"

import triton
import triton.language as tl

from geodiag.reference_models.kernels.device import mhc_stats
from geodiag.reference_models.kernels.device.math import sigmoid
from geodiag.reference_models.kernels.device.sinkhorn import project

# T tokens, N streams, C channels, W = N·C, K = N² + 2N coefficients, KP their padded number, S
# slices of W


@triton.jit
def split(
    phi_ptr,
    parts_ptr,
    W,
    K: tl.constexpr,
    KP: tl.constexpr,
    BW: tl.constexpr,
    TWO_PARTS: tl.constexpr,
):
    """parts[w] = [high | low]: φ as two bfloat16 parts, padded to KP columns.

    Two parts keep 16 bits of the mantissa, tf32 would keep 10; and the stream, which is bfloat16,
    enters the tensor cores without a conversion. Without TWO_PARTS φ is copied in float32.
    """
    w = tl.program_id(0) * BW + tl.arange(0, BW)
    k = tl.arange(0, KP)
    live = (w < W)[:, None]
    phi = tl.load(phi_ptr + w[:, None] * K + k[None, :], live & (k < K)[None, :], 0.0).to(
        tl.float32
    )
    if TWO_PARTS:
        high = phi.to(tl.bfloat16)
        tl.store(parts_ptr + w[:, None] * 2 * KP + k[None, :], high, live)
        tl.store(parts_ptr + w[:, None] * 2 * KP + KP + k[None, :], phi - high.to(tl.float32), live)
    else:
        tl.store(parts_ptr + w[:, None] * KP + k[None, :], phi, live)


@triton.jit(do_not_specialize=["T"])
def project_streams(
    x_ptr,
    parts_ptr,
    part_ptr,
    T,
    W: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    SLICE: tl.constexpr,
    BT: tl.constexpr,
    BW: tl.constexpr,
    TWO_PARTS: tl.constexpr,
    TMA: tl.constexpr,
    STAGES: tl.constexpr,
):
    """part[s, t] = [x·φ | Σx²] over slice s of W.

    The RMS factor r of eq. 7 commutes with the product, so one pass gives both, and `mix` divides.
    The width is cut into S slices where there are too few tokens to fill the GPU; partial sums are
    added in a fixed order by the reader, so results repeat bit for bit.
    """
    P: tl.constexpr = 2 if TWO_PARTS else 1
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    s = tl.program_id(1)
    k = tl.arange(0, KP)
    columns = tl.arange(0, P * KP)
    live = (t < T)[:, None]
    acc = tl.zeros((BT, P * KP), tl.float32)
    squares = tl.zeros((BT,), tl.float32)
    for i in tl.range(0, SLICE, BW, num_stages=STAGES):
        w0 = s * SLICE + i
        if TMA:
            x = x_ptr.load([tl.program_id(0) * BT, w0])
            phi = parts_ptr.load([w0, 0])
        else:
            w = w0 + tl.arange(0, BW)
            x = tl.load(x_ptr + t[:, None] * W + w[None, :], live & (w < W)[None, :], 0.0)
            phi = tl.load(
                parts_ptr + w[:, None] * (P * KP) + columns[None, :], (w < W)[:, None], 0.0
            )
        wide = x.to(tl.float32)
        squares += tl.sum(wide * wide, 1)
        if TWO_PARTS:
            acc = tl.dot(x, phi, acc)
        else:
            acc = tl.dot(wide, phi, acc, input_precision="tf32x3")
    u = tl.sum(tl.reshape(acc, (BT, P, KP)), 1)
    u = tl.where(k[None, :] == K, squares[:, None], u)
    tl.store(part_ptr + (s * T.to(tl.int64) + t[:, None]) * KP + k[None, :], u, live)


@triton.jit
def _gates(
    part_ptr, t, live, first, T, S, norm_eps, N: tl.constexpr, C: tl.constexpr, KP: tl.constexpr
):
    """Add up the slices: N normalised projections from column `first` on, and the factor 1/RMS."""
    K: tl.constexpr = N * N + 2 * N
    n = tl.arange(0, N)
    squares = tl.zeros(t.shape, tl.float32)
    h = tl.zeros((t.shape[0], N), tl.float32)
    for s in range(S):
        row = part_ptr + (s * T.to(tl.int64) + t) * KP
        squares += tl.load(row + K, live, 0.0)
        h += tl.load(row[:, None] + first + n[None, :], live[:, None], 0.0)
    rms = tl.rsqrt(squares / (N * C) + norm_eps)
    return h * rms[:, None], rms


@triton.jit
def _map(part_ptr, t, live, rms, T, S, N: tl.constexpr, KP: tl.constexpr):
    """Add up the slices: the N×N normalised projections of H_res."""
    n = tl.arange(0, N)
    nn = 2 * N + n[None, :, None] * N + n[None, None, :]
    h = tl.zeros((t.shape[0], N, N), tl.float32)
    for s in range(S):
        row = part_ptr + (s * T.to(tl.int64) + t) * KP
        h += tl.load(row[:, None, None] + nn, tl.broadcast_to(live[:, None, None], h.shape), 0.0)
    return h * rms[:, None, None]


@triton.jit
def _store_maps(
    program,
    inputs,
    outputs,
    flag_ptr,
    stats_ptr,
    ITERATIONS: tl.constexpr,
    ROWS_FIRST: tl.constexpr,
    N: tl.constexpr,
    C: tl.constexpr,
    KP: tl.constexpr,
    BM: tl.constexpr,
):
    """Store H_post and H_res of BM tokens, from their projections alone: no stream is read.

    H_post = 2σ(α h + b) and H_res = Sinkhorn(exp(α h + b)), arXiv 2512.24880 eq. 8.
    """
    part_ptr, alpha_ptr, bias_ptr, T, S, eps, norm_eps = inputs
    post_ptr, res_ptr, logits_ptr, h_ptr = outputs
    K: tl.constexpr = N * N + 2 * N
    t = program.to(tl.int64) * BM + tl.arange(0, BM)
    n = tl.arange(0, N)
    nn = n[None, :, None] * N + n[None, None, :]
    live = t < T
    all_TNN = tl.broadcast_to(live[:, None, None], (BM, N, N))
    h_post, rms = _gates(part_ptr, t, live, N, T, S, norm_eps, N, C, KP)
    h_res = _map(part_ptr, t, live, rms, T, S, N, KP)
    post = 2 * sigmoid(tl.load(alpha_ptr + 1) * h_post + tl.load(bias_ptr + N + n)[None, :])
    logits = tl.load(alpha_ptr + 2) * h_res + tl.load(bias_ptr + 2 * N + nn)
    res = project(logits, eps, ITERATIONS, ROWS_FIRST)
    tl.store(h_ptr + t[:, None] * K + N + n[None, :], h_post, live[:, None])
    tl.store(h_ptr + t[:, None, None] * K + 2 * N + nn, h_res, all_TNN)
    tl.store(post_ptr + t[:, None] * N + n[None, :], post, live[:, None])
    tl.store(res_ptr + t[:, None, None] * N * N + nn, res, all_TNN)
    tl.store(logits_ptr + t[:, None, None] * N * N + nn, logits, all_TNN)
    if flag_ptr is not None:
        mhc_stats.store_maps(stats_ptr, tl.load(flag_ptr) != 0, res, logits, post, t, T, N)


@triton.jit
def _store_inner(
    program,
    x_ptr,
    inputs,
    outputs,
    N: tl.constexpr,
    C: tl.constexpr,
    KP: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Store H_pre of BT tokens and the block's input, Σ_n pre_n x_n (arXiv 2512.24880 eq. 3)."""
    part_ptr, alpha_ptr, bias_ptr, T, S, eps, norm_eps = inputs
    inner_ptr, pre_ptr, h_ptr, rms_ptr = outputs
    K: tl.constexpr = N * N + 2 * N
    t = program.to(tl.int64) * BT + tl.arange(0, BT)
    n = tl.arange(0, N)
    live = t < T
    h_pre, rms = _gates(part_ptr, t, live, 0, T, S, norm_eps, N, C, KP)
    pre = sigmoid(tl.load(alpha_ptr) * h_pre + tl.load(bias_ptr + n)[None, :]) + eps
    tl.store(rms_ptr + t, rms, live)
    tl.store(h_ptr + t[:, None] * K + n[None, :], h_pre, live[:, None])
    tl.store(pre_ptr + t[:, None] * N + n[None, :], pre, live[:, None])
    gates = ()
    for j in tl.static_range(N):
        gates = gates + (tl.sum(tl.where(n[None, :] == j, pre, 0.0), 1)[:, None],)
    for c0 in tl.range(0, C, BC, num_stages=STAGES):
        c = c0 + tl.arange(0, BC)
        inside = live[:, None] & (c < C)[None, :]
        inner = tl.zeros((BT, BC), tl.float32)
        for j in tl.static_range(N):
            inner += gates[j] * tl.load(
                x_ptr + (t[:, None] * N + j) * C + c[None, :], inside, 0.0
            ).to(tl.float32)
        tl.store(inner_ptr + t[:, None] * C + c[None, :], inner, inside)


@triton.jit(do_not_specialize=["T", "S"])
def mix(
    x_ptr,
    part_ptr,
    alpha_ptr,
    bias_ptr,
    inner_ptr,
    pre_ptr,
    post_ptr,
    res_ptr,
    logits_ptr,
    h_ptr,
    rms_ptr,
    flag_ptr,
    stats_ptr,
    T,
    S,
    eps,
    norm_eps,
    ITERATIONS: tl.constexpr,
    ROWS_FIRST: tl.constexpr,
    N: tl.constexpr,
    C: tl.constexpr,
    KP: tl.constexpr,
    BM: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Gates, maps and block inputs of all tokens.

    The first programs iterate Sinkhorn, which is all latency; the others read the streams, which is
    all bandwidth. In one launch the latency is hidden behind the streaming.
    """
    inputs = (part_ptr, alpha_ptr, bias_ptr, T, S, eps, norm_eps)
    if tl.program_id(0) < tl.cdiv(T, BM):
        outputs = (post_ptr, res_ptr, logits_ptr, h_ptr)
        program = tl.program_id(0)
        _store_maps(
            program, inputs, outputs, flag_ptr, stats_ptr, ITERATIONS, ROWS_FIRST, N, C, KP, BM
        )
    else:
        outputs_of_streams = (inner_ptr, pre_ptr, h_ptr, rms_ptr)
        # Last tokens first: `project_streams` left their streams in the cache.
        program_of_streams = tl.num_programs(0) - 1 - tl.program_id(0)
        _store_inner(
            program_of_streams, x_ptr, inputs, outputs_of_streams, N, C, KP, BT, BC, STAGES
        )
