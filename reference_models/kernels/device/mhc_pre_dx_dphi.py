"""Backward of `mhc_pre` on the device, over the streams: dx and dφ in one pass.

Both need x, so x is read once for both: dφ = xᵀ·coef is accumulated in registers over a program's
tokens, and dx is complete when it is stored (the link hands the gradient of the new streams here).
"""

# Kernel bodies are Triton code: tuples grow by concatenation, and arguments are pointers.
# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment"

import triton
import triton.language as tl

from geodiag.reference_models.kernels.device.tiles import tile

# T tokens, N streams, C channels, W = N·C, K = N² + 2N coefficients, KP their padded number


@triton.jit
def first(pair):
    """Return the low 32 bits of an int64 as a float32."""
    return (pair & 0xFFFFFFFF).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def second(pair):
    """Return the high 32 bits of an int64 as a float32."""
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
    """dx of J streams and BC channels, for every `num_programs`-th block of tokens, and its dφ.

    dx = coef·φᵀ + along·x + preᵀ d_inner + H_resᵀ d_next. The last three terms take 2 + 2N scalars
    a token and stream. Loading one column of scalars costs as much as loading a tile, so two
    float32 travel as one 64-bit integer.

    Tiles of 32 tokens × 64 channels with all four streams were fastest of all that were measured:
    two programs of four warps share a multiprocessor, each with about 255 registers.
    """
    K: tl.constexpr = N * N + 2 * N
    W: tl.constexpr = N * C
    # Neighbouring programs serve the streams of the same channels, and share d_inner and d_next in
    # the cache.
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
