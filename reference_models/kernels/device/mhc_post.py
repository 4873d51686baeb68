"""`mhc_post` on the device: X' = H_res X + H_postᵀ f (arXiv 2512.24880 eq. 3), and its backward.

One token a program: its N² + N coefficients are then scalars in registers, and each number of the
streams is read and written once.
"""

# Kernel bodies are Triton code: tuples grow by concatenation, and arguments are pointers.
# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment"

import triton
import triton.language as tl

from geodiag.reference_models.kernels.device import mhc_stats

# T tokens, N streams, C channels; BL lanes, each with VEC neighbouring channels (16 bytes)


@triton.jit
def post_forward(
    x_ptr,
    branch_ptr,
    post_ptr,
    res_ptr,
    out_ptr,
    flag_ptr,
    stats_ptr,
    N: tl.constexpr,
    C: tl.constexpr,
    BL: tl.constexpr,
    VEC: tl.constexpr,
):
    """Store the streams after the site; with a flag, also the statistics of their norms."""
    t = tl.program_id(0).to(tl.int64)
    post = ()
    res = ()
    for i in tl.static_range(N):
        post = post + (tl.load(post_ptr + t * N + i),)
        for j in tl.static_range(N):
            res = res + (tl.load(res_ptr + (t * N + i) * N + j),)
    # Each lane keeps its own sums, one register each; one reduction follows the loop.
    amax = tl.zeros((BL,), tl.float32)
    after = tl.zeros((BL,), tl.float32)
    wrote = tl.zeros((BL,), tl.float32)
    kept = tl.zeros((BL,), tl.float32)
    before = tl.zeros((BL,), tl.float32)
    for c0 in range(0, C, BL * VEC):
        c = c0 + (tl.arange(0, BL) * VEC)[:, None] + tl.arange(0, VEC)[None, :]
        inside = c < C
        branch = tl.load(branch_ptr + t * C + c, inside, 0.0).to(tl.float32)
        streams = ()
        for j in tl.static_range(N):
            streams = streams + (tl.load(x_ptr + (t * N + j) * C + c, inside, 0.0).to(tl.float32),)
        if flag_ptr is not None:
            wrote += tl.sum(branch * branch, 1)
            for j in tl.static_range(N):
                before += tl.sum(streams[j] * streams[j], 1)
        for i in tl.static_range(N):
            mixed = tl.zeros((BL, VEC), tl.float32)
            for j in tl.static_range(N):
                mixed += res[i * N + j] * streams[j]
            out = (mixed + post[i] * branch).to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + (t * N + i) * C + c, out, inside)
            if flag_ptr is not None:
                rounded = out.to(tl.float32)
                amax = tl.maximum(amax, tl.max(tl.abs(rounded), 1))
                after += tl.sum(rounded * rounded, 1)
                kept += tl.sum(mixed * mixed, 1)
    if flag_ptr is not None:
        gain = 0.0
        for i in tl.static_range(N):
            gain += post[i] * post[i]
        mhc_stats.store_streams(
            stats_ptr, tl.load(flag_ptr) != 0, amax, after, gain * wrote, kept, before
        )


@triton.jit
def post_backward(
    x_ptr,
    branch_ptr,
    post_ptr,
    res_ptr,
    grad_ptr,
    dx_ptr,
    d_branch_ptr,
    d_post_ptr,
    d_res_ptr,
    N: tl.constexpr,
    C: tl.constexpr,
    BL: tl.constexpr,
    VEC: tl.constexpr,
):
    """df = Σ_i post_i dX'_i; d_post_i = Σ_c dX'_i f; d_res_ij = Σ_c dX'_i x_j; dx = H_resᵀ dX'.

    dx is left to `dx_dphi` where the site is linked (dx_ptr is None): there it costs no pass.
    """
    t = tl.program_id(0).to(tl.int64)
    post = ()
    d_post = ()
    d_res = ()
    for i in tl.static_range(N):
        post = post + (tl.load(post_ptr + t * N + i),)
        d_post = d_post + (tl.zeros((BL,), tl.float32),)
        for _ in tl.static_range(N):
            d_res = d_res + (tl.zeros((BL,), tl.float32),)
    for c0 in range(0, C, BL * VEC):
        # Each lane sums its own 16 bytes; lanes exchange their sums after the loop.
        c = c0 + (tl.arange(0, BL) * VEC)[:, None] + tl.arange(0, VEC)[None, :]
        inside = c < C
        branch = tl.load(branch_ptr + t * C + c, inside, 0.0).to(tl.float32)
        streams = ()
        grads = ()
        for j in tl.static_range(N):
            grads = grads + (tl.load(grad_ptr + (t * N + j) * C + c, inside, 0.0).to(tl.float32),)
            streams = streams + (tl.load(x_ptr + (t * N + j) * C + c, inside, 0.0).to(tl.float32),)
        d_branch = tl.zeros((BL, VEC), tl.float32)
        added_post = ()
        added_res = ()
        for i in tl.static_range(N):
            d_branch += post[i] * grads[i]
            added_post = added_post + (d_post[i] + tl.sum(grads[i] * branch, 1),)
            for j in tl.static_range(N):
                added_res = added_res + (d_res[i * N + j] + tl.sum(grads[i] * streams[j], 1),)
        d_post = added_post
        d_res = added_res
        tl.store(d_branch_ptr + t * C + c, d_branch, inside)
        if dx_ptr is not None:
            for j in tl.static_range(N):
                dx = tl.zeros((BL, VEC), tl.float32)
                for i in tl.static_range(N):
                    dx += tl.load(res_ptr + (t * N + i) * N + j) * grads[i]
                tl.store(dx_ptr + (t * N + j) * C + c, dx, inside)
    for i in tl.static_range(N):
        tl.store(d_post_ptr + t * N + i, tl.sum(d_post[i], 0))
        for j in tl.static_range(N):
            tl.store(d_res_ptr + (t * N + i) * N + j, tl.sum(d_res[i * N + j], 0))
