"""The end of a step: slots become one value a metric and place, still on the device."""

import torch
from torch import Tensor

from geodiag.hooks.adapters.base import Layout, StatsRows
from geodiag.hooks.measure import formulas as metrics
from geodiag.hooks.measure.composite_gains import composites
from geodiag.hooks.measure.forward_hooks import Taps
from geodiag.hooks.measure.reduce import (
    CLAMP_RATES,
    COUNT_MAXES,
    COUNT_SUMS,
    ROUTER_SUMS,
    SITE_MAXES,
    SITE_SUMS,
)
from geodiag.hooks.measure.step_buffers import Slots

# P places, S sites, T sampled tokens, N streams, E experts

Values = dict[str, Tensor]
"""Metric → one value a site ("site/…"), router ("router/…"), expert layer ("act/…") or expert
("expert/…").
"""


@torch.no_grad()
def summarise(taps: Taps) -> Values:
    """Everything one step's hooks wrote, reduced over micro-batches as the registry says."""
    taps.finish()
    lay, slots = taps.layout, taps.slots
    values: Values = {}
    found, mask = slots.reduced(), slots.token_mask()
    if "streams" in taps.due:
        values |= _streams(slots, found, mask, any(s.watch_branch is not None for s in lay.sites))
    if lay.streams > 1 and "gains" in taps.due:
        values |= _gains(slots, found, mask, lay)
    if lay.routers and "routers" in taps.due:
        values |= _routers(found, mask, taps)
    if lay.experts and "experts" in taps.due:
        values |= _experts(found, taps)
    return values


def _token_mean(values_PT: Tensor, mask_T: Tensor) -> Tensor:
    return torch.where(mask_T, values_PT, 0.0).sum(-1) / mask_T.sum()


def _token_max(values_PT: Tensor, mask_T: Tensor) -> Tensor:
    return torch.where(mask_T, values_PT, -torch.inf).amax(-1)


def _named(group: str, names: tuple[str, ...], values: Tensor) -> Values:
    return {f"{group}/{name}": v for name, v in zip(names, values.unbind(-1), strict=True)}


def _streams(slots: Slots, found: Values, mask: Tensor, branches: bool) -> Values:
    norm = slots.sampled("stream_norm")
    growth = norm[1:] / norm[:-1]
    grad = found["grad_square"].sqrt()
    values = {
        "site/stream_rms": (found["stream_sums"][1:] / found["tokens"]).sqrt(),
        "site/stream_amax": found["stream_maxes"][1:],
        "site/transport_gain_fwd_max": _token_max(growth, mask),
        "site/transport_gain_bwd": grad[:-1] / grad[1:],
    }
    if not branches:
        return values | {"site/transport_gain_fwd": _token_mean(growth, mask)}
    branch = slots.sampled("post_norm") * slots.sampled("branch_norm")
    share = branch / (branch + slots.sampled("mixed_norm"))
    means = _token_mean(torch.stack([growth, share]), mask)
    return values | {"site/transport_gain_fwd": means[0], "site/branch_share": means[1]}


def _gains(slots: Slots, found: Values, mask: Tensor, lay: Layout) -> Values:
    n, sums = lay.streams, found["site_sums"] / found["tokens"]
    mean_maps = sums[:, len(SITE_SUMS) :]
    values = _named("site", SITE_SUMS, sums[:, : len(SITE_SUMS)]) | _named(
        "site", SITE_MAXES, found["site_maxes"]
    )
    values["site/res_logit_min"] = -values.pop("site/res_logit_min_negated")
    chains = composites(slots.sampled("res"))
    onwards = chains[4].flip(0).cumprod(0).flip(0)
    means, most = (
        _token_mean(torch.cat([chains, onwards[None]]), mask),
        _token_max(chains[::2], mask),
    )
    for name, sampled in (("spectral_norm_res", means[4]), ("spectral_norm_res_max", most[2])):
        # Of all tokens, where a kernel measured it.
        values[f"site/{name}"] = torch.where(
            values[f"site/{name}"].isnan(), sampled, values[f"site/{name}"]
        )
    mean_res = mean_maps[:, 2 * n :].unflatten(-1, (n, n))
    single, chain = metrics.amax_gains(mean_res), composites(mean_res.unsqueeze(1)).squeeze(-1)
    return values | {
        "site/composite_gain_fwd": means[0],
        "site/composite_gain_fwd_min": means[1],
        "site/composite_gain_fwd_max": most[0],
        "site/composite_gain_bwd": means[2],
        "site/composite_gain_bwd_min": means[3],
        "site/composite_gain_bwd_max": most[1],
        "site/spectral_norm_product": means[5],
        "site/amax_gain_fwd_of_mean": single.fwd_T,
        "site/amax_gain_bwd_of_mean": single.bwd_T,
        "site/composite_gain_fwd_of_mean": chain[0],
        "site/composite_gain_bwd_of_mean": chain[2],
        "site/gain_fwd_min_of_mean": single.fwd_min_T,
        "site/gain_bwd_min_of_mean": single.bwd_min_T,
        "site/composite_gain_fwd_min_of_mean": chain[1],
        "site/composite_gain_bwd_min_of_mean": chain[3],
        "site/early_signal_share": single.fwd_min_T.cumprod(0),
        "maps": mean_maps,
    }


def _routers(found: Values, mask: Tensor, taps: Taps) -> Values:
    values = _named("router", ROUTER_SUMS, found["router_sums"] / found["tokens"])
    margins = torch.where(mask, taps.slots.sampled("margins"), torch.nan)
    low = margins.nanquantile(taps.quantiles, dim=-1)
    load, mass = found["load"].unbind(1)
    return values | {
        "router/router_margin_p01": low[0],
        "router/router_margin_p10": low[1],
        "router/max_vio": metrics.max_vio(load),
        "router/load_cv": metrics.load_cv(load),
        "router/bias_abs_max": _largest([r.bias() for r in taps.layout.routers], load),
        "load": load / load.sum(-1, keepdim=True),
        "gate_mass": mass / mass.sum(-1, keepdim=True),
    }


def _largest(biases: list[Tensor | None], like: Tensor) -> Tensor:
    """The largest magnitude of each bias; NaN where a router has none."""
    there = [b.detach() for b in biases if b is not None]
    nothing = like.new_full((), torch.nan)
    norms = iter(torch._foreach_norm(there, torch.inf) if there else [])
    return torch.stack([nothing if b is None else next(norms).float() for b in biases])


def _experts(found: Values, taps: Taps) -> Values:
    layers, owner = len(taps.layout.experts), taps.act_owner
    sums_PEW, maxes_PEW = found["count_sums"], found["count_maxes"]
    each = sums_PEW.sum(1)
    total = torch.zeros(layers, len(COUNT_SUMS), device=each.device).index_add_(0, owner, each)
    of_layer = StatsRows(total, COUNT_SUMS)
    rates = of_layer.columns(CLAMP_RATES) / of_layer.columns(("elements",))
    most = maxes_PEW.amax(1)
    extremes = torch.zeros(layers, len(COUNT_MAXES), device=each.device)
    extremes = extremes.scatter_reduce(0, owner.unsqueeze(-1).expand_as(most), most, "amax")
    routed_LEW = StatsRows(sums_PEW.index_select(0, taps.routed_places), COUNT_SUMS)
    routed_maxes_LEW = StatsRows(maxes_PEW.index_select(0, taps.routed_places), COUNT_MAXES)
    elements = routed_LEW.column("elements")
    # 0/0 for an expert without tokens: NaN, which means "not applicable"
    rms = (routed_LEW.column("square") / elements).sqrt()
    high, low = metrics.over_median(rms)
    return {
        **_named("act", CLAMP_RATES, rates),
        **_named("act", COUNT_MAXES, extremes),
        "act/expert_norm_max_median": high,
        "act/expert_norm_min_median": low,
        "expert/act_rms": rms,
        "expert/act_amax": routed_maxes_LEW.column("act_amax"),
        "expert/clamp_hits": routed_LEW.columns(CLAMP_RATES).sum(-1),
        "expert/elements": elements,
    }
