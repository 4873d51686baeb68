"""What the taps saw, reduced for all places at once: stacked tensors in, one value a place and
buffer out.

Sums over tokens where the registry says mean: micro-batches are then weighed by what they have.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from geodiag.hooks.adapters.base import StatsRows
from geodiag.hooks.measure import formulas as metrics

# S sites, L routers, T tokens, N streams, E experts, K experts per token, A assignments, F expert
# dim

SITE_SUMS = (
    "amax_gain_fwd",
    "amax_gain_bwd",
    "gain_fwd_min",
    "gain_bwd_min",
    "spectral_norm_res",
    "post_concentration",
)
SITE_MAXES = (
    "amax_gain_fwd_max",
    "amax_gain_bwd_max",
    "spectral_norm_res_max",
    "sinkhorn_residual",
    "res_logit_max",
    "res_logit_min_negated",
)
"""The least logit is kept with its sign turned, so that it is a maximum too."""
ROUTER_SUMS = (
    "router_margin_mean",
    "router_entropy",
    "bias_jaccard",
    "flip_rate_router",
    "flip_rate_anticipatory",
)
CLAMP_RATES = ("clamp_gate_rate", "clamp_up_high_rate", "clamp_up_low_rate")
"""Counted as hits; rates when divided by `elements`."""
COUNT_SUMS = (*CLAMP_RATES, "square", "elements")
COUNT_MAXES = ("gate_amax", "up_amax", "act_amax")

Values = dict[str, Tensor]
"""Buffer of the slots → (P, …)."""


class Maps(NamedTuple):
    """The maps of a site. `pre` and `logits` are None where a model does not show them; `stats` are
    the rows that a kernel measured on the way, with the names above.
    """

    pre_TN: Tensor | None
    post_TN: Tensor
    res_TNN: Tensor
    logits_TNN: Tensor | None
    stats: StatsRows | None


@torch.no_grad()
def maps(seen: Maps, index: Tensor | None) -> Values:
    """`seen` with a first dimension of sites; `index` picks the sampled tokens."""
    post, res = seen.post_TN.float(), seen.res_TNN.float()
    sample = res if index is None else res.index_select(1, index)
    pre = torch.full_like(post, torch.nan) if seen.pre_TN is None else seen.pre_TN.float()
    means = torch.cat([pre, post, res.flatten(2)], -1).sum(1)
    if seen.stats is not None:
        sums = seen.stats.columns(SITE_SUMS).sum(1)
        maxes = seen.stats.columns(SITE_MAXES).amax(1)
    else:
        sums, maxes = _geometry(post, res, seen.logits_TNN)
    post_norm = torch.linalg.vector_norm(
        post if index is None else post.index_select(1, index), dim=-1
    )
    return {
        "site_sums": torch.cat([sums, means], -1),
        "site_maxes": maxes,
        "res": sample,
        "post_norm": post_norm,
    }


def _geometry(post: Tensor, res: Tensor, logits: Tensor | None) -> tuple[Tensor, Tensor]:
    """As a kernel's rows, but for the spectral norms, which are then those of the sampled tokens."""
    g, concentration = metrics.amax_gains(res), post.amax(-1) / post.mean(-1)
    unknown = res.new_full(res.shape[:1], torch.nan)
    high, low = unknown, unknown
    if logits is not None:
        low, high = logits.float().flatten(1).aminmax(dim=1)
    sums = torch.stack([g.fwd_T, g.bwd_T, g.fwd_min_T, g.bwd_min_T, concentration]).sum(-1).unbind()
    most = torch.stack([g.fwd_T, g.bwd_T, metrics.sinkhorn_residual(res)]).amax(-1).unbind()
    return torch.stack([*sums[:4], unknown, sums[4]], -1), torch.stack(
        [*most[:2], unknown, most[2], high, -low], -1
    )


class Stream(NamedTuple):
    """The streams that enter a site: ‖X‖_F and the largest magnitude of all tokens, X Xᵀ of the
    sampled ones.
    """

    norm: Tensor
    amax: Tensor
    gram_TNN: Tensor
    elements: int
    """Numbers in one token's streams."""


@torch.no_grad()
def stream(x_TNC: Tensor, index: Tensor | None) -> Stream:
    sample = (x_TNC if index is None else x_TNC.index_select(0, index)).float()
    norm = torch.linalg.vector_norm(x_TNC, dtype=torch.float32)
    low, high = x_TNC.aminmax()  # the ∞-norm takes twenty times as long on a CPU
    return Stream(
        norm, torch.maximum(high, -low).float(), sample @ sample.mT, x_TNC.shape[1] * x_TNC.shape[2]
    )


@torch.no_grad()
def streams(seen: Stream, res: Tensor | None) -> Values:
    """`seen` with a first dimension of places, first those of `res`, the sampled tokens' H_res;
    None for identity.

    ‖H X‖² = tr(H X Xᵀ Hᵀ), so that no more of X than X Xᵀ is kept until all sites are in.
    """
    square = seen.gram_TNN.diagonal(dim1=-2, dim2=-1).sum(-1)
    values = {
        "stream_sums": seen.norm.square() / seen.elements,
        "stream_maxes": seen.amax,
        "stream_norm": square.sqrt(),
    }
    if res is None:
        return values | {"mixed_norm": square.sqrt()}
    gram = seen.gram_TNN[: len(res)]
    res = res[:, : gram.shape[1]]
    return values | {"mixed_norm": ((res @ gram) * res).sum((-2, -1)).clamp_min(0).sqrt()}


@torch.no_grad()
def written(stats: StatsRows, elements: int, index: Tensor | None) -> Values:
    """What kernels measured of the streams after each site: amax and ‖·‖² of X', H_postᵀf, H_res X,
    X.

    The streams after one site enter the next, so these are the values of places 1 to S, and a
    sample more.
    """
    amax = stats.column("amax").amax((1, 2))
    after = stats.column("after").sum((1, 2))
    sample = stats
    if index is not None:
        sample = stats._replace(rows=stats.rows.index_select(1, index))
    norms = sample.columns(("after", "branch", "mixed", "before")).sum(2).sqrt()
    after_ST, branch_ST, mixed_ST, before_ST = norms.unbind(-1)
    return {
        "stream_sums": after / elements,
        "stream_maxes": amax,
        "stream_norm": torch.cat([before_ST, after_ST[-1:]]),
        "branch_norm": branch_ST,
        "post_norm": torch.ones_like(branch_ST),
        "mixed_norm": mixed_ST,
    }


class Routed(NamedTuple):
    """A router's forward. `past` are the sampled tokens' affinities, bias and all, by the router of
    Δ steps ago.
    """

    scores_TE: Tensor
    bias_E: Tensor | None
    ids_TK: Tensor
    weights_TK: Tensor
    past_TE: Tensor | None


@torch.no_grad()
def routers(seen: Routed, k: int, hashed: bool, replaying: bool, index: Tensor | None) -> Values:
    """`seen` with a first dimension of routers. A hash router chooses by nothing: it has load and
    entropy.
    """
    scores, ids = seen.scores_TE.float(), seen.ids_TK.flatten(1).long()
    tokens, experts = scores.shape[1:]
    load = scores.new_zeros(len(ids), experts).scatter_add_(
        1, ids, torch.ones_like(ids, dtype=torch.float32)
    )
    mass = torch.zeros_like(load).scatter_add_(1, ids, seen.weights_TK.flatten(1).float())
    entropy = metrics.entropy(scores).sum(1)
    unknown = torch.full_like(entropy, torch.nan)
    margin = jaccard = aged = replayed = unknown
    values = {"load": torch.stack([load, mass], 1)}
    if hashed:
        aged = torch.zeros_like(entropy)
    else:
        biased = scores if seen.bias_E is None else scores + seen.bias_E.unsqueeze(1)
        top = biased.topk(k + 1, dim=-1)
        margin_T, live = top.values[..., k - 1] - top.values[..., k], top.indices[..., :k]
        margin = margin_T.sum(1)
        values["margins"] = margin_T if index is None else margin_T.index_select(1, index)
        # Without a bias the two choices are one.
        unbiased = live if seen.bias_E is None else scores.topk(k, dim=-1).indices
        jaccard = metrics.jaccard(live, unbiased).sum(1)
        if seen.past_TE is not None:
            sample = live if index is None else live.index_select(1, index)
            aged = metrics.flips(sample, seen.past_TE.topk(k, dim=-1).indices).mean(1) * tokens
        if replaying:
            replayed = metrics.flips(live, seen.ids_TK).sum(1)
    return values | {"router_sums": torch.stack([margin, entropy, jaccard, aged, replayed], -1)}


@torch.no_grad()
def counts(
    gate: Tensor,
    up: Tensor,
    act: Tensor,
    expert_A: Tensor | None,
    experts: int,
    limits: tuple[float, float],
) -> StatsRows:
    """Rows (E, 8) with the names of COUNT_SUMS and COUNT_MAXES: hits, Σ product², elements and
    extrema of each expert. Without `expert_A` all rows are the first expert's.
    """
    hits = metrics.clamp_hits(gate, up, *limits)
    squares = torch.linalg.vector_norm(act, dim=-1, dtype=torch.float32).square()
    sums_A5 = torch.stack([*hits, squares, torch.full_like(squares, act.shape[-1])], -1)
    extrema_A3 = torch.stack([v.abs().amax(-1).float() for v in (gate, up, act)], -1)
    if expert_A is None:
        sums, extrema = sums_A5.sum(0, keepdim=True), extrema_A3.amax(0, keepdim=True)
    else:
        at = expert_A.long().unsqueeze(-1)
        sums = sums_A5.new_zeros(experts, 5).scatter_add_(0, at.expand(-1, 5), sums_A5)
        extrema = sums_A5.new_zeros(experts, 3).scatter_reduce_(
            0, at.expand(-1, 3), extrema_A3, "amax"
        )
    return StatsRows(torch.cat([sums, extrema], -1), (*COUNT_SUMS, *COUNT_MAXES))


@torch.no_grad()
def experts(counts: StatsRows) -> Values:
    """The tables of all activations, rows (P, E, W), as the slots hold them."""
    return {
        "count_sums": counts.columns(COUNT_SUMS),
        "count_maxes": counts.columns(COUNT_MAXES),
    }
