"""Experts: clamp hits, extreme values and sizes of the gated activations, by expert and by layer.

SwiGLU computes silu(gate) · up, and a clamp bounds gate from above and up from both sides
(arXiv 2606.19348). A model without a clamp gets counterfactual hits: what a limit of 10 would
clamp.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from geodiag.hooks.adapters.base import ActView, ExpertSite, Layout, StatsRows
from geodiag.hooks.measure import formulas
from geodiag.hooks.measure.metric_group import MetricGroup
from geodiag.hooks.measure.step_buffers import StepBuffers
from geodiag.hooks.measure.step_values import EXPERT_ELEMENTS, Values

# L expert layers, P places (routed or shared experts of a layer), E experts, A rows, F expert dim

EXPERTS = MetricGroup("experts")

COUNTERFACTUAL_LIMIT = 10.0
HITS = ("clamp_gate_rate", "clamp_up_high_rate", "clamp_up_low_rate")
"""Counted as hits; rates when divided by `elements`."""
SUMS = (*HITS, "square", "elements")
EXTREMES = ("gate_amax", "up_amax", "act_amax")


def seen_at_experts(site: ExpertSite, view: ActView) -> StatsRows:
    """Return the counts of one layer's routed or shared experts: rows (E, W)."""
    if view.counts is not None:
        return view.counts._replace(rows=view.counts.rows.detach())
    limits = site.gate_limit or COUNTERFACTUAL_LIMIT, site.up_limit or COUNTERFACTUAL_LIMIT
    gate, up, act = view.gate_AF.detach(), view.up_AF.detach(), view.act_AF.detach()
    return count(gate, up, act, view.expert_A, site.experts, limits)


@torch.no_grad()
def count(
    gate_AF: Tensor,
    up_AF: Tensor,
    act_AF: Tensor,
    expert_A: Tensor | None,
    experts: int,
    limits: tuple[float, float],
) -> StatsRows:
    """Return hits, Σ product², elements and extremes of each expert: rows (E, 8).

    expert_A: the expert of each row; None for a shared expert, whose counts are the first row.
    """
    hits = formulas.clamp_hits(gate_AF, up_AF, *limits)
    squares = torch.linalg.vector_norm(act_AF, dim=-1, dtype=torch.float32).square()
    elements = torch.full_like(squares, act_AF.shape[-1])
    sums_A5 = torch.stack([*hits, squares, elements], -1)
    extrema_A3 = torch.stack([v.abs().amax(-1).float() for v in (gate_AF, up_AF, act_AF)], -1)
    if expert_A is None:
        sums = sums_A5.sum(0, keepdim=True)
        extrema = extrema_A3.amax(0, keepdim=True)
    else:
        at = expert_A.long().unsqueeze(-1)
        sums = sums_A5.new_zeros(experts, 5)
        sums = sums.scatter_add_(0, at.expand(-1, 5), sums_A5)
        extrema = sums_A5.new_zeros(experts, 3)
        extrema = extrema.scatter_reduce_(0, at.expand(-1, 3), extrema_A3, "amax")
    return StatsRows(torch.cat([sums, extrema], -1), (*SUMS, *EXTREMES))


class ExpertPlaces:
    """Places of the buffers: each layer's routed experts, and its shared expert if it has one."""

    def __init__(self, layout: Layout, device: torch.device) -> None:
        self.places = [
            (i, kind) for i, e in enumerate(layout.experts) for kind in range(len(e.watch))
        ]
        """Of each place: the index of its layer, and 0 for routed or 1 for shared experts."""
        layers = [i for i, _ in self.places]
        routed = [p for p, (_, kind) in enumerate(self.places) if kind == 0]
        self.layers = len(layout.experts)
        self.layer_P = torch.tensor(layers, dtype=torch.int64, device=device)
        self.routed_L = torch.tensor(routed, dtype=torch.int64, device=device)


def declare(buffers: StepBuffers, layout: Layout, places: ExpertPlaces) -> None:
    """Declare the buffers that the experts need."""
    if layout.experts:
        most = max(e.experts for e in layout.experts)
        buffers.add("expert_sums", len(places.places), most, len(SUMS))
        buffers.add("expert_extremes", len(places.places), most, len(EXTREMES), kind="max")


@torch.no_grad()
def reduce(counts: StatsRows) -> Values:
    """Return the buffer values of some places: rows (P, E, W)."""
    return {"expert_sums": counts.columns(SUMS), "expert_extremes": counts.columns(EXTREMES)}


class ExpertTotals(NamedTuple):
    """All experts in one step."""

    layer_sums: StatsRows
    """(L, W) over all experts of a layer, the shared one included; columns `SUMS`."""
    layer_extremes: StatsRows
    """(L, W'), columns `EXTREMES`."""
    sums: StatsRows
    """(L, E, W) of the routed experts."""
    extremes: StatsRows
    """(L, E, W') of the routed experts."""

    @property
    def rms_LE(self) -> Tensor:
        """RMS of each routed expert's activations; 0/0 = NaN for an expert without tokens."""
        return (self.sums.column("square") / self.sums.column("elements")).sqrt()


@torch.no_grad()
def summarise(reduced: Values, places: ExpertPlaces) -> Values:
    """Return all metrics of the group for one step."""
    sums_PEW, extremes_PEW = reduced["expert_sums"], reduced["expert_extremes"]
    of_place = sums_PEW.sum(1)
    of_layer = torch.zeros(places.layers, len(SUMS), device=of_place.device)
    of_layer.index_add_(0, places.layer_P, of_place)
    most = extremes_PEW.amax(1)
    of_layer_most = torch.zeros(places.layers, len(EXTREMES), device=of_place.device)
    at = places.layer_P.unsqueeze(-1).expand_as(most)
    of_layer_most = of_layer_most.scatter_reduce(0, at, most, "amax")
    totals = ExpertTotals(
        StatsRows(of_layer, SUMS),
        StatsRows(of_layer_most, EXTREMES),
        StatsRows(sums_PEW.index_select(0, places.routed_L), SUMS),
        StatsRows(extremes_PEW.index_select(0, places.routed_L), EXTREMES),
    )
    return EXPERTS.step_values(totals) | {EXPERT_ELEMENTS: totals.sums.column("elements")}


@EXPERTS.per_step(*(f"layers.{name}" for name in HITS))
def clamp_rates(seen: ExpertTotals) -> tuple[Tensor, ...]:
    rates = seen.layer_sums.columns(HITS) / seen.layer_sums.columns(("elements",))
    return rates.unbind(-1)


@EXPERTS.per_step(*(f"layers.{name}" for name in EXTREMES))
def extremes(seen: ExpertTotals) -> tuple[Tensor, ...]:
    return seen.layer_extremes.columns(EXTREMES).unbind(-1)


@EXPERTS.per_step("layers.expert_norm_max_median", "layers.expert_norm_min_median")
def norms_over_median(seen: ExpertTotals) -> tuple[Tensor, Tensor]:
    return formulas.over_median(seen.rms_LE)


@EXPERTS.per_step("experts.act_rms")
def act_rms(seen: ExpertTotals) -> Tensor:
    return seen.rms_LE


@EXPERTS.per_step("experts.act_amax")
def act_amax(seen: ExpertTotals) -> Tensor:
    return seen.extremes.column("act_amax")


@EXPERTS.per_step("experts.clamp_hits")
def clamp_hits(seen: ExpertTotals) -> Tensor:
    return seen.sums.columns(HITS).sum(-1)
