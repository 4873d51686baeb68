"""Hyper-connections in plain torch: the coefficients of a site, and the streams after it."""

import torch
from torch import Tensor

from geodiag.reference_models.kernels.reference.results import Mix, Projected, Written
from geodiag.reference_models.kernels.reference.sinkhorn import coefficient_dtype, sinkhorn

# T tokens (any leading shape), N streams, C channels


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
    """Return the coefficients of one site and its block's input (arXiv 2512.24880 eq. 7-8).

    H̃ = α · (x⃗φ / RMS(x⃗)) + b with x⃗ = vec(X); H_pre = σ(H̃_pre), H_post = 2σ(H̃_post) and
    H_res = Sinkhorn(exp(H̃_res)). `phi` is (N·C, N²+2N) with columns pre | post | res (row-major),
    `alpha` has one scale for each of the three, `bias` is (N²+2N).
    """
    n = x_TNC.shape[-2]
    wide = coefficient_dtype(x_TNC)
    flat = x_TNC.flatten(-2).to(wide)
    rms = flat.square().mean(-1, keepdim=True).add(norm_eps).rsqrt()
    h = (flat @ phi.to(wide)) * rms
    pre, post, res = h.split([n, n, n * n], -1)
    b_pre, b_post, b_res = bias.to(wide).split([n, n, n * n])
    pre = torch.sigmoid(alpha[0] * pre + b_pre) + eps
    post = 2 * torch.sigmoid(alpha[1] * post + b_post)
    logits = (alpha[2] * res + b_res).unflatten(-1, (n, n))
    return Mix(_aggregate(pre, x_TNC), pre, post, sinkhorn(logits, iterations, eps, order), logits)


def hc_pre(x_TNC: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, norm_eps: float = 1e-6) -> Mix:
    """Return the coefficients of an unconstrained hyper-connection (arXiv 2409.19606).

    Each stream is normalised by itself, and tanh(x_j φ) plus a static part gives its pre_j, post_j
    and column j of `res`. `phi` is (C, 2+N).
    """
    n = x_TNC.shape[-2]
    wide = coefficient_dtype(x_TNC)
    x = x_TNC.to(wide)
    x = x * x.square().mean(-1, keepdim=True).add(norm_eps).rsqrt()
    h = torch.tanh(x @ phi.to(wide))
    b_pre, b_post, b_res = bias.to(wide).split([n, n, n * n])
    pre = alpha[0] * h[..., 0] + b_pre
    post = alpha[1] * h[..., 1] + b_post
    res = alpha[2] * h[..., 2:].transpose(-1, -2) + b_res.view(n, n)
    return Mix(_aggregate(pre, x_TNC), pre, post, res, res)


def _aggregate(pre_TN: Tensor, x_TNC: Tensor) -> Tensor:
    return (pre_TN.unsqueeze(-1) * x_TNC).sum(-2).to(x_TNC.dtype)


def mhc_post(x_TNC: Tensor, branch_TC: Tensor, post_TN: Tensor, res_TNN: Tensor) -> Tensor:
    """Return X' = H_res X + H_postᵀ f (arXiv 2512.24880 eq. 3), in the stream's type."""
    mixed = res_TNN.to(x_TNC.dtype) @ x_TNC
    return mixed + post_TN.to(x_TNC.dtype).unsqueeze(-1) * branch_TC.unsqueeze(-2)


def site_pre(
    x_TNC: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    iterations: int = 20,
    eps: float = 1e-6,
    norm_eps: float = 1e-6,
    order: str = "columns-first",
    flag: Tensor | None = None,
    projected: Projected | None = None,
) -> Mix:
    """`mhc_pre` of a site. `flag` and `projected` are for the fused kernels only."""
    return mhc_pre(x_TNC, phi, alpha, bias, iterations, eps, norm_eps, order)


def site_post(
    x_TNC: Tensor,
    branch_TC: Tensor,
    mix: Mix,
    flag: Tensor | None = None,
    next_phi: Tensor | None = None,
) -> Written:
    """`mhc_post` of a site. `flag` and `next_phi` are for the fused kernels only."""
    assert mix.post_TN is not None, "only a site with maps is written here"
    assert mix.res_TNN is not None
    return Written(mhc_post(x_TNC, branch_TC, mix.post_TN, mix.res_TNN))


def read_out(
    x_TNC: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, eps: float, norm_eps: float
) -> Tensor:
    """Return the learned sigmoid-gated sum of the streams; `phi` is (N·C, N)."""
    flat = x_TNC.flatten(-2).float()
    rms = flat.square().mean(-1, keepdim=True).add(norm_eps).rsqrt()
    gate = torch.sigmoid((flat @ phi.float()) * rms * alpha + bias) + eps
    return _aggregate(gate, x_TNC)
