"""Backward of `mhc_pre`: gradients of the coefficients, then dx and dφ in one pass over x.

Deterministic: each program writes its partial sums, and one kernel adds them in a fixed order.
"""

import torch
from torch import Tensor

from geodiag.reference_models.kernels.autograd.launch import (
    cdiv,
    copies_tiles,
    floats,
    padded,
    power_of_two,
    processors,
    tiles,
    two_parts,
)
from geodiag.reference_models.kernels.autograd.operation import operation
from geodiag.reference_models.kernels.device.mhc_pre_backward import (
    add_up,
    coefficients,
    inner_to_pre,
)
from geodiag.reference_models.kernels.device.mhc_pre_dx_dphi import dx_dphi

# T tokens, N streams, C channels, K = N² + 2N coefficients, KP their padded number, P partial sums

DX_TILE = (32, 64, 4, 3)
"""Tokens, channels, warps and pipeline stages of `dx_dphi` with TMA: the fastest of those measured
on an H200 (docs/kernels.md).
"""
COEFFICIENTS = (16, 1)
"""Tokens and warps of a program of `coefficients`, measured in the same way."""


def _backward(
    x: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    pre: Tensor,
    h: Tensor,
    rms: Tensor,
    d_inner: Tensor | None,
    d_pre: Tensor | None,
    d_post: Tensor | None,
    d_res: Tensor | None,
    d_logits: Tensor | None,
    d_next: Tensor | None,
    res: Tensor | None,
    iterations: int,
    eps: float,
    order: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, phi, alpha and bias.

    `d_next` is the gradient of the streams after the site, and `res` the map that mixed them; both
    come through the link.
    """
    t, n, c = x.shape
    k = n * n + 2 * n
    dx, dphi, dalpha, dbias = (torch.empty_like(v) for v in (x, phi, alpha, bias))
    if not t:
        return dx, dphi.zero_(), dalpha.zero_(), dbias.zero_()
    w, kp, wide = n * c, padded(k), not two_parts(x)
    bt, bc, dx_warps, stages = DX_TILE if x.is_cuda and n <= 4 and not wide else (16, 32, 4, 1)
    tma = n <= 4 and not wide and c % bc == 0 and copies_tiles(x, d_inner, d_next)
    # All streams in one program read d_next once, if registers and the copy engine allow it.
    together = n if tma or not x.is_cuda else 1
    blocks = cdiv(c, bc) * (n // together)
    # Two programs fit on a multiprocessor at a time; four a multiprocessor are two full waves.
    chunks = max(min(4 * processors(x.device) // blocks, cdiv(t, bt)), 1)
    inner_d_pre = None
    if d_inner is not None:
        inner_d_pre = floats(x, t, n)
        vec = 16 // x.itemsize
        lanes = min(32, power_of_two(cdiv(c, vec)))
        inner_to_pre[(t,)](x, d_inner, inner_d_pre, N=n, C=c, BL=lanes, VEC=vec, num_warps=1)
    coef = torch.empty(t, kp, dtype=torch.float32 if wide else torch.bfloat16, device=x.device)
    pairs = power_of_two(2 + n + n % 2 + n * n) // 2
    scalars = floats(x, t, 2 * pairs)
    few, warps = COEFFICIENTS if n <= 4 else (4, 1)
    small = floats(x, cdiv(t, few), 2, kp)
    coefficients[(cdiv(t, few),)](
        alpha,
        bias,
        h,
        rms,
        inner_d_pre,
        d_pre,
        d_post,
        d_res,
        d_logits,
        pre,
        res,
        coef,
        scalars,
        small,
        t,
        eps,
        ITERATIONS=iterations,
        ROWS_FIRST=order == "rows-first",
        N=n,
        C=c,
        KP=kp,
        S=pairs,
        BT=few,
        num_warps=warps,
    )
    part = floats(x, chunks, w, k)
    block = (bt, bc) if tma else None
    dx_dphi[(blocks, chunks)](
        tiles(x, block),
        phi,
        tiles(coef, (bt, kp) if tma else None),
        scalars.view(torch.int64),
        tiles(d_inner, block),
        tiles(d_next, block),
        tiles(dx, block),
        part,
        t,
        N=n,
        J=together,
        C=c,
        KP=kp,
        S=pairs,
        BT=bt,
        BC=bc,
        WIDE=wide,
        TMA=tma,
        STAGES=stages if tma else 1,
        num_warps=dx_warps,
    )
    size = 1024
    add_up[(cdiv(w * k, size) + 2,)](
        part,
        small,
        dphi,
        dalpha,
        dbias,
        w * k,
        chunks,
        small.shape[0],
        N=n,
        KP=kp,
        BLOCK=size,
        num_warps=8,
    )
    return dx, dphi, dalpha, dbias


def _fake(x, phi, alpha, bias, *rest):
    return (
        torch.empty_like(x),
        torch.empty_like(phi),
        torch.empty_like(alpha),
        torch.empty_like(bias),
    )


backward = operation("mhc_pre_backward", _backward, _fake)
