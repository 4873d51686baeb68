"""Routing as an operation of torch: one pass over the router's logits each way."""

# mypy: allow-untyped-defs

from typing import NamedTuple

import torch
from torch import Tensor

from geodiag.reference_models.kernels.autograd.launch import cdiv, check_shape, floats, power_of_two
from geodiag.reference_models.kernels.autograd.operation import operation
from geodiag.reference_models.kernels.device.router import route_bwd, route_fwd
from geodiag.reference_models.kernels.reference import Routing

# T tokens, E experts, K experts per token


class Routed(NamedTuple):
    """The fields of `reference.Routing`, and diagnostics from the same pass."""

    scores_TE: Tensor
    expert_ids_TK: Tensor
    weights_TK: Tensor
    entropy_T: Tensor
    """Of the normalised affinities, in nats."""
    margin_T: Tensor
    """Biased score of the last chosen expert minus the best rejected one."""
    flipped_T: Tensor
    """Share of the K chosen experts that are not in `before`; 0 without `before`."""
    load_E: Tensor
    """Assignments per expert."""


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
        route_fwd[(cdiv(t, 16),)](
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
        route_bwd[(cdiv(t, 16),)](
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
    """Route by √softplus scores: `reference.route`, with diagnostics.

    `before_TK` are the ids that an earlier router chose for the same tokens. `given_TK` are ids to
    use instead of the K best: distinct within a token, of any integer type. Raises ValueError for
    a K that the number of experts does not allow.
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
    """`reference.route` by Triton: one kernel forward, one backward."""
    return Routing(*route(logits_TE, bias_E, k, scale, given_TK=given_TK)[:3], logits_TE)
