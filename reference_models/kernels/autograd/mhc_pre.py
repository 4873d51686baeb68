"""`mhc_pre` as an operation of torch: the coefficients of one mHC site, and its block's input.

The backward computes gates and map again; it keeps only the normalised projections and the RMS
factor, 25 floats a token for four streams.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from geodiag.reference_models.kernels.autograd import mhc_pre_backward
from geodiag.reference_models.kernels.autograd.launch import (
    cdiv,
    check_shape,
    check_streams,
    copies_tiles,
    floats,
    padded,
    power_of_two,
    processors,
    tiles,
    two_parts,
)
from geodiag.reference_models.kernels.autograd.operation import operation
from geodiag.reference_models.kernels.autograd.sinkhorn import check_sinkhorn
from geodiag.reference_models.kernels.device import mhc_pre_forward, mhc_stats
from geodiag.reference_models.kernels.reference import Mix

# T tokens, N streams, C channels, K = N² + 2N coefficients

PROJECT_TILE = (64, 128, 4, 3)
"""Tokens, width, warps and pipeline stages of `project_streams` with TMA: the fastest of those
measured on an H100 (docs/kernels.md).
"""


class _Outputs(NamedTuple):
    """The results of the operator, by name. The operator itself returns a plain tuple."""

    inner: Tensor
    pre: Tensor
    post: Tensor
    res: Tensor
    logits: Tensor
    h: Tensor
    """Normalised projections, for the backward."""
    rms: Tensor
    """1 / RMS of the streams, for the backward."""
    stats: Tensor
    link: Tensor
    """Has the shape of the streams and no values: the gradient of the new streams comes here."""
    link_res: Tensor
    """Has the shape of `res` and no values: the map that mixed the streams comes here."""

    def plain(self) -> "Ten":
        return tuple(self)  # type: ignore[return-value]


Ten = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _outputs(x: Tensor, measured: bool) -> _Outputs:
    t, n, c = x.shape
    return _Outputs(
        x.new_empty(t, c),
        floats(x, t, n),
        floats(x, t, n),
        floats(x, t, n, n),
        floats(x, t, n, n),
        floats(x, t, n * n + 2 * n),
        floats(x, t),
        floats(x, *mhc_stats.maps_shape(t if measured else 0)),
        # Only gradients pass here, so one element is expanded to the whole shape.
        x.new_empty(1).expand(x.shape),
        floats(x, 1).expand(t, n, n),
    )


def project(x: Tensor, phi: Tensor) -> Tensor:
    """Return [x·φ | Σx²] in partial sums (S, T, KP), like the last result of `mhc_post_project`."""
    t, n, c = x.shape
    k = n * n + 2 * n
    w, kp, two = n * c, padded(k), two_parts(x)
    parts = torch.empty(
        w, 2 * kp if two else kp, dtype=torch.bfloat16 if two else torch.float32, device=x.device
    )
    mhc_pre_forward.split[(cdiv(w, 64),)](
        phi, parts, w, K=k, KP=kp, BW=64, TWO_PARTS=two, num_warps=4
    )
    tma = two and n <= 4 and copies_tiles(x, parts)
    bt, bw = PROJECT_TILE[:2] if tma else (64 if x.is_cuda else 16, 32)
    # Two programs a multiprocessor: with few tokens the width is split, with many it need not be.
    slices = max(min(2 * processors(x.device) // cdiv(t, bt), cdiv(w, 4 * bw)), 1)
    part = floats(x, slices, t, kp)
    mhc_pre_forward.project_streams[(cdiv(t, bt), slices)](
        tiles(x, (bt, bw) if tma else None),
        tiles(parts, (bw, 2 * kp) if tma else None),
        part,
        t,
        W=w,
        K=k,
        KP=kp,
        SLICE=cdiv(cdiv(w, slices), bw) * bw,
        BT=bt,
        BW=bw,
        TWO_PARTS=two,
        TMA=tma,
        # No pipelining without TMA: triton 3.6 replaced tiles that the product still read.
        STAGES=PROJECT_TILE[3] if tma else 1,
        num_warps=PROJECT_TILE[2] if tma else 4,
    )
    return part


def _forward(
    x: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    iterations: int,
    eps: float,
    norm_eps: float,
    order: str,
    flag: Tensor | None,
    projected: Tensor | None,
) -> Ten:
    t, n, c = x.shape
    out = _outputs(x, flag is not None)
    if not t:
        return out.plain()
    part = project(x, phi) if projected is None else projected
    bm = mhc_stats.BLOCK
    mhc_pre_forward.mix[(cdiv(t, bm) + t,)](
        x,
        part,
        alpha,
        bias,
        out.inner,
        out.pre,
        out.post,
        out.res,
        out.logits,
        out.h,
        out.rms,
        flag,
        out.stats,
        t,
        part.shape[0],
        eps,
        norm_eps,
        ITERATIONS=iterations,
        ROWS_FIRST=order == "rows-first",
        N=n,
        C=c,
        KP=part.shape[2],
        BM=bm,
        BT=1,
        BC=min(512, power_of_two(c)),
        STAGES=1,
        num_warps=1,
    )
    return out.plain()


def _fake(x, phi, alpha, bias, iterations, eps, norm_eps, order, flag, projected):
    return _outputs(x, flag is not None).plain()


def _keep(ctx, inputs, output):
    x, phi, alpha, bias, iterations, eps, _, order, *_ = inputs
    ctx.rest = iterations, eps, order
    out = _Outputs(*output)
    ctx.save_for_backward(x, phi, alpha, bias, out.pre, out.h, out.rms)
    ctx.set_materialize_grads(False)


def _grad(ctx, d_inner, d_pre, d_post, d_res, d_logits, _h, _rms, _stats, d_next, res):
    given = [
        None if d is None else d.contiguous()
        for d in (d_inner, d_pre, d_post, d_res, d_logits, d_next, res)
    ]
    return *mhc_pre_backward.backward(*ctx.saved_tensors, *given, *ctx.rest), *(None,) * 6


_mhc_pre = operation("mhc_pre", _forward, _fake, _keep, _grad)


class Linked(NamedTuple):
    """A site's `Mix`, its link to `mhc_post`, and its statistics."""

    mix: Mix
    link: tuple[Tensor, Tensor]
    """Tensors without values in the shapes of streams and `res`. Through these, `mhc_post` returns
    the gradient of the streams after the site, and the map that mixed them.
    """
    stats_PW: Tensor
    """Rows of `MAPS_LAYOUT`: NaN while the flag is 0, and no rows without a flag."""


def mhc_pre_linked(
    x_TNC: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    iterations: int = 20,
    eps: float = 1e-6,
    norm_eps: float = 1e-6,
    order: str = "columns-first",
    flag: Tensor | None = None,
    projected: Tensor | None = None,
) -> Linked:
    """`mhc_pre` of a site that `mhc_post_linked` ends; the gradient of the streams is written here.

    `flag` is an integer on the device; while it is not 0, the maps are measured. `projected` is the
    previous site's third result of `mhc_post_project`, made of these streams with this φ; without
    it the streams are projected here.
    """
    tokens, n, c = check_streams(x_TNC)
    k = n * n + 2 * n
    check_shape("phi", phi, (n * c, k))
    check_shape("alpha", alpha, (3,))
    check_shape("bias", bias, (k,))
    check_sinkhorn(iterations, order)
    flat = x_TNC.contiguous().view(tokens, n, c)
    parameters = (phi.contiguous(), alpha.contiguous(), bias.contiguous())
    settings = (iterations, eps, norm_eps, order)
    out = _Outputs(*_mhc_pre(flat, *parameters, *settings, flag, projected))
    lead = x_TNC.shape[:-2]
    inner, pre, post, res, logits = (field.view(*lead, *field.shape[1:]) for field in out[:5])
    mix = Mix(inner, pre, post, res, logits)
    return Linked(mix, (out.link, out.link_res), out.stats)


def mhc_pre(
    x_TNC: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    iterations: int = 20,
    eps: float = 1e-6,
    norm_eps: float = 1e-6,
    order: str = "columns-first",
) -> Mix:
    """`reference.mhc_pre` by Triton: three launches forward, four backward."""
    return mhc_pre_linked(x_TNC, phi, alpha, bias, iterations, eps, norm_eps, order).mix
