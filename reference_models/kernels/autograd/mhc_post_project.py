"""`mhc_post` and the next site's projection as one operation: streams are read once less."""

import torch
from torch import Tensor

from geodiag.reference_models.kernels.autograd.launch import (
    cdiv,
    check_shape,
    check_streams,
    floats,
    has_copy_engine,
    padded,
    tiles,
    two_parts,
)
from geodiag.reference_models.kernels.autograd.mhc_post import keep, post_grad
from geodiag.reference_models.kernels.autograd.operation import operation
from geodiag.reference_models.kernels.device import mhc_stats
from geodiag.reference_models.kernels.device.mhc_post_project import post_project, split_rows

# T tokens, N streams, C channels, K = N² + 2N coefficients, KP their padded number

TILE = (64, 32, 4, 3)
"""Tokens, channels, warps and pipeline stages of the fused kernel with TMA: the fastest of those
measured on an H200 (docs/kernels.md).
"""
SLICES = 4
"""Partial sums of the projection. Constant, so that a compiled graph has no shape that jumps with
the number of tokens.
"""


def fuses(x_TNC: Tensor) -> bool:
    """Whether the fused kernel takes these streams: four of bfloat16 on a Hopper GPU, and all in
    Triton's interpreter.
    """
    n, c = x_TNC.shape[-2:]
    served = x_TNC.dtype == torch.bfloat16 and n == 4 and c % (TILE[1] * SLICES) == 0
    return not x_TNC.is_cuda or (served and has_copy_engine(x_TNC.device))


def _outputs(x: Tensor, measured: bool) -> tuple[Tensor, Tensor, Tensor]:
    t, n, _ = x.shape
    shape = mhc_stats.streams_shape(t if measured else 0, SLICES)
    return torch.empty_like(x), floats(x, *shape), floats(x, SLICES, t, padded(n * n + 2 * n))


def _forward(
    x: Tensor,
    branch: Tensor,
    post: Tensor,
    res: Tensor,
    link: Tensor | None,
    link_res: Tensor | None,
    flag: Tensor | None,
    phi: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    t, n, c = x.shape
    out, stats, part = _outputs(x, flag is not None)
    if not t:
        return out, stats, part
    k, w, two = n * n + 2 * n, n * c, two_parts(x)
    kp = padded(k)
    parts = torch.empty(
        2 * kp if two else kp, w, dtype=torch.bfloat16 if two else torch.float32, device=x.device
    )
    split_rows[(cdiv(w, 64),)](
        phi, parts, w, N=n, K=k, KP=kp, BW=64, P=2 if two else 1, num_warps=4
    )
    # TMA needs 16-byte addresses; only a view into the middle of a tensor may lack one.
    x, branch = (v if v.data_ptr() % 16 == 0 else v.clone() for v in (x, branch))
    bt, bc, warps, stages = TILE if two else (16, 32, 4, 1)
    block = (bt, bc) if two else None
    post_project[(cdiv(t, bt) * SLICES,)](
        tiles(x, block),
        tiles(branch, block),
        post,
        res,
        tiles(parts, (2 * kp, bc * n) if two else None),
        out,
        part,
        flag,
        stats,
        t,
        N=n,
        C=c,
        KP=kp,
        P=2 if two else 1,
        S=SLICES,
        SLICE=cdiv(cdiv(c, SLICES), bc) * bc,
        BT=bt,
        BC=bc,
        TMA=two,
        STAGES=stages,
        num_warps=warps,
    )
    return out, stats, part


def _fake(x, branch, post, res, link, link_res, flag, phi):
    return _outputs(x, flag is not None)


def _grad(ctx, grad, _stats, _part):
    # The site that uses the projection computes the gradient of φ.
    return *post_grad(ctx, grad, _stats), None


_mhc_post_project = operation("mhc_post_project", _forward, _fake, keep, _grad)


def mhc_post_project(
    x_TNC: Tensor,
    branch_TC: Tensor,
    post_TN: Tensor,
    res_TNN: Tensor,
    link: tuple[Tensor, Tensor] | None,
    next_phi: Tensor,
    flag: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`mhc_post_linked` of streams that `fuses` accepts, and their projection for the next site.

    The third result goes to the next site's `mhc_pre_linked` together with these streams.
    """
    tokens, n, c = check_streams(x_TNC)
    lead = x_TNC.shape[:-2]
    check_shape("branch", branch_TC, (*lead, c))
    check_shape("post", post_TN, (*lead, n))
    check_shape("res", res_TNN, (*lead, n, n))
    check_shape("phi", next_phi, (n * c, n * n + 2 * n))
    x = x_TNC.contiguous().view(tokens, n, c)
    out, rows, part = _mhc_post_project(
        x if link is None else x.detach(),
        branch_TC.to(x.dtype).contiguous().view(tokens, c),
        post_TN.float().contiguous().view(tokens, n),
        res_TNN.float().contiguous().view(tokens, n, n),
        *(link or (None, None)),
        flag,
        next_phi.detach().contiguous(),
    )
    return out.view_as(x_TNC), rows, part
