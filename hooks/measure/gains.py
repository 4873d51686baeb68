"""Gains of the residual maps H_res: of each map, of their products over depth, of their token mean.

An mHC or HC site applies x' = H_res x to its N streams. Its forward gain is the largest |row sum|
of H_res, its backward gain the largest |column sum| (arXiv 2512.24880 §3.1): both are 1 for a
doubly stochastic map, and above 1 a disturbance grows with every site that it passes.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from geodiag.hooks.adapters.base import Layout, MixView, StatsRows
from geodiag.hooks.measure import formulas
from geodiag.hooks.measure.composite_gains import composites
from geodiag.hooks.measure.metric_group import MetricGroup
from geodiag.hooks.measure.step_buffers import StepBuffers, token_max, token_mean
from geodiag.hooks.measure.step_values import Values
from geodiag.metrics.registry import MATRICES

# S sites, P places of one batch, T tokens, N streams

GAINS = MetricGroup("gains")


class SiteMaps(NamedTuple):
    """The maps of one site, as its hook keeps them; of several sites once they are stacked."""

    pre_TN: Tensor | None
    """None where the model does not expose them."""
    post_TN: Tensor
    res_TNN: Tensor
    logits_TNN: Tensor | None
    stats: StatsRows | None
    """Rows that the model's kernels measured, by the names of `GAINS`' columns."""


class MapBatch(NamedTuple):
    """The maps of some sites in one micro-batch, for the per-token functions."""

    post_PTN: Tensor
    row_sums_PTN: Tensor
    """|Σ_j H_res[i, j]|: the sign is kept in the sum, so this is not the ∞-norm."""
    column_sums_PTN: Tensor
    res_PTNN: Tensor
    logits_PTNN: Tensor | None


def seen_at_site(view: MixView) -> SiteMaps | None:
    """Return the maps that one site exposes; None for a plain residual."""
    if view.res_TNN is None or view.post_TN is None:
        return None
    return SiteMaps(
        None if view.pre_TN is None else view.pre_TN.detach().flatten(0, -2),
        view.post_TN.detach().flatten(0, -2),
        view.res_TNN.detach().flatten(0, -3),
        None if view.logits_TNN is None else view.logits_TNN.detach().flatten(0, -3),
        view.stats,
    )


# -- one map, per token ----------------------------------------------------------------------


@GAINS.per_token("layers.amax_gain_fwd")
def amax_gain_fwd(seen: MapBatch) -> Tensor:
    return seen.row_sums_PTN.amax(-1)


@GAINS.per_token("layers.amax_gain_bwd")
def amax_gain_bwd(seen: MapBatch) -> Tensor:
    return seen.column_sums_PTN.amax(-1)


@GAINS.per_token("layers.gain_fwd_min")
def gain_fwd_min(seen: MapBatch) -> Tensor:
    return seen.row_sums_PTN.amin(-1)


@GAINS.per_token("layers.gain_bwd_min")
def gain_bwd_min(seen: MapBatch) -> Tensor:
    return seen.column_sums_PTN.amin(-1)


# Kernels measure the spectral norms of all tokens; `spectral_norms` below those of sampled ones.
GAINS.from_kernel("layers.spectral_norm_res")


@GAINS.per_token("layers.post_concentration")
def post_concentration(seen: MapBatch) -> Tensor:
    return seen.post_PTN.amax(-1) / seen.post_PTN.mean(-1)


GAINS.per_token("layers.amax_gain_fwd_max")(amax_gain_fwd)
GAINS.per_token("layers.amax_gain_bwd_max")(amax_gain_bwd)
GAINS.from_kernel("layers.spectral_norm_res_max")


@GAINS.per_token("layers.sinkhorn_residual")
def sinkhorn_residual(seen: MapBatch) -> Tensor:
    return formulas.sinkhorn_residual(seen.res_PTNN)


@GAINS.per_token("layers.res_logit_max")
def res_logits(seen: MapBatch) -> Tensor | None:
    """All entries of a token's logits: the reduction takes the largest, and the smallest."""
    return seen.logits_PTNN


GAINS.per_token("layers.res_logit_min")(res_logits)


# -- a micro-batch into the buffers ------------------------------------------------------------


def declare(buffers: StepBuffers, layout: Layout) -> None:
    """Declare the buffers that the maps of all sites need."""
    sites, n = len(layout.sites), layout.streams
    buffers.add("map_sums", sites, len(GAINS.mean_columns))
    buffers.add("map_extremes", sites, len(GAINS.extreme_columns), kind="max")
    buffers.add("mean_maps", sites, n * n + 2 * n)
    buffers.add("res", sites, n, n, kind="sample")
    buffers.add("post_norm", sites, kind="sample")


@torch.no_grad()
def reduce(seen: SiteMaps, index: Tensor | None) -> Values:
    """Reduce one micro-batch, sites stacked, over its tokens; `index` picks the sampled ones."""
    post, res = seen.post_TN.float(), seen.res_TNN.float()
    pre = torch.full_like(post, torch.nan) if seen.pre_TN is None else seen.pre_TN.float()
    batch = None
    if not GAINS.covered_by(seen.stats):
        logits = None if seen.logits_TNN is None else seen.logits_TNN.float()
        batch = MapBatch(post, res.sum(-1).abs(), res.sum(-2).abs(), res, logits)

    sums, extremes = GAINS.reduce_tokens(batch, res.shape[1], seen.stats)
    sampled_post = post if index is None else post.index_select(1, index)
    return {
        "map_sums": sums,
        "map_extremes": extremes,
        "mean_maps": torch.cat([pre, post, res.flatten(2)], -1).sum(1),
        "res": res if index is None else res.index_select(1, index),
        "post_norm": torch.linalg.vector_norm(sampled_post, dim=-1),
    }


# -- a step ------------------------------------------------------------------------------------


class MapTotals(NamedTuple):
    """The maps of all sites in one step."""

    of_token: Values
    """The per-token metrics, reduced over all tokens."""
    chain_5ST: Tensor
    """`composites` of the sampled tokens' maps."""
    mean_res_SNN: Tensor
    """H_res, mean over all tokens."""
    mean_chain_5S: Tensor
    """`composites` of the mean maps."""
    mask_T: Tensor

    def token_mean(self, values_ST: Tensor) -> Tensor:
        """Return the mean over the sampled tokens, one value a site."""
        return token_mean(values_ST, self.mask_T)

    def token_max(self, values_ST: Tensor) -> Tensor:
        """Return the largest value of the sampled tokens, one a site."""
        return token_max(values_ST, self.mask_T)


@torch.no_grad()
def summarise(buffers: StepBuffers, reduced: Values, layout: Layout) -> Values:
    """Return all metrics of the group for one step, and the token-mean maps."""
    n, tokens = layout.streams, reduced["tokens"]
    mean_maps = reduced["mean_maps"] / tokens
    mean_res = mean_maps[:, 2 * n :].unflatten(-1, (n, n))
    of_token = GAINS.token_values(reduced["map_sums"] / tokens, reduced["map_extremes"])
    totals = MapTotals(
        of_token,
        composites(buffers.sampled("res")),
        mean_res,
        composites(mean_res.unsqueeze(1)).squeeze(-1),
        buffers.token_mask(),
    )
    return of_token | GAINS.step_values(totals) | {MATRICES: mean_maps}


@GAINS.per_step(
    "layers.composite_gain_fwd",
    "layers.composite_gain_fwd_min",
    "layers.composite_gain_bwd",
    "layers.composite_gain_bwd_min",
    "layers.spectral_norm_product",
)
def composite_means(seen: MapTotals) -> Tensor:
    # ‖H_S … H_s‖₂ ≤ Π ‖H‖₂: the product of the norms from each site to the last.
    norms_to_the_end = seen.chain_5ST[4].flip(0).cumprod(0).flip(0)
    return seen.token_mean(torch.cat([seen.chain_5ST[:4], norms_to_the_end[None]]))


@GAINS.per_step("layers.composite_gain_fwd_max", "layers.composite_gain_bwd_max")
def composite_maxima(seen: MapTotals) -> Tensor:
    return seen.token_max(seen.chain_5ST[:4:2])


@GAINS.per_step("layers.spectral_norm_res", "layers.spectral_norm_res_max")
def spectral_norms(seen: MapTotals) -> tuple[Tensor, Tensor]:
    """Of all tokens where a kernel measured them, else of the sampled ones."""
    mean = seen.of_token["layers.spectral_norm_res"]
    most = seen.of_token["layers.spectral_norm_res_max"]
    norm_ST = seen.chain_5ST[4]
    return (
        torch.where(mean.isnan(), seen.token_mean(norm_ST), mean),
        torch.where(most.isnan(), seen.token_max(norm_ST), most),
    )


# A second definition (arXiv 2512.24880 Fig. 8): gains of the mean map, not means of the gains.


@GAINS.per_step(
    "layers.amax_gain_fwd_of_mean",
    "layers.gain_fwd_min_of_mean",
    "layers.amax_gain_bwd_of_mean",
    "layers.gain_bwd_min_of_mean",
)
def gains_of_mean_map(seen: MapTotals) -> formulas.Gains:
    return formulas.amax_gains(seen.mean_res_SNN)


@GAINS.per_step(
    "layers.composite_gain_fwd_of_mean",
    "layers.composite_gain_fwd_min_of_mean",
    "layers.composite_gain_bwd_of_mean",
    "layers.composite_gain_bwd_min_of_mean",
)
def composites_of_mean_maps(seen: MapTotals) -> Tensor:
    return seen.mean_chain_5S[:4]


@GAINS.per_step("layers.early_signal_share")
def early_signal_share(seen: MapTotals) -> Tensor:
    return formulas.amax_gains(seen.mean_res_SNN).fwd_min_T.cumprod(0)
