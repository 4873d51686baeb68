"""The kernels' definitions in plain torch: same names, same signatures, any device, any float type.

The Triton kernels are tested against these, and these against float64 and a third party's model.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# T tokens (any leading shape), N streams, C channels, E experts, K experts per token, A = T·K
# assignments, F expert dim


class Mix(NamedTuple):
    """What a hyper-connection decided for each token, and the input it made for its block."""

    inner_TC: Tensor
    """Block input, Σ_n pre_n x_n."""
    pre_TN: Tensor | None
    post_TN: Tensor | None
    res_TNN: Tensor | None
    """Applied to the streams as `res @ x`: rows are outputs. None where the residual path is the
    identity.
    """
    logits_TNN: Tensor | None
    """`res` before its projection."""
    link: tuple[Tensor, Tensor] | None = None
    """Where the gradient of the streams after the site comes back to its first kernel, to be mixed
    on the way.
    """
    stats_PW: Tensor | None = None
    """The geometry of the maps, where a kernel measured it on the way: rows as `mhc_stats` has
    them.
    """


class Projected(NamedTuple):
    """What a site asks of its streams first, where the kernel that wrote them made it on the way."""

    streams_TNC: Tensor
    """Of these very streams: whoever hands on others has made it void."""
    sums_STK: Tensor
    """[x·φ | Σx²], in partial sums over the width, by the φ of the site that comes next."""


class Written(NamedTuple):
    """The streams after a site."""

    streams_TNC: Tensor
    projected: Projected | None = None
    """For the next site, where it was asked for and the kernels can."""
    stats_TBF: Tensor | None = None
    """What was written and what was kept, where a kernel measured it on the way: rows as
    `mhc_stats` has them.
    """


class Routing(NamedTuple):
    """What a router decided for each token."""

    scores_TE: Tensor
    """Affinities in float32, dense, with gradient."""
    expert_ids_TK: Tensor
    weights_TK: Tensor
    logits_TE: Tensor | None = None
    """Before the affinity: what any other choice is weighed from."""


class Activated(NamedTuple):
    """What experts' gated activations made of their rows."""

    out_AF: Tensor
    counts_E8: Tensor | None = None
    """Clamp hits and extrema of each expert, where a kernel counted them on the way: columns as
    `swiglu.Counted`.
    """


def sinkhorn(
    logits_TNN: Tensor, iterations: int = 20, eps: float = 0.0, order: str = "columns-first"
) -> Tensor:
    """Projects exp(logits) towards the doubly stochastic matrices (Sinkhorn-Knopp; arXiv 2512.24880
    eq. 9).

    One iteration normalises both sides; the side that comes last sums to 1 exactly, the other up to
    the truncation error. The first normalisation is done as a softmax, so that large logits cannot
    overflow.
    """
    # Tokens last: every step of the iteration then runs over contiguous memory.
    logits_NNT = logits_TNN.flatten(0, -3).permute(1, 2, 0).contiguous()
    m_NNT = _Sinkhorn.apply(
        logits_NNT.to(_wide(logits_NNT)), iterations, eps, 0 if order == "columns-first" else 1
    )
    return m_NNT.permute(2, 0, 1).reshape(logits_TNN.shape).contiguous()


class _Sinkhorn(torch.autograd.Function):
    """The iterations differentiated one by one: with m' = m / s and s = Σm + ε, dm = (dm' − Σ
    dm'·m') / s.

    Autograd would come to the same, in three times as many passes.
    """

    @staticmethod
    def forward(ctx: Any, logits_NNT: Tensor, iterations: int, eps: float, first: int) -> Tensor:
        start = torch.softmax(logits_NNT, dim=first)
        m = start + eps
        history = [start]
        ctx.sides = [1 - first] + [first, 1 - first] * (iterations - 1)
        for side in ctx.sides:
            total = m.sum(side, keepdim=True) + eps
            m = m / total
            history += [m, total]
        ctx.first = first
        ctx.save_for_backward(*history)
        return m

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        start, *history = ctx.saved_tensors
        for side, m, total in zip(reversed(ctx.sides), history[-2::-2], history[::-2], strict=True):
            grad = (grad - (grad * m).sum(side, keepdim=True)) / total
        grad = start * (grad - (grad * start).sum(ctx.first, keepdim=True))
        return grad, None, None, None


def _wide(x: Tensor) -> torch.dtype:
    """Coefficients are float32, or float64 where the caller works in it."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


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
    """The coefficients of one site and its block's input (arXiv 2512.24880 eq. 7-8).

    `phi` is (N·C, N²+2N) with columns pre | post | res (row-major), `alpha` has one scale each,
    `bias` N²+2N.
    """
    n = x_TNC.shape[-2]
    wide = _wide(x_TNC)
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
    """Unconstrained hyper-connection: per-stream RMSNorm, tanh, static part plus dynamic part
    (arXiv 2409.19606).

    `phi` is (C, 2+N): each normalised stream j gives its own pre_j, post_j and column j of `res`.
    """
    n = x_TNC.shape[-2]
    wide = _wide(x_TNC)
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
    """X' = H_res X + H_postᵀ f (arXiv 2512.24880 eq. 3), in the stream's type."""
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
    """`mhc_pre` of a site. `flag` is for kernels that measure on the way while it is not 0,
    `projected` for those whose site before made something of this one's work; this one takes no
    notice of either.
    """
    return mhc_pre(x_TNC, phi, alpha, bias, iterations, eps, norm_eps, order)


def site_post(
    x_TNC: Tensor,
    branch_TC: Tensor,
    mix: Mix,
    flag: Tensor | None = None,
    next_phi: Tensor | None = None,
) -> Written:
    """`mhc_post` of a site that began with `site_pre`. Nothing is projected by `next_phi` on
    the way.
    """
    assert mix.post_TN is not None, "only sites with maps come here"
    assert mix.res_TNN is not None
    return Written(mhc_post(x_TNC, branch_TC, mix.post_TN, mix.res_TNN))


def read_out(
    x_TNC: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, eps: float, norm_eps: float
) -> Tensor:
    """Learned sigmoid-gated sum of the streams; `phi` is (N·C, N)."""
    flat = x_TNC.flatten(-2).float()
    rms = flat.square().mean(-1, keepdim=True).add(norm_eps).rsqrt()
    gate = torch.sigmoid((flat @ phi.float()) * rms * alpha + bias) + eps
    return _aggregate(gate, x_TNC)


def clamped_swiglu(gate_up_A2F: Tensor, limit: float | None = 10.0) -> Tensor:
    """silu(min(g, limit)) · clamp(u, ±limit); halves layout, gate clamped before SiLU (arXiv
    2606.19348).
    """
    gate, up = gate_up_A2F.chunk(2, -1)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return F.silu(gate) * up


def expert_glu(
    gate_up_A2F: Tensor,
    limit: float | None = 10.0,
    ends_E: Tensor | None = None,
    flag: Tensor | None = None,
) -> Activated:
    """`clamped_swiglu` of rows sorted by expert, which end at `ends_E`; None for rows of one
    expert.

    Counts nothing on the way: `flag` is for kernels that do while it is not 0.
    """
    return Activated(clamped_swiglu(gate_up_A2F, limit))


def router_logits(hidden_TC: Tensor, weight_EC: Tensor) -> Tensor:
    """In float32: neighbours among the scores are closer than bfloat16 can tell."""
    return hidden_TC.float() @ weight_EC.float().T


def affinity(hidden_TC: Tensor, weight_EC: Tensor) -> Tensor:
    """√softplus of the router logits, in float32 (arXiv 2606.19348)."""
    return _affinity(router_logits(hidden_TC, weight_EC))


def _affinity(logits_TE: Tensor) -> Tensor:
    # softplus underflows to 0 below logits of -104, and the root's gradient there is 0 · ∞: one
    # such logit is a NaN.
    return F.softplus(logits_TE).clamp_min(torch.finfo(torch.float32).tiny).sqrt()


def route(
    logits_TE: Tensor, bias_E: Tensor, k: int, scale: float, given_TK: Tensor | None = None
) -> Routing:
    """Affinities, the k best after the bias or those that are given, and their gate weights."""
    scores = _affinity(logits_TE)
    ids = choose(scores, bias_E, k) if given_TK is None else given_TK
    return Routing(scores, ids, weigh(scores, ids, scale), logits_TE)


def choose(scores_TE: Tensor, bias_E: Tensor, k: int) -> Tensor:
    """Ids of the k largest biased scores, largest first; the bias takes part in choosing only."""
    return (scores_TE.detach() + bias_E).topk(k, dim=-1).indices


def weigh(scores_TE: Tensor, expert_ids_TK: Tensor, scale: float) -> Tensor:
    """Gate weights of the chosen experts: their scores, normalised to sum to `scale`."""
    chosen = scores_TE.gather(-1, expert_ids_TK)
    return chosen / (chosen.sum(-1, keepdim=True) + 1e-20) * scale
