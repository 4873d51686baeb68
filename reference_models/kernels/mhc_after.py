"""X' = H_res X + H_postᵀ f in one pass, and its gradients in one pass."""

# Bodies of kernels are Triton's language: tuples grow, arguments are pointers.
# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment"

import torch
import triton
import triton.language as tl
from torch import Tensor

from geodiag.reference_models.kernels import mhc_stats
from geodiag.reference_models.kernels.launch import cdiv, check_shape, check_streams, power_of_two

# T tokens, N streams, C channels


@triton.jit
def _after_fwd(
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
    """One token's block of channels: BL lanes of VEC numbers."""
    t = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * (BL * VEC) + (tl.arange(0, BL) * VEC)[:, None] + tl.arange(0, VEC)[None, :]
    inside = c < C
    branch = tl.load(branch_ptr + t * C + c, inside, 0.0).to(tl.float32)
    streams = ()
    for j in tl.static_range(N):
        streams = streams + (tl.load(x_ptr + (t * N + j) * C + c, inside, 0.0).to(tl.float32),)
    # Sums for the statistics stay within a thread until the end: one register each.
    amax = tl.zeros((BL,), tl.float32)
    after = tl.zeros((BL,), tl.float32)
    kept = tl.zeros((BL,), tl.float32)
    before = tl.zeros((BL,), tl.float32)
    gain = 0.0
    if flag_ptr is not None:
        for j in tl.static_range(N):
            before += tl.sum(streams[j] * streams[j], 1)
    for i in tl.static_range(N):
        post = tl.load(post_ptr + t * N + i)
        mixed = tl.zeros((BL, VEC), tl.float32)
        for j in tl.static_range(N):
            mixed += tl.load(res_ptr + (t * N + i) * N + j) * streams[j]
        out = (mixed + post * branch).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + (t * N + i) * C + c, out, inside)
        if flag_ptr is not None:
            rounded = out.to(tl.float32)
            amax = tl.maximum(amax, tl.max(tl.abs(rounded), 1))
            after += tl.sum(rounded * rounded, 1)
            kept += tl.sum(mixed * mixed, 1)
            gain += post * post
    if flag_ptr is not None:
        wrote = gain * tl.sum(branch * branch, 1)
        mhc_stats.store_streams(stats_ptr, tl.load(flag_ptr) != 0, amax, after, wrote, kept, before)


@triton.jit
def _after_bwd(
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
    """One token a program: d_branch, and d_post and d_res summed over the channels; dx."""
    t = tl.program_id(0).to(tl.int64)
    d_post = ()
    for _ in tl.static_range(N):
        d_post = d_post + (tl.zeros((BL,), tl.float32),)
    d_res = ()
    for _ in tl.static_range(N * N):
        d_res = d_res + (tl.zeros((BL,), tl.float32),)
    for c0 in range(0, C, BL * VEC):
        # Sums stay within a thread's own 16 bytes until the loop is over.
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
            d_branch += tl.load(post_ptr + t * N + i) * grads[i]
            added_post = added_post + (d_post[i] + tl.sum(grads[i] * branch, 1),)
            for j in tl.static_range(N):
                added_res = added_res + (d_res[i * N + j] + tl.sum(grads[i] * streams[j], 1),)
        d_post = added_post
        d_res = added_res
        tl.store(d_branch_ptr + t * C + c, d_branch, inside)
        for j in tl.static_range(N):
            dx = tl.zeros((BL, VEC), tl.float32)
            for i in tl.static_range(N):
                dx += tl.load(res_ptr + (t * N + i) * N + j) * grads[i]
            tl.store(dx_ptr + (t * N + j) * C + c, dx, inside)
    for i in tl.static_range(N):
        tl.store(d_post_ptr + t * N + i, tl.sum(d_post[i], 0))
        for j in tl.static_range(N):
            tl.store(d_res_ptr + (t * N + i) * N + j, tl.sum(d_res[i * N + j], 0))


def channel_block(c: int) -> int:
    """Channels a program takes: the largest block that divides C, so that no lane idles."""
    return next((b for b in (512, 256) if c % b == 0), min(512, power_of_two(c)))


def _outputs(x: Tensor, measured: bool) -> tuple[Tensor, Tensor]:
    t, _, c = x.shape
    shape = mhc_stats.streams_shape(t if measured else 0, cdiv(c, channel_block(c)))
    return torch.empty_like(x), torch.empty(shape, dtype=torch.float32, device=x.device)


@torch.library.custom_op("geodiag::mhc_after", mutates_args=())
def _mhc_after(
    x: Tensor,
    branch: Tensor,
    post: Tensor,
    res: Tensor,
    link: Tensor | None,
    flag: Tensor | None,
) -> tuple[Tensor, Tensor]:
    t, n, c = x.shape
    out, stats = _outputs(x, flag is not None)
    if t:
        # Measuring takes registers: half as many numbers a thread then keep as many programs in flight.
        block, vec = channel_block(c), (16 if flag is None else 8) // x.itemsize
        lanes = max(block // vec, 1)
        _after_fwd[(t, cdiv(c, block))](
            x,
            branch,
            post,
            res,
            out,
            flag,
            stats,
            N=n,
            C=c,
            BL=lanes,
            VEC=vec,
            num_warps=max(lanes // 32, 1),
        )
    return out, stats


@torch.library.custom_op("geodiag::mhc_after_backward", mutates_args=())
def _mhc_after_backward(
    x: Tensor, branch: Tensor, post: Tensor, res: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    t, n, c = x.shape
    dx, d_branch, d_post, d_res = (torch.empty_like(v) for v in (x, branch, post, res))
    if t:
        vec = 16 // x.itemsize
        _after_bwd[(t,)](
            x,
            branch,
            post,
            res,
            grad,
            dx,
            d_branch,
            d_post,
            d_res,
            N=n,
            C=c,
            BL=min(32, power_of_two(cdiv(c, vec))),
            VEC=vec,
            num_warps=1,
        )
    return dx, d_branch, d_post, d_res


@_mhc_after.register_fake
def _(x, branch, post, res, link, flag):
    return _outputs(x, flag is not None)


@_mhc_after_backward.register_fake
def _(x, branch, post, res, grad):
    return torch.empty_like(x), torch.empty_like(branch), torch.empty_like(post), torch.empty_like(res)


def _keep(ctx, inputs, output):
    x, branch, post, res, link, _ = inputs
    ctx.save_for_backward(x, branch, post, res)
    ctx.linked = link is not None
    ctx.set_materialize_grads(False)


def _grad(ctx, grad, _stats):
    if grad is None:
        return (None,) * 6
    dx, *rest = _mhc_after_backward(*ctx.saved_tensors, grad.contiguous())
    return (None, *rest, dx, None) if ctx.linked else (dx, *rest, None, None)


_mhc_after.register_autograd(_grad, setup_context=_keep)


def mhc_after_linked(
    x_TNC: Tensor,
    branch_TC: Tensor,
    post_TN: Tensor,
    res_TNN: Tensor,
    link_TNC: Tensor | None,
    flag: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`mhc_after` of a site that began with `mhc_before_linked`: its gradient of the stream goes there,
    through the link, to be added while that one writes its own; autograd would read and write it once more.

    Also returns the rows for `mhc_stats.summarise_streams`, measured while the device-side `flag` is not 0.
    """
    tokens, n, c = check_streams(x_TNC)
    lead = x_TNC.shape[:-2]
    check_shape("branch", branch_TC, (*lead, c))
    check_shape("post", post_TN, (*lead, n))
    check_shape("res", res_TNN, (*lead, n, n))
    x = x_TNC.contiguous().view(tokens, n, c)
    out, stats = _mhc_after(
        x if link_TNC is None else x.detach(),
        branch_TC.to(x.dtype).contiguous().view(tokens, c),
        post_TN.float().contiguous().view(tokens, n),
        res_TNN.float().contiguous().view(tokens, n, n),
        link_TNC,
        flag,
    )
    return out.view_as(x_TNC), stats


def mhc_after(x_TNC: Tensor, branch_TC: Tensor, post_TN: Tensor, res_TNN: Tensor) -> Tensor:
    """`reference.mhc_after` in one launch each way; the coefficients stay in float32."""
    return mhc_after_linked(x_TNC, branch_TC, post_TN, res_TNN, None)[0]
