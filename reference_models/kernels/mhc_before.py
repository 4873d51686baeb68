"""The coefficients of one mHC site and its block's input.

`_split` prepares φ for the tensor cores; `_project` forms x·φ and Σx² in one pass over the stream; `_mix` turns them
into gates and a doubly stochastic map in registers, and sums the streams in another pass. What a backward needs of
all this is 25 floats a token.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from geodiag.reference_models.kernels import mhc_before_backward, mhc_stats
from geodiag.reference_models.kernels.launch import (
    cdiv,
    check_shape,
    check_streams,
    padded,
    power_of_two,
    processors,
    two_parts,
)
from geodiag.reference_models.kernels.reference import Mix
from geodiag.reference_models.kernels.sinkhorn import check_sinkhorn, project

# T tokens, N streams, C channels, W = N·C, K = N² + 2N coefficients, KP their padded number, S slices of W


@triton.jit
def _split(phi_ptr, parts_ptr, W, K: tl.constexpr, KP: tl.constexpr, BW: tl.constexpr, TWO_PARTS: tl.constexpr):
    """parts[w] = [high | low], two bfloat16 parts of φ padded to KP: 16 bits of it, more than tf32 would carry."""
    w = tl.program_id(0) * BW + tl.arange(0, BW)
    k = tl.arange(0, KP)
    live = (w < W)[:, None]
    phi = tl.load(phi_ptr + w[:, None] * K + k[None, :], live & (k < K)[None, :], 0.0).to(tl.float32)
    if TWO_PARTS:
        high = phi.to(tl.bfloat16)
        tl.store(parts_ptr + w[:, None] * 2 * KP + k[None, :], high, live)
        tl.store(parts_ptr + w[:, None] * 2 * KP + KP + k[None, :], phi - high.to(tl.float32), live)
    else:
        tl.store(parts_ptr + w[:, None] * KP + k[None, :], phi, live)


@triton.jit(do_not_specialize=["T"])
def _project(
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
    STAGES: tl.constexpr,
):
    """part[s, t] = [x·φ | Σx²] over slice s of W."""
    P: tl.constexpr = 2 if TWO_PARTS else 1
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    s = tl.program_id(1)
    k = tl.arange(0, KP)
    columns = tl.arange(0, P * KP)
    live = (t < T)[:, None]
    acc = tl.zeros((BT, P * KP), tl.float32)
    squares = tl.zeros((BT,), tl.float32)
    for i in tl.range(0, SLICE, BW, num_stages=STAGES):
        w = s * SLICE + i + tl.arange(0, BW)
        x = tl.load(x_ptr + t[:, None] * W + w[None, :], live & (w < W)[None, :], 0.0)
        phi = tl.load(parts_ptr + w[:, None] * (P * KP) + columns[None, :], (w < W)[:, None], 0.0)
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
def _gates(part_ptr, t, live, first, T, S, norm_eps, N: tl.constexpr, C: tl.constexpr, KP: tl.constexpr):
    """N normalised projections from column `first` on, and 1/‖x‖: the slices' sums."""
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
    """The N×N normalised projections of `res`."""
    n = tl.arange(0, N)
    nn = 2 * N + n[None, :, None] * N + n[None, None, :]
    h = tl.zeros((t.shape[0], N, N), tl.float32)
    for s in range(S):
        row = part_ptr + (s * T.to(tl.int64) + t) * KP
        h += tl.load(row[:, None, None] + nn, tl.broadcast_to(live[:, None, None], h.shape), 0.0)
    return h * rms[:, None, None]


@triton.jit
def _store_maps(
    part_ptr,
    alpha_ptr,
    bias_ptr,
    post_ptr,
    res_ptr,
    logits_ptr,
    h_ptr,
    flag_ptr,
    stats_ptr,
    program,
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
):
    """`post` and `res` of BM tokens: no stream is read."""
    K: tl.constexpr = N * N + 2 * N
    t = program.to(tl.int64) * BM + tl.arange(0, BM)
    n = tl.arange(0, N)
    nn = n[None, :, None] * N + n[None, None, :]
    live = t < T
    all_TNN = tl.broadcast_to(live[:, None, None], (BM, N, N))
    h_post, rms = _gates(part_ptr, t, live, N, T, S, norm_eps, N, C, KP)
    h_res = _map(part_ptr, t, live, rms, T, S, N, KP)
    post = 2 * tl.sigmoid(tl.load(alpha_ptr + 1) * h_post + tl.load(bias_ptr + N + n)[None, :])
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
    x_ptr,
    part_ptr,
    alpha_ptr,
    bias_ptr,
    inner_ptr,
    pre_ptr,
    h_ptr,
    rms_ptr,
    program,
    T,
    S,
    eps,
    norm_eps,
    N: tl.constexpr,
    C: tl.constexpr,
    KP: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    STAGES: tl.constexpr,
):
    """`pre` of BT tokens, and their streams' sum."""
    K: tl.constexpr = N * N + 2 * N
    t = program.to(tl.int64) * BT + tl.arange(0, BT)
    n = tl.arange(0, N)
    live = t < T
    h_pre, rms = _gates(part_ptr, t, live, 0, T, S, norm_eps, N, C, KP)
    pre = tl.sigmoid(tl.load(alpha_ptr) * h_pre + tl.load(bias_ptr + n)[None, :]) + eps
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
            inner += gates[j] * tl.load(x_ptr + (t[:, None] * N + j) * C + c[None, :], inside, 0.0).to(tl.float32)
        tl.store(inner_ptr + t[:, None] * C + c[None, :], inner, inside)


@triton.jit(do_not_specialize=["T", "S"])
def _mix(
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
    """The first programs iterate Sinkhorn, all latency; the others stream, all bandwidth; neither waits."""
    if tl.program_id(0) < tl.cdiv(T, BM):
        _store_maps(
            part_ptr,
            alpha_ptr,
            bias_ptr,
            post_ptr,
            res_ptr,
            logits_ptr,
            h_ptr,
            flag_ptr,
            stats_ptr,
            tl.program_id(0),
            T,
            S,
            eps,
            norm_eps,
            ITERATIONS,
            ROWS_FIRST,
            N,
            C,
            KP,
            BM,
        )
    else:
        # Last tokens first: their streams are what `_project` left in the cache.
        program = tl.num_programs(0) - 1 - tl.program_id(0)
        _store_inner(
            x_ptr,
            part_ptr,
            alpha_ptr,
            bias_ptr,
            inner_ptr,
            pre_ptr,
            h_ptr,
            rms_ptr,
            program,
            T,
            S,
            eps,
            norm_eps,
            N,
            C,
            KP,
            BT,
            BC,
            STAGES,
        )


def _outputs(x: Tensor, measured: bool) -> tuple[Tensor, ...]:
    """inner, pre, post, res, logits, h, rms, stats, link."""
    t, n, c = x.shape
    wide = {"dtype": torch.float32, "device": x.device}
    return (
        x.new_empty(t, c),
        torch.empty(t, n, **wide),
        torch.empty(t, n, **wide),
        torch.empty(t, n, n, **wide),
        torch.empty(t, n, n, **wide),
        torch.empty(t, n * n + 2 * n, **wide),
        torch.empty(t, **wide),
        torch.empty(mhc_stats.maps_shape(t if measured else 0), **wide),
        # A gradient's path without values: one element, seen as the whole stream.
        x.new_zeros(1).expand(x.shape),
    )


@torch.library.custom_op("geodiag::mhc_before", mutates_args=())
def _mhc_before(
    x: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    iterations: int,
    eps: float,
    norm_eps: float,
    order: str,
    flag: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    t, n, c = x.shape
    k = n * n + 2 * n
    out = _outputs(x, flag is not None)
    if not t:
        return out
    w, two = n * c, two_parts(x)
    kp = padded(k)
    parts = torch.empty(w, 2 * kp if two else kp, dtype=torch.bfloat16 if two else torch.float32, device=x.device)
    _split[(cdiv(w, 64),)](phi, parts, w, K=k, KP=kp, BW=64, TWO_PARTS=two, num_warps=4)
    bt, bw = (128, 64) if two and n <= 4 else (64 if x.is_cuda else 16, 32)
    # Enough programs for two a multiprocessor: few tokens split the width, many do not need to.
    slices = max(min(2 * processors(x.device) // cdiv(t, bt), cdiv(w, 4 * bw)), 1)
    part = torch.empty(slices, t, kp, dtype=torch.float32, device=x.device)
    _project[(cdiv(t, bt), slices)](
        x,
        parts,
        part,
        t,
        W=w,
        K=k,
        KP=kp,
        SLICE=cdiv(cdiv(w, slices), bw) * bw,
        BT=bt,
        BW=bw,
        TWO_PARTS=two,
        STAGES=4 if two else 2,
        num_warps=8 if two else 4,
    )
    bt, bm = 2, mhc_stats.BLOCK
    _mix[(cdiv(t, bm) + cdiv(t, bt),)](
        x,
        part,
        alpha,
        bias,
        *out[:7],
        flag,
        out[7],
        t,
        slices,
        eps,
        norm_eps,
        ITERATIONS=iterations,
        ROWS_FIRST=order == "rows-first",
        N=n,
        C=c,
        KP=kp,
        BM=bm,
        BT=bt,
        BC=min(256, power_of_two(c)),
        STAGES=1,
        num_warps=2,
    )
    return out


@_mhc_before.register_fake
def _(x, phi, alpha, bias, iterations, eps, norm_eps, order, flag):
    return _outputs(x, flag is not None)


def _keep(ctx, inputs, output):
    x, phi, alpha, bias, *ctx.rest = inputs
    _, pre, _, _, _, h, rms, *_ = output
    ctx.save_for_backward(x, phi, alpha, bias, pre, h, rms)
    ctx.set_materialize_grads(False)


def _grad(ctx, d_inner, d_pre, d_post, d_res, d_logits, _h, _rms, _stats, d_link):
    iterations, eps, _, order, *_ = ctx.rest
    given = [None if d is None else d.contiguous() for d in (d_inner, d_pre, d_post, d_res, d_logits, d_link)]
    dx, *rest = mhc_before_backward.backward(*ctx.saved_tensors, *given, iterations, eps, order)
    return (dx if d_link is None else given[-1]), *rest, None, None, None, None, None


_mhc_before.register_autograd(_grad, setup_context=_keep)


class Linked(NamedTuple):
    """A site's `Mix`, and what its `mhc_after` and its monitor take from it."""

    mix: Mix
    link_TNC: Tensor
    """Has the stream's shape and no values: the path by which `mhc_after`'s gradient of the stream comes back."""
    stats_PW: Tensor
    """Rows for `mhc_stats.summarise_maps`: NaN while the flag is 0, and no rows without a flag."""


def mhc_before_linked(
    x_TNC: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    iterations: int = 20,
    eps: float = 1e-6,
    norm_eps: float = 1e-6,
    order: str = "columns-first",
    flag: Tensor | None = None,
) -> Linked:
    """`mhc_before` for a site whose `mhc_after_linked` follows: its gradient of the stream is added in here.

    `flag` is an integer on the device; while it is not 0, the geometry of the maps is measured on the way.
    """
    tokens, n, c = check_streams(x_TNC)
    k = n * n + 2 * n
    check_shape("phi", phi, (n * c, k))
    check_shape("alpha", alpha, (3,))
    check_shape("bias", bias, (k,))
    check_sinkhorn(iterations, order)
    flat = x_TNC.contiguous().view(tokens, n, c)
    parameters = (phi.contiguous(), alpha.contiguous(), bias.contiguous())
    out = _mhc_before(flat, *parameters, iterations, eps, norm_eps, order, flag)
    lead = x_TNC.shape[:-2]
    return Linked(Mix(*(o.view(*lead, *o.shape[1:]) for o in out[:5])), out[8], out[7])


def mhc_before(
    x_TNC: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    iterations: int = 20,
    eps: float = 1e-6,
    norm_eps: float = 1e-6,
    order: str = "columns-first",
) -> Mix:
    """`reference.mhc_before` in three launches, and four in backward."""
    return mhc_before_linked(x_TNC, phi, alpha, bias, iterations, eps, norm_eps, order).mix
