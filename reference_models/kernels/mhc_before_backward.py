"""Backward of `mhc_before`: the coefficients' gradients, then dx and dφ in one pass over the stream.

Deterministic: partial sums are written per program and added in a fixed order.
"""

# Bodies of kernels are Triton's language: tuples grow, arguments are pointers.
# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment"

import torch
from torch import Tensor

from geodiag.reference_models.kernels.launch import cdiv, floats, padded, power_of_two, processors, two_parts
from geodiag.reference_models.kernels.mhc_before_backward_device import add_up, coefficients, dx_dphi, inner_to_pre

# T tokens, N streams, C channels, K = N² + 2N coefficients, KP their padded number, P partial sums


@torch.library.custom_op("geodiag::mhc_before_backward", mutates_args=("d_link",))
def backward(
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
    d_link: Tensor | None,
    iterations: int,
    eps: float,
    order: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, phi, alpha, bias; that of x is added to `d_link` in place where there is one, and empty here."""
    t, n, c = x.shape
    k = n * n + 2 * n
    dx = torch.empty_like(x) if d_link is None else x.new_empty(0)
    dphi, dalpha, dbias = torch.zeros_like(phi), torch.zeros_like(alpha), torch.zeros_like(bias)
    if not t:
        return dx, dphi, dalpha, dbias
    w, kp, two = n * c, padded(k), two_parts(x)
    coef = floats(x, t, kp)
    inner_d_pre = None
    if d_inner is not None:
        inner_d_pre = floats(x, t, n)
        vec = 16 // x.itemsize
        lanes = min(32, power_of_two(cdiv(c, vec)))
        inner_to_pre[(t,)](x, d_inner, inner_d_pre, N=n, C=c, BL=lanes, VEC=vec, num_warps=1)
    bt = 16 if n <= 4 else 4
    small = floats(x, cdiv(t, bt), 2, kp)
    coefficients[(cdiv(t, bt),)](
        alpha,
        bias,
        h,
        rms,
        inner_d_pre,
        d_pre,
        d_post,
        d_res,
        d_logits,
        coef,
        small,
        t,
        eps,
        ITERATIONS=iterations,
        ROWS_FIRST=order == "rows-first",
        N=n,
        C=c,
        KP=kp,
        BT=bt,
        num_warps=1,
    )
    bt, bc = (64, 64) if x.is_cuda and n <= 4 else (16, 32)
    blocks = n * cdiv(c, bc)
    # Eight programs a multiprocessor, three of them at a time.
    chunks = max(min(8 * processors(x.device) // blocks, cdiv(t, bt)), 1)
    chunk = cdiv(cdiv(t, chunks), bt) * bt
    part = floats(x, chunks, w, k)
    dx_dphi[(blocks, chunks)](
        x,
        phi,
        pre,
        coef,
        d_inner,
        d_link,
        dx if d_link is None else d_link,
        part,
        t,
        chunk,
        N=n,
        C=c,
        KP=kp,
        BT=bt,
        BC=bc,
        TWO_PARTS=two,
        num_warps=4,
    )
    block = 1024
    add_up[(cdiv(w * k, block) + 1,)](
        part, small, dphi, dalpha, dbias, w * k, chunks, small.shape[0], N=n, KP=kp, BLOCK=block, num_warps=8
    )
    return dx, dphi, dalpha, dbias


@backward.register_fake
def _(x, phi, alpha, bias, *rest):
    d_link = rest[8]
    dx = torch.empty_like(x) if d_link is None else x.new_empty(0)
    return dx, torch.empty_like(phi), torch.empty_like(alpha), torch.empty_like(bias)
