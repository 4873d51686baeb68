"""Routing in one pass over the router's logits: affinity, bias, top-k, gate weights, entropy,
margin, flips, load.
"""

# Bodies of kernels are Triton's language: tuples grow, arguments are pointers.
# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment"

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from geodiag.reference_models.kernels.autograd.launch import cdiv, check_shape, floats, power_of_two
from geodiag.reference_models.kernels.autograd.operation import operation
from geodiag.reference_models.kernels.reference import Routing

# T tokens, E experts, K experts per token


class Routed(NamedTuple):
    """What `reference.Routing` says, and what the same pass could tell about it."""

    scores_TE: Tensor
    expert_ids_TK: Tensor
    weights_TK: Tensor
    entropy_T: Tensor
    """Of the normalised affinities, in nats."""
    margin_T: Tensor
    """Biased score of the last chosen expert minus the best rejected one."""
    flipped_T: Tensor
    """Experts chosen that are not among `before`, as a share of K; 0 without `before`."""
    load_E: Tensor
    """Assignments per expert."""


@triton.jit
def _affinity(z):
    """√softplus, and its derivative. log1p of a small e^z is e^z itself, which log(1 + e^z) would
    lose.

    Where softplus underflows, the root's derivative would be 0/0: held at the smallest number, it
    is 0.
    """
    e = tl.exp(-tl.abs(z))
    log1p = tl.where(e < 1e-4, e * (1 - 0.5 * e), tl.log(1 + e))
    soft = tl.where(z > 0, z, 0.0) + log1p
    held = soft < 1.1754943508222875e-38
    score = tl.sqrt(tl.where(held, 1.1754943508222875e-38, soft)) + 0.0 * z
    return score, tl.where(held, 0.0, 0.5 * tl.sigmoid(z) / score)


@triton.jit(do_not_specialize=["T"])
def _route_fwd(
    logits_ptr,
    bias_ptr,
    before_ptr,
    given_ptr,
    scores_ptr,
    ids_ptr,
    weights_ptr,
    per_token_ptr,
    load_ptr,
    T,
    scale,
    E: tl.constexpr,
    EP: tl.constexpr,
    K: tl.constexpr,
    BT: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    e = tl.arange(0, EP)
    live = t < T
    inside = live[:, None] & (e < E)[None, :]
    score, _ = _affinity(
        tl.load(logits_ptr + t[:, None] * E + e[None, :], inside, 0.0).to(tl.float32)
    )
    tl.store(scores_ptr + t[:, None] * E + e[None, :], score, inside)

    # A NaN ranks first, as in torch.topk: ids stay valid and the weights say NaN.
    biased = score + tl.load(bias_ptr + e, e < E, 0.0)[None, :]
    biased = tl.where(biased == biased, biased, float("inf"))
    left = tl.where((e < E)[None, :], biased, float("-inf"))
    chosen_sum = tl.zeros((BT,), tl.float32)
    flipped = tl.zeros((BT,), tl.float32)
    taken = tl.zeros((BT, EP), tl.int32)
    last = tl.full((BT,), float("inf"), tl.float32)
    picks = ()
    for k in tl.static_range(K):
        if given_ptr is not None:
            pick = tl.load(given_ptr + t * K + k, live, 0).to(tl.int32)
        else:
            pick = tl.argmax(left, 1)
        picks = picks + (pick,)
        mine = e[None, :] == pick[:, None]
        last = tl.minimum(last, tl.max(tl.where(mine, biased, float("-inf")), 1))
        chosen_sum += tl.sum(tl.where(mine, score, 0.0), 1)
        taken += mine.to(tl.int32)
        left = tl.where(mine, float("-inf"), left)
        tl.store(ids_ptr + t * K + k, pick.to(tl.int64), live)
        if before_ptr is not None:
            known = tl.zeros((BT,), tl.int32)
            for j in tl.static_range(K):
                known += (tl.load(before_ptr + t * K + j, live, -1).to(tl.int32) == pick).to(
                    tl.int32
                )
            flipped += tl.where(known == 0, 1.0 / K, 0.0)
    norm = scale / (chosen_sum + 1e-20)
    for k in tl.static_range(K):
        mine = e[None, :] == picks[k][:, None]
        tl.store(weights_ptr + t * K + k, tl.sum(tl.where(mine, score, 0.0), 1) * norm, live)

    rejected = tl.max(tl.where((taken == 0) & (e < E)[None, :], biased, float("-inf")), 1)
    total = tl.sum(tl.where((e < E)[None, :], score, 0.0), 1)
    share = score / total[:, None]
    entropy = (
        -tl.sum(tl.where((e < E)[None, :] & (share > 0), share * tl.log(share), 0.0), 1)
        + 0.0 * total
    )
    tl.store(per_token_ptr + t * 3, entropy, live)
    tl.store(per_token_ptr + t * 3 + 1, last - rejected + 0.0 * total, live)
    tl.store(per_token_ptr + t * 3 + 2, flipped, live)
    # Integer sums commute: the order of these atomics cannot show.
    count = tl.sum(tl.where(live[:, None], taken, 0), 0)
    tl.atomic_add(load_ptr + e, count, (e < E) & (count > 0))


@triton.jit(do_not_specialize=["T"])
def _route_bwd(
    logits_ptr,
    ids_ptr,
    d_scores_ptr,
    d_weights_ptr,
    d_logits_ptr,
    T,
    scale,
    E: tl.constexpr,
    EP: tl.constexpr,
    K: tl.constexpr,
    BT: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    e = tl.arange(0, EP)
    live = t < T
    inside = live[:, None] & (e < E)[None, :]
    score, slope = _affinity(
        tl.load(logits_ptr + t[:, None] * E + e[None, :], inside, 0.0).to(tl.float32)
    )
    d = tl.zeros((BT, EP), tl.float32)
    if d_scores_ptr is not None:
        d += tl.load(d_scores_ptr + t[:, None] * E + e[None, :], inside, 0.0)
    if d_weights_ptr is not None:
        # w_k = scale·s_k/S: ∂L/∂s_k = scale·(d_k − Σ_j d_j s_j/S)/S over the chosen.
        taken = tl.zeros((BT, EP), tl.float32)
        given = tl.zeros((BT, EP), tl.float32)
        for k in tl.static_range(K):
            mine = e[None, :] == tl.load(ids_ptr + t * K + k, live, 0).to(tl.int32)[:, None]
            taken += mine.to(tl.float32)
            given += tl.where(mine, tl.load(d_weights_ptr + t * K + k, live, 0.0)[:, None], 0.0)
        total = tl.sum(taken * score, 1) + 1e-20
        mean = tl.sum(given * score, 1) / total
        d += taken * (given - mean[:, None]) * (scale / total)[:, None]
    tl.store(d_logits_ptr + t[:, None] * E + e[None, :], d * slope, inside)


def _outputs(logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    t, e = logits.shape
    return (
        floats(logits, t, e),
        torch.empty(t, k, dtype=torch.int64, device=logits.device),
        floats(logits, t, k),
        floats(logits, t, 3),
        torch.zeros(e, dtype=torch.int32, device=logits.device),
    )


def _forward(
    logits: Tensor, bias: Tensor, before: Tensor | None, given: Tensor | None, k: int, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    t, e = logits.shape
    out = _outputs(logits, k)
    if t:
        _route_fwd[(cdiv(t, 16),)](
            logits,
            bias,
            before,
            given,
            *out,
            t,
            scale,
            E=e,
            EP=power_of_two(e),
            K=k,
            BT=16,
            num_warps=4,
        )
    return out


def _backward(
    logits: Tensor, ids: Tensor, d_scores: Tensor | None, d_weights: Tensor | None, scale: float
) -> Tensor:
    t, e = logits.shape
    out = torch.empty_like(logits)
    if t:
        k = ids.shape[1]
        _route_bwd[(cdiv(t, 16),)](
            logits,
            ids,
            d_scores,
            d_weights,
            out,
            t,
            scale,
            E=e,
            EP=power_of_two(e),
            K=k,
            BT=16,
            num_warps=4,
        )
    return out


def _fake(logits, bias, before, given, k, scale):
    return _outputs(logits, k)


def _fake_backward(logits, ids, d_scores, d_weights, scale):
    return torch.empty_like(logits)


def _keep(ctx, inputs, output):
    logits, *_, ctx.scale = inputs
    ctx.save_for_backward(logits, output[1])
    ctx.set_materialize_grads(False)


def _grad(ctx, d_scores, _ids, d_weights, _per_token, _load):
    given = [None if d is None else d.contiguous() for d in (d_scores, d_weights)]
    return _route_backward(*ctx.saved_tensors, *given, ctx.scale), *(None,) * 5


_route_backward = operation("route_backward", _backward, _fake_backward)
_route = operation("route", _forward, _fake, _keep, _grad)


def route(
    logits_TE: Tensor,
    bias_E: Tensor,
    k: int,
    scale: float,
    before_TK: Tensor | None = None,
    given_TK: Tensor | None = None,
) -> Routed:
    """`reference.weigh(scores, reference.choose(scores, bias, k), scale)` of √softplus scores, and
    its diagnostics.

    `before_TK` are the ids that an earlier router chose for the same tokens; `given_TK`, those that
    are to be used instead of the best (distinct, of any integer type).
    """
    t, e = logits_TE.shape
    if not 1 <= k < e:
        raise ValueError(f"k is 1 to {e - 1}, not {k}")
    for name, ids_TK in (("before", before_TK), ("given", given_TK)):
        if ids_TK is not None:
            check_shape(name, ids_TK, (t, k))
    before, given = (None if ids is None else ids.contiguous() for ids in (before_TK, given_TK))
    bias = bias_E.detach().float().contiguous()
    scores, ids, weights, per_token, load = _route(
        logits_TE.contiguous(), bias, before, given, k, scale
    )
    entropy, margin, flipped = per_token.unbind(-1)
    return Routed(scores, ids, weights, entropy, margin, flipped, load)


def routed(
    logits_TE: Tensor, bias_E: Tensor, k: int, scale: float, given_TK: Tensor | None = None
) -> Routing:
    """`reference.route` in one kernel each way."""
    return Routing(*route(logits_TE, bias_E, k, scale, given_TK=given_TK)[:3], logits_TE)
