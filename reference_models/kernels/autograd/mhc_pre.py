"""The coefficients of one mHC site and its block's input: the operator, its gradient, and its
public faces.

What a backward needs of the forward is 25 floats a token.
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
"""Tokens, width, warps and stages of `project_streams` by tiles, as measured on an H100
(docs/kernels.md).
"""

Ten = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _outputs(x: Tensor, measured: bool) -> Ten:
    """inner, pre, post, res, logits, h, rms, stats, and the link's two ends."""
    t, n, c = x.shape
    return (
        x.new_empty(t, c),
        floats(x, t, n),
        floats(x, t, n),
        floats(x, t, n, n),
        floats(x, t, n, n),
        floats(x, t, n * n + 2 * n),
        floats(x, t),
        floats(x, *mhc_stats.maps_shape(t if measured else 0)),
        # Paths of gradients, without values: one element, seen as the whole.
        x.new_empty(1).expand(x.shape),
        floats(x, 1).expand(t, n, n),
    )


def project(x: Tensor, phi: Tensor) -> Tensor:
    """[x·φ | Σx²] in slices' partial sums (S, T, KP): what `mhc_post_project` gives of its streams
    on the way.
    """
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
    # Enough programs for two a multiprocessor: few tokens split the width, many do not need to.
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
        # Pipelined by addresses, the product was seen to read tiles that were being replaced
        # (triton 3.6).
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    t, n, c = x.shape
    out = _outputs(x, flag is not None)
    if not t:
        return out
    part = project(x, phi) if projected is None else projected
    bm = mhc_stats.BLOCK
    mhc_pre_forward.mix[(cdiv(t, bm) + t,)](
        x,
        part,
        alpha,
        bias,
        *out[:7],
        flag,
        out[7],
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
    return out


def _fake(x, phi, alpha, bias, iterations, eps, norm_eps, order, flag, projected):
    return _outputs(x, flag is not None)


def _keep(ctx, inputs, output):
    x, phi, alpha, bias, iterations, eps, _, order, *_ = inputs
    ctx.rest = iterations, eps, order
    _, pre, _, _, _, h, rms, *_ = output
    ctx.save_for_backward(x, phi, alpha, bias, pre, h, rms)
    ctx.set_materialize_grads(False)


def _grad(ctx, d_inner, d_pre, d_post, d_res, d_logits, _h, _rms, _stats, d_next, res):
    given = [
        None if d is None else d.contiguous()
        for d in (d_inner, d_pre, d_post, d_res, d_logits, d_next, res)
    ]
    return *mhc_pre_backward.backward(*ctx.saved_tensors, *given, *ctx.rest), *(None,) * 6


_mhc_pre = operation("mhc_pre", _forward, _fake, _keep, _grad)


class Linked(NamedTuple):
    """A site's `Mix`, and what its `mhc_post` and its monitor take from it."""

    mix: Mix
    link: tuple[Tensor, Tensor]
    """Have the shapes of the stream and of `res`, and no values: the paths by which `mhc_post`
    hands back the gradient of the streams after the site, and the `res` that mixed them.
    """
    stats_PW: Tensor
    """Rows for `mhc_stats.summarise_maps`: NaN while the flag is 0, and no rows without a flag."""


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
    """`mhc_pre` for a site whose `mhc_post_linked` follows: all of the stream's gradient is
    written in here.

    `flag` is an integer on the device; while it is not 0, the geometry of the maps is measured on
    the way. `projected` is what `mhc_post_project` of the site before gave with this stream and
    this φ: it is not projected again.
    """
    tokens, n, c = check_streams(x_TNC)
    k = n * n + 2 * n
    check_shape("phi", phi, (n * c, k))
    check_shape("alpha", alpha, (3,))
    check_shape("bias", bias, (k,))
    check_sinkhorn(iterations, order)
    flat = x_TNC.contiguous().view(tokens, n, c)
    parameters = (phi.contiguous(), alpha.contiguous(), bias.contiguous())
    out = _mhc_pre(flat, *parameters, iterations, eps, norm_eps, order, flag, projected)
    lead = x_TNC.shape[:-2]
    return Linked(Mix(*(o.view(*lead, *o.shape[1:]) for o in out[:5])), (out[8], out[9]), out[7])


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
    """`reference.mhc_pre` in three launches, and four in backward."""
    return mhc_pre_linked(x_TNC, phi, alpha, bias, iterations, eps, norm_eps, order).mix
