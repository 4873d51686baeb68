"""The end of a step: slots become one value a metric and place, still on the device."""

import torch
from torch import Tensor

from geodiag.hooks import metrics
from geodiag.hooks.adapters.base import Layout
from geodiag.hooks.slots import Slots
from geodiag.hooks.taps import ACT_EXTREMES, ACT_SUMS, GAIN_EXTREMES, GAIN_MEANS, ROUTER_MEANS, Taps

Values = dict[str, Tensor]
"""Metric → one value a site ("site/…"), router ("router/…"), expert layer ("act/…") or expert ("expert/…")."""


@torch.no_grad()
def summarise(taps: Taps) -> Values:
    """Everything one step's hooks wrote, reduced over micro-batches as the registry says."""
    lay, slots = taps.layout, taps.slots
    values = _streams(slots)
    if any(s.watch_branch is not None for s in lay.sites):
        values["site/branch_share"] = _branch_share(slots)
    if lay.streams > 1:
        values |= _gains(slots, lay)
    if lay.routers:
        values |= _routers(slots, lay)
    if lay.experts:
        values |= _experts(slots, taps)
    return values


def _token_mean(values_PT: Tensor, mask_T: Tensor) -> Tensor:
    return torch.where(mask_T, values_PT, 0.0).sum(-1) / mask_T.sum()


def _token_max(values_PT: Tensor, mask_T: Tensor) -> Tensor:
    return torch.where(mask_T, values_PT, -torch.inf).amax(-1)


def _streams(slots: Slots) -> Values:
    mask, norm = slots.token_mask(), slots.sampled("stream_norm")
    growth = norm[1:] / norm[:-1]
    grad = slots.sum("grad_square").sqrt()
    return {
        "site/stream_rms": slots.mean("stream_square")[1:].sqrt(),
        "site/stream_amax": slots.max("stream_amax")[1:],
        "site/transport_gain_fwd": _token_mean(growth, mask),
        "site/transport_gain_fwd_max": _token_max(growth, mask),
        "site/transport_gain_bwd": grad[:-1] / grad[1:],
    }


def _branch_share(slots: Slots) -> Tensor:
    branch = slots.sampled("post_norm") * slots.sampled("branch_norm")
    return _token_mean(branch / (branch + slots.sampled("mixed_norm")), slots.token_mask())


def _gains(slots: Slots, lay: Layout) -> Values:
    mask, n = slots.token_mask(), lay.streams
    res_STNN = slots.sampled("res")
    values = dict(zip((f"site/{n}" for n in GAIN_MEANS), slots.mean("gain_means").unbind(-1), strict=True))
    values |= dict(zip((f"site/{n}" for n in GAIN_EXTREMES), slots.max("gain_extremes").unbind(-1), strict=True))
    values["site/res_logit_min"] = -values["site/res_logit_min"]
    composite = metrics.composite_gains(res_STNN)
    norm = metrics.spectral_norm(res_STNN)
    mean_maps = slots.mean("maps")
    mean_res = mean_maps[:, 2 * n :].unflatten(-1, (n, n))
    single, chain = metrics.amax_gains(mean_res), metrics.composite_gains(mean_res.unsqueeze(1))
    return values | {
        "site/composite_gain_fwd": _token_mean(composite.fwd_T, mask),
        "site/composite_gain_fwd_min": _token_mean(composite.fwd_min_T, mask),
        "site/composite_gain_fwd_max": _token_max(composite.fwd_T, mask),
        "site/composite_gain_bwd": _token_mean(composite.bwd_T, mask),
        "site/composite_gain_bwd_min": _token_mean(composite.bwd_min_T, mask),
        "site/composite_gain_bwd_max": _token_max(composite.bwd_T, mask),
        "site/spectral_norm_res": _token_mean(norm, mask),
        "site/spectral_norm_res_max": _token_max(norm, mask),
        "site/spectral_norm_product": _token_mean(norm.flip(0).cumprod(0).flip(0), mask),
        "site/amax_gain_fwd_of_mean": single.fwd_T,
        "site/amax_gain_bwd_of_mean": single.bwd_T,
        "site/gain_fwd_min_of_mean": single.fwd_min_T,
        "site/gain_bwd_min_of_mean": single.bwd_min_T,
        "site/composite_gain_fwd_of_mean": chain.fwd_T.squeeze(1),
        "site/composite_gain_bwd_of_mean": chain.bwd_T.squeeze(1),
        "site/composite_gain_fwd_min_of_mean": chain.fwd_min_T.squeeze(1),
        "site/composite_gain_bwd_min_of_mean": chain.bwd_min_T.squeeze(1),
        "site/early_signal_share": single.fwd_min_T.cumprod(0),
        "maps": mean_maps,
    }


def _routers(slots: Slots, lay: Layout) -> Values:
    means = slots.mean("router_means").unbind(-1)
    values = dict(zip((f"router/{n}" for n in ROUTER_MEANS), means, strict=True))
    margins = torch.where(slots.token_mask(), slots.sampled("margins"), torch.nan)
    load, mass = slots.sum("load").unbind(1)
    biases = [r.bias() for r in lay.routers]
    nothing = load.new_full((), torch.nan)
    return values | {
        "router/router_margin_p01": margins.nanquantile(0.01, dim=-1),
        "router/router_margin_p10": margins.nanquantile(0.10, dim=-1),
        "router/max_vio": metrics.max_vio(load),
        "router/load_cv": metrics.load_cv(load),
        "router/bias_abs_max": torch.stack([nothing if b is None else b.detach().abs().amax().float() for b in biases]),
        "load": load / load.sum(-1, keepdim=True),
        "gate_mass": mass / mass.sum(-1, keepdim=True),
    }


def _experts(slots: Slots, taps: Taps) -> Values:
    owner, layers = taps.act_owner, len(taps.layout.experts)
    sums = torch.zeros(layers, len(ACT_SUMS), device=slots.device).index_add_(0, owner, slots.sum("act_sums"))
    rates = (sums[:, :-1] / sums[:, -1:]).unbind(-1)
    each = slots.max("act_extremes")
    extremes = torch.zeros(layers, len(ACT_EXTREMES), device=slots.device)
    extremes = extremes.scatter_reduce(0, owner.unsqueeze(-1).expand_as(each), each, "amax")
    square, elements, hits = slots.sum("expert_sums").unbind(1)
    rms = (square / elements).sqrt()  # 0/0 for an expert that saw no token: NaN, which means "not applicable"
    high, low = metrics.over_median(rms)
    amax = slots.max("expert_amax")
    return {
        **dict(zip((f"act/{n}" for n in ACT_SUMS[:-1]), rates, strict=True)),
        **dict(zip((f"act/{n}" for n in ACT_EXTREMES), extremes.unbind(-1), strict=True)),
        "act/expert_norm_max_median": high,
        "act/expert_norm_min_median": low,
        "expert/act_rms": rms,
        "expert/act_amax": amax,
        "expert/clamp_hits": hits,
        "expert/elements": elements,
    }
