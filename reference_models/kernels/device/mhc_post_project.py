"""`mhc_post` and the next site's projection in one kernel: the new streams are not read again.

A site alone reads its streams once only to project them. Here the kernel that writes the streams
multiplies them by the next site's φ while they are in registers.
"""

# Kernel bodies are Triton code: tuples grow by concatenation, and arguments are pointers.
# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment"

import triton
import triton.language as tl

from geodiag.reference_models.kernels.device.mhc_stats import (
    STREAM_AFTER,
    STREAM_AMAX,
    STREAM_BEFORE,
    STREAM_BRANCH,
    STREAM_MIXED,
    STREAMS_WIDTH,
)
from geodiag.reference_models.kernels.device.tiles import tile

# T tokens, N streams, C channels, W = N·C, K = N² + 2N coefficients, KP their padded number, P
# parts of φ


@triton.jit
def split_rows(
    phi_ptr,
    parts_ptr,
    W,
    N: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    BW: tl.constexpr,
    P: tl.constexpr,
):
    """parts = [high; low], (P·KP, W): φ transposed, in two bfloat16 parts, or float32 (P = 1).

    Columns are ordered by channel, then by stream, as `_interleaved` orders the streams.
    """
    w = tl.program_id(0) * BW + tl.arange(0, BW)
    source = w % N * (W // N) + w // N
    k = tl.arange(0, KP)
    live = (w < W)[None, :]
    phi = tl.load(phi_ptr + source[None, :] * K + k[:, None], live & (k < K)[:, None], 0.0).to(
        tl.float32
    )
    out = parts_ptr + k[:, None] * W + w[None, :]
    high = phi.to(parts_ptr.dtype.element_ty)
    tl.store(out, high, live)
    if P == 2:
        tl.store(out + KP * W, phi - high.to(tl.float32), live)


@triton.jit
def _own(x):
    """Sum eight neighbouring channels, which one lane holds: no exchange between lanes."""
    return tl.sum(tl.reshape(x, (x.shape[0], x.shape[1] // 8, 8)), 2)


@triton.jit
def _interleaved(v, N: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr):
    """Join N tiles (BT, BC) to one of (BT, BC · N), ordered by channel, then stream.

    Joining in this order moves no number to another lane; one product then serves all streams.
    """
    if N == 1:
        one = v[0]
    elif N == 2:
        one = tl.join(v[0], v[1])
    elif N == 4:
        one = tl.join(tl.join(v[0], v[2]), tl.join(v[1], v[3]))
    else:
        even = tl.join(tl.join(v[0], v[4]), tl.join(v[2], v[6]))
        one = tl.join(even, tl.join(tl.join(v[1], v[5]), tl.join(v[3], v[7])))
    return tl.reshape(one, (BT, BC * N))


@triton.jit(do_not_specialize=["T"])
def post_project(
    x_ptr,
    branch_ptr,
    post_ptr,
    res_ptr,
    parts_ptr,
    out_ptr,
    part_ptr,
    flag_ptr,
    stats_ptr,
    T,
    N: tl.constexpr,
    C: tl.constexpr,
    KP: tl.constexpr,
    P: tl.constexpr,
    S: tl.constexpr,
    SLICE: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    TMA: tl.constexpr,
    STAGES: tl.constexpr,
):
    """out = the new streams of BT tokens, slice s of C; part[s, t] = its share of [out·φ | Σout²].

    64 tokens × 32 channels: φ is read for each block of tokens, so more tokens save traffic in the
    L2 cache, and larger tiles spill. S = 4 slices give enough programs for the whole GPU.
    """
    K: tl.constexpr = N * N + 2 * N
    # Neighbouring programs write the same tokens, so the last tokens stay in the cache for `mix`.
    s = tl.program_id(0) % S
    t0 = tl.program_id(0) // S * BT
    t = t0.to(tl.int64) + tl.arange(0, BT)
    k = tl.arange(0, KP)
    rows = tl.arange(0, P * KP)
    live = (t < T)[:, None]
    post = ()
    res = ()
    for i in tl.static_range(N):
        post = post + (tl.load(post_ptr + t[:, None] * N + i, live, 0.0),)
        for j in tl.static_range(N):
            res = res + (tl.load(res_ptr + (t[:, None] * N + i) * N + j, live, 0.0),)
    # Transposed product: the streams are the factor that tensor cores read from shared memory, so
    # they are computed once, in the layout in which they are stored.
    acc = tl.zeros((P * KP, BT), tl.float32)
    # Each lane sums its own eight channels; lanes exchange sums once, after the loop.
    after = tl.zeros((BT, BC // 8), tl.float32)
    amax = after
    wrote = after
    kept = after
    before = after
    for b0 in tl.range(0, SLICE, BC, num_stages=STAGES):
        c0 = s * SLICE + b0
        c = c0 + tl.arange(0, BC)
        inside = live & (c < C)[None, :]
        branch = tile(branch_ptr, t0, 0, c0, t, c, inside, 1, C, TMA)
        xs = ()
        news = ()
        if TMA:
            phi = parts_ptr.load([0, c0 * N])
        else:
            w = c0 * N + tl.arange(0, BC * N)
            phi = tl.load(
                parts_ptr + rows[:, None] * (N * C) + w[None, :], (w < N * C)[None, :], 0.0
            )
        for j in tl.static_range(N):
            xs = xs + (tile(x_ptr, t0, j, c0, t, c, inside, N, C, TMA),)
        squares = tl.zeros((BT, BC), tl.float32)
        mixed_squares = tl.zeros((BT, BC), tl.float32)
        read_squares = tl.zeros((BT, BC), tl.float32)
        most = tl.zeros((BT, BC), tl.float32)
        for i in tl.static_range(N):
            mixed = tl.zeros((BT, BC), tl.float32)
            for j in tl.static_range(N):
                mixed += res[i * N + j] * xs[j].to(tl.float32)
            new = mixed + post[i] * branch.to(tl.float32)
            rounded = new.to(branch.dtype)
            tl.store(out_ptr + (t[:, None] * N + i) * C + c[None, :], rounded, inside)
            # The sum takes the number before rounding: converting it back would cost more than all
            # else here, and rounding averages out in a sum.
            squares += new * new
            if flag_ptr is not None:
                most = tl.maximum(most, tl.abs(new))
                mixed_squares += mixed * mixed
                read_squares += xs[i].to(tl.float32) * xs[i].to(tl.float32)
            news = news + (rounded,)
        stacked = tl.trans(_interleaved(news, N, BT, BC))
        if P == 2:
            acc = tl.dot(phi, stacked, acc)
        else:
            acc = tl.dot(phi, stacked.to(tl.float32), acc, input_precision="tf32x3")
        after += _own(squares)
        if flag_ptr is not None:
            amax = tl.maximum(amax, tl.max(tl.reshape(most, (BT, BC // 8, 8)), 2))
            kept += _own(mixed_squares)
            before += _own(read_squares)
            wrote += _own(branch.to(tl.float32) * branch.to(tl.float32))
    after = tl.sum(after, 1)
    u = tl.trans(tl.sum(tl.reshape(acc, (P, KP, BT)), 0))
    u = tl.where(k[None, :] == K, after[:, None], u)
    tl.store(part_ptr + (s * T.to(tl.int64) + t[:, None]) * KP + k[None, :], u, live)
    if flag_ptr is not None:
        row = stats_ptr + (t * S + s) * STREAMS_WIDTH
        amax = tl.max(amax, 1)
        wrote = tl.sum(wrote, 1)
        kept = tl.sum(kept, 1)
        before = tl.sum(before, 1)
        off = tl.where(tl.load(flag_ptr) != 0, 0.0, float("nan"))
        gain = tl.zeros((BT,), tl.float32)
        for i in tl.static_range(N):
            p = tl.load(post_ptr + t * N + i, t < T, 0.0)
            gain += p * p
        # Rounding is monotonic, so the largest rounded number is the rounded largest.
        amax = amax.to(branch_ptr.dtype.element_ty if not TMA else tl.bfloat16).to(tl.float32)
        tl.store(row + STREAM_AMAX, amax + 0.0 * after + off, t < T)
        tl.store(row + STREAM_AFTER, after + off, t < T)
        tl.store(row + STREAM_BRANCH, gain * wrote + off, t < T)
        tl.store(row + STREAM_MIXED, kept + off, t < T)
        tl.store(row + STREAM_BEFORE, before + off, t < T)
