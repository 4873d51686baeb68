"""Routers: margins, entropy, flips and loads of the choice that the training step made.

A router adds a balancing bias to its scores and takes the K largest. The margin is the distance of
the last chosen from the best rejected score: as it shrinks, a small change of the hidden state
flips the choice, and the token jumps to another expert.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from geodiag.hooks import torch_internals
from geodiag.hooks.adapters.base import Layout, RouterSite, RouterView
from geodiag.hooks.measure import formulas
from geodiag.hooks.measure.metric_group import MetricGroup
from geodiag.hooks.measure.step_buffers import StepBuffers
from geodiag.hooks.measure.step_values import Values

# R routers, P places of one batch, T tokens, E experts, K experts per token

ROUTERS = MetricGroup("routers")


class Routed(NamedTuple):
    """One router's forward, as its hook keeps it."""

    scores_TE: Tensor
    bias_E: Tensor | None
    ids_TK: Tensor
    weights_TK: Tensor
    past_TE: Tensor | None
    """Biased scores of the sampled tokens by the router's weights of Δ steps ago."""


class RouterBatch(NamedTuple):
    """Some routers of the same kind in one micro-batch."""

    scores_PTE: Tensor
    margin_PT: Tensor | None
    """None for a hash router, which chooses by no score."""
    live_PTK: Tensor | None
    """The experts that today's weights choose; None for a hash router."""
    unbiased_PTK: Tensor | None
    """The experts that they would choose without the bias."""
    past_PTK: Tensor | None
    """The experts that the weights of Δ steps ago choose for the sampled tokens."""
    cached_PTK: Tensor | None
    """The experts that anticipatory routing used instead; None while it is off."""
    sampled: Tensor | None
    """Which tokens are sampled; None for all."""
    hashed: bool


@torch.no_grad()
def seen_at_router(
    site: RouterSite,
    view: RouterView,
    past_weight: Tensor | None,
    past_bias: Tensor | None,
    buffers: StepBuffers,
) -> Routed:
    """Return what is kept of one router's forward."""
    past = None
    if past_weight is not None and not site.hashed:
        past = site.rescore(buffers.sample(view.hidden_TC.detach()), past_weight).float()
        past = past if past_bias is None else past + past_bias
    # The trainer changes the bias in place before the step ends, so the copy is taken now.
    bias = None if view.bias_E is None else view.bias_E.detach().clone()
    return Routed(view.scores_TE.detach(), bias, view.expert_ids_TK, view.weights_TK.detach(), past)


def declare(buffers: StepBuffers, layout: Layout) -> None:
    """Declare the buffers that the routers need."""
    routers = len(layout.routers)
    if routers:
        buffers.add("router_sums", routers, len(ROUTERS.mean_columns))
        buffers.add("margins", routers, kind="sample")
        buffers.add("load", routers, 2, max(r.experts for r in layout.routers))


@torch.no_grad()
def reduce(seen: Routed, k: int, hashed: bool, anticipatory: bool, index: Tensor | None) -> Values:
    """Reduce one micro-batch, places stacked, over its tokens.

    anticipatory: the experts were chosen by older weights; `index` picks the sampled tokens.
    """
    scores = seen.scores_TE.float()
    ids = seen.ids_TK.flatten(1).long()
    tokens, experts = scores.shape[1:]
    load = scores.new_zeros(len(ids), experts)
    load = load.scatter_add_(1, ids, torch.ones_like(ids, dtype=torch.float32))
    mass = torch.zeros_like(load).scatter_add_(1, ids, seen.weights_TK.flatten(1).float())

    batch = _batch(seen, scores, k, hashed, anticipatory, index)
    values = {
        "load": torch.stack([load, mass], 1),
        "router_sums": ROUTERS.reduce_tokens(batch, tokens)[0],
    }
    if batch.margin_PT is not None:
        values["margins"] = _sampled(batch.margin_PT, index)
    return values


def _batch(
    seen: Routed,
    scores_PTE: Tensor,
    k: int,
    hashed: bool,
    anticipatory: bool,
    index: Tensor | None,
) -> RouterBatch:
    if hashed:
        return RouterBatch(scores_PTE, None, None, None, None, None, index, True)
    biased = scores_PTE if seen.bias_E is None else scores_PTE + seen.bias_E.unsqueeze(1)
    top = biased.topk(k + 1, dim=-1)
    live = top.indices[..., :k]
    return RouterBatch(
        scores_PTE,
        top.values[..., k - 1] - top.values[..., k],
        live,
        # Without a bias the two choices are one.
        live if seen.bias_E is None else scores_PTE.topk(k, dim=-1).indices,
        None if seen.past_TE is None else seen.past_TE.topk(k, dim=-1).indices,
        seen.ids_TK if anticipatory else None,
        index,
        False,
    )


def _sampled(values_PT: Tensor, index: Tensor | None) -> Tensor:
    return values_PT if index is None else values_PT.index_select(1, index)


@ROUTERS.per_token("layers.router_margin_mean")
def router_margin(seen: RouterBatch) -> Tensor | None:
    return seen.margin_PT


@ROUTERS.per_token("layers.router_entropy")
def router_entropy(seen: RouterBatch) -> Tensor:
    return formulas.entropy(seen.scores_PTE)


@ROUTERS.per_token("layers.bias_jaccard")
def bias_jaccard(seen: RouterBatch) -> Tensor | None:
    if seen.live_PTK is None or seen.unbiased_PTK is None:
        return None
    return formulas.jaccard(seen.live_PTK, seen.unbiased_PTK)


@ROUTERS.per_token("layers.flip_rate_router")
def flip_rate_router(seen: RouterBatch) -> Tensor | None:
    """0 for a hash router, which never flips."""
    if seen.hashed:
        return torch.zeros_like(seen.scores_PTE[..., 0])
    if seen.live_PTK is None or seen.past_PTK is None:
        return None
    return formulas.flips(_sampled(seen.live_PTK, seen.sampled), seen.past_PTK)


@ROUTERS.per_token("layers.flip_rate_anticipatory")
def flip_rate_anticipatory(seen: RouterBatch) -> Tensor | None:
    if seen.live_PTK is None or seen.cached_PTK is None:
        return None
    return formulas.flips(seen.live_PTK, seen.cached_PTK)


class RouterTotals(NamedTuple):
    """All routers in one step."""

    load_RE: Tensor
    """Assignments to each expert."""
    mass_RE: Tensor
    """Sum of the gate weights of each expert."""
    low_margins_2R: Tensor
    """1st and 10th percentile of the sampled tokens' margins."""
    biases: list[Tensor | None]


@torch.no_grad()
def summarise(buffers: StepBuffers, reduced: Values, layout: Layout, quantiles_2: Tensor) -> Values:
    """Return all metrics of the group for one step.

    quantiles_2: 0.01 and 0.1 on the device; a tensor made here would make the host wait.
    """
    margins = torch.where(buffers.token_mask(), buffers.sampled("margins"), torch.nan)
    load, mass = reduced["load"].unbind(1)
    totals = RouterTotals(
        load, mass, margins.nanquantile(quantiles_2, dim=-1), [r.bias() for r in layout.routers]
    )
    means = ROUTERS.token_values(reduced["router_sums"] / reduced["tokens"])
    return means | ROUTERS.step_values(totals)


@ROUTERS.per_step("layers.router_margin_p01", "layers.router_margin_p10")
def low_margins(seen: RouterTotals) -> Tensor:
    return seen.low_margins_2R


@ROUTERS.per_step("layers.max_vio")
def max_vio(seen: RouterTotals) -> Tensor:
    return formulas.max_vio(seen.load_RE)


@ROUTERS.per_step("layers.load_cv")
def load_cv(seen: RouterTotals) -> Tensor:
    return formulas.load_cv(seen.load_RE)


@ROUTERS.per_step("layers.bias_abs_max")
def bias_abs_max(seen: RouterTotals) -> Tensor:
    """NaN where a router has no bias."""
    there = [b.detach() for b in seen.biases if b is not None]
    norms = iter(torch_internals.norms(there, torch.inf) if there else [])
    nothing = seen.load_RE.new_full((), torch.nan)
    return torch.stack([nothing if b is None else next(norms).float() for b in seen.biases])


@ROUTERS.per_step("experts.load")
def expert_load(seen: RouterTotals) -> Tensor:
    return seen.load_RE / seen.load_RE.sum(-1, keepdim=True)


@ROUTERS.per_step("experts.gate_mass")
def expert_gate_mass(seen: RouterTotals) -> Tensor:
    return seen.mass_RE / seen.mass_RE.sum(-1, keepdim=True)
