"""`mhc_post` as an operation of torch: X' = H_res X + H_postᵀ f, one pass forward, one backward."""

import torch
from torch import Tensor

from geodiag.reference_models.kernels.autograd.launch import (
    cdiv,
    check_shape,
    check_streams,
    power_of_two,
)
from geodiag.reference_models.kernels.autograd.operation import operation
from geodiag.reference_models.kernels.device import mhc_stats
from geodiag.reference_models.kernels.device.mhc_post import post_backward, post_forward

# T tokens, N streams, C channels


def _outputs(x: Tensor, measured: bool) -> tuple[Tensor, Tensor]:
    shape = mhc_stats.streams_shape(x.shape[0] if measured else 0, 1)
    return torch.empty_like(x), torch.empty(shape, dtype=torch.float32, device=x.device)


def _lanes(x: Tensor, most: int) -> dict[str, int]:
    """Return the lanes of a program: 16 bytes each, at most `most` of them for one token."""
    vec = 16 // x.itemsize
    lanes = min(most, power_of_two(cdiv(x.shape[-1], vec)))
    return {"BL": lanes, "VEC": vec, "num_warps": max(lanes // 32, 1)}


def _forward(
    x: Tensor,
    branch: Tensor,
    post: Tensor,
    res: Tensor,
    link: Tensor | None,
    link_res: Tensor | None,
    flag: Tensor | None,
) -> tuple[Tensor, Tensor]:
    t, n, c = x.shape
    out, stats = _outputs(x, flag is not None)
    if t:
        post_forward[(t,)](x, branch, post, res, out, flag, stats, N=n, C=c, **_lanes(x, 64))
    return out, stats


def _backward(
    x: Tensor, branch: Tensor, post: Tensor, res: Tensor, grad: Tensor, wants_dx: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    t, n, c = x.shape
    dx = torch.empty_like(x) if wants_dx else x.new_empty(0)
    d_branch, d_post, d_res = (torch.empty_like(v) for v in (branch, post, res))
    if t:
        dx_ptr = dx if wants_dx else None
        post_backward[(t,)](
            x, branch, post, res, grad, dx_ptr, d_branch, d_post, d_res, N=n, C=c, **_lanes(x, 32)
        )
    return dx, d_branch, d_post, d_res


def _fake(x, branch, post, res, link, link_res, flag):
    return _outputs(x, flag is not None)


def _fake_backward(x, branch, post, res, grad, wants_dx):
    dx = torch.empty_like(x) if wants_dx else x.new_empty(0)
    return dx, torch.empty_like(branch), torch.empty_like(post), torch.empty_like(res)


def keep(ctx, inputs, output):
    x, branch, post, res, link, *_ = inputs
    ctx.save_for_backward(x, branch, post, res)
    ctx.linked = link is not None
    ctx.set_materialize_grads(False)


def post_grad(ctx, grad, _stats):
    if grad is None:
        return (None,) * 7
    grad = grad.contiguous()
    saved = ctx.saved_tensors
    dx, *rest = _mhc_post_backward(*saved, grad, not ctx.linked)
    # Through the link go the gradient of the new streams, unchanged, and the map that mixed them.
    return (None, *rest, grad, saved[3], None) if ctx.linked else (dx, *rest, None, None, None)


_mhc_post_backward = operation("mhc_post_backward", _backward, _fake_backward)
_mhc_post = operation("mhc_post", _forward, _fake, keep, post_grad)


def mhc_post_linked(
    x_TNC: Tensor,
    branch_TC: Tensor,
    post_TN: Tensor,
    res_TNN: Tensor,
    link: tuple[Tensor, Tensor] | None,
    flag: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`mhc_post` of a site that began with `mhc_pre_linked` of the same streams.

    The gradient of the new streams goes back through the link, and `mhc_pre` mixes it while it
    writes dx. Without a link it is mixed here: written once more, and read once more.

    Also returns the statistics, rows (T, 1, W) of `STREAMS_LAYOUT`: NaN while the flag is 0, and no
    rows without a flag.
    """
    tokens, n, c = check_streams(x_TNC)
    lead = x_TNC.shape[:-2]
    check_shape("branch", branch_TC, (*lead, c))
    check_shape("post", post_TN, (*lead, n))
    check_shape("res", res_TNN, (*lead, n, n))
    x = x_TNC.contiguous().view(tokens, n, c)
    out, stats = _mhc_post(
        x if link is None else x.detach(),
        branch_TC.to(x.dtype).contiguous().view(tokens, c),
        post_TN.float().contiguous().view(tokens, n),
        res_TNN.float().contiguous().view(tokens, n, n),
        *(link or (None, None)),
        flag,
    )
    return out.view_as(x_TNC), stats


def mhc_post(x_TNC: Tensor, branch_TC: Tensor, post_TN: Tensor, res_TNN: Tensor) -> Tensor:
    """`reference.mhc_post` in one launch each way; coefficients are float32."""
    return mhc_post_linked(x_TNC, branch_TC, post_TN, res_TNN, None)[0]
