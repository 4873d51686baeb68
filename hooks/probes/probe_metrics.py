"""Measuring functions of the probes: what one forward of the probe batch shows.

Every function takes a `ProbeView` and returns one value a router, expert layer or token, or None
where nothing was measured (see measure/metric_group.py).
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from geodiag.hooks.adapters.base import Choice, ExpertSite, Layout, RouterSite
from geodiag.hooks.distributed.sharded_weights import for_each_gathered
from geodiag.hooks.measure import formulas
from geodiag.hooks.measure.metric_group import MetricGroup
from geodiag.hooks.measure.step_values import TRACED_EXPERTS, TRACED_IDS, TRACED_TOKENS, Values
from geodiag.hooks.probes.batch import ProbeBatch
from geodiag.hooks.probes.curvature import curvature, directions
from geodiag.hooks.probes.probe_forward import ProbeResult
from geodiag.hooks.probes.tear import tear
from geodiag.hooks.probes.token_trace import Trace, choose

# T tokens, E experts, K experts per token, R routers, S sites

FLIPS = MetricGroup("flips")
TEAR = MetricGroup("tear")
CURVATURE = MetricGroup("curvature")
ATTENTION = MetricGroup("attention")
TOKENS = MetricGroup("tokens")
DOMAINS = MetricGroup("domains")

ON_PROBE_FORWARD = (FLIPS, TEAR, CURVATURE, ATTENTION, TOKENS, DOMAINS)
"""Groups that one forward of the probe batch serves, in the order in which they are measured."""
COMPARED = frozenset({"flips", "tear", "tokens", "domains"})
"""Groups that compare the choice of experts with the last probe's."""

V = TypeVar("V")


@dataclass(frozen=True)
class ProbeView:
    """A probe forward's result, and what it is compared with."""

    layout: Layout
    batch: ProbeBatch
    result: ProbeResult
    then: Mapping[int, Choice]
    """The last probe's choices, by layer."""
    trace: Trace
    """Which tokens are followed."""

    def of_routers(self, values: Mapping[int, Tensor]) -> Tensor | None:
        """Return the values of layers as one row a router; None without any."""
        return _in_order((r.layer for r in self.layout.routers), values)

    def traced(self) -> Tensor:
        """Return the places of the traced tokens in the probe batch, (T,)."""
        flips, margins = self.result.flips, self.result.margins
        sequences, positions = self.batch.shape
        return choose(
            self.trace,
            torch.stack(list(flips.values())) if flips else None,
            torch.stack(list(margins.values())) if margins else None,
            sequences * positions,
            next(iter(self.result.streams.values())).device,
        )


def _in_order(layers: Iterable[int], values: Mapping[int, Tensor]) -> Tensor | None:
    return formulas.in_order(list(layers), values) if values else None


@FLIPS.per_step("layers.flip_rate")
def flip_rate(seen: ProbeView) -> Tensor | None:
    return seen.of_routers({i: flips.mean() for i, flips in seen.result.flips.items()})


@FLIPS.per_step("layers.flip_any")
def flip_any(seen: ProbeView) -> Tensor | None:
    flipped = {i: (flips > 0).float().mean() for i, flips in seen.result.flips.items()}
    return seen.of_routers(flipped)


@FLIPS.per_step("layers.flip_top1")
def flip_top1(seen: ProbeView) -> Tensor | None:
    changed = {}
    for site in seen.layout.routers:
        if site.layer in seen.result.flips:
            now = _first_choice(site, seen.result.choices[site.layer])
            then = _first_choice(site, seen.then[site.layer])
            changed[site.layer] = (now != then).float().mean()
    return seen.of_routers(changed)


def _first_choice(site: RouterSite, choice: Choice) -> Tensor:
    """A learned router's first choice is its heaviest. The order of a hash router never changes."""
    return choice.expert_ids_TK[:, 0] if site.hashed else formulas.first_choice(*choice)


@TEAR.per_step("layers.tear", "layers.tear_flipped")
def tears(seen: ProbeView) -> list[Tensor | None]:
    def measure(site: ExpertSite) -> tuple[Tensor, Tensor] | None:
        flipped = seen.result.flipped_tokens.get(site.layer)
        return None if flipped is None else tear(site, flipped)

    found = _of_expert_layers(seen, measure)
    return [seen.of_routers({i: pair[n] for i, pair in found.items()}) for n in (0, 1)]


@CURVATURE.per_step("layers.curvature", "layers.curvature_max", "experts.curvature")
def curvatures(seen: ProbeView) -> list[Tensor] | None:
    def measure(site: ExpertSite) -> tuple[Tensor, Tensor, Tensor] | None:
        if site.layer not in seen.result.curved:
            return None
        x_TC, gates_TE = seen.result.curved[site.layer]
        steps = directions(len(x_TC), x_TC.shape[1], x_TC.device)
        curvature_T = curvature(site, x_TC, gates_TE, steps)
        chose_TE = (gates_TE != 0).float()
        # 0/0 = NaN for an expert that no token chose: not applicable.
        of_expert_E = (curvature_T @ chose_TE) / chose_TE.sum(0)
        return curvature_T.mean(), curvature_T.amax(), of_expert_E

    found = _of_expert_layers(seen, measure)
    if not found:
        return None
    layers = [e.layer for e in seen.layout.experts]
    return [formulas.in_order(layers, {i: v[n] for i, v in found.items()}) for n in range(3)]


def _of_expert_layers(seen: ProbeView, measure: Callable[[ExpertSite], V | None]) -> dict[int, V]:
    """Return the result of `measure` by layer, each while the layer's weights are gathered."""
    layout = seen.layout
    sites = {e.layer: e for e in layout.experts if layout.watches(e.layer)}
    layers = ((i, layout.layers[i]) for i in sites)
    return for_each_gathered(layers, lambda i: measure(sites[i]))


@ATTENTION.per_step("layers.attn_logit_max")
def attention_logits(seen: ProbeView) -> Tensor | None:
    return _in_order((a.layer for a in seen.layout.attention), seen.result.logits)


@TOKENS.per_step("tokens.norm", "tokens.projection_1", "tokens.projection_2")
def traced_streams(seen: ProbeView) -> tuple[Tensor, ...]:
    """(S, T) each: norm and two projections of each traced token's streams after each site."""
    at = seen.traced()
    of_place = {place: x[at] for place, x in seen.result.streams.items()}
    return formulas.in_order(range(len(seen.layout.sites)), of_place).unbind(-1)


@TOKENS.per_step("tokens.margin")
def traced_margins(seen: ProbeView) -> Tensor | None:
    at = seen.traced()
    return seen.of_routers({i: margins[at] for i, margins in seen.result.margins.items()})


@TOKENS.per_step("tokens.flipped")
def traced_flips(seen: ProbeView) -> Tensor | None:
    at = seen.traced()
    return seen.of_routers({i: flips[at] for i, flips in seen.result.flips.items()})


def traced_tokens(seen: ProbeView) -> Values:
    """Return which tokens are traced, their ids, and the experts they chose."""
    at = seen.traced()
    values: Values = {TRACED_TOKENS: at}
    if seen.batch.token_ids is not None:
        values[TRACED_IDS] = seen.batch.token_ids[at]
    experts = {i: _heaviest_first(c, at).float() for i, c in seen.result.choices.items()}
    chosen = seen.of_routers(experts)
    return values if chosen is None else values | {TRACED_EXPERTS: chosen}


def _heaviest_first(choice: Choice, at: Tensor) -> Tensor:
    ids, weights = choice.expert_ids_TK[at], choice.weights_TK[at]
    return ids.gather(-1, weights.argsort(stable=True, dim=-1, descending=True))


@DOMAINS.per_step("domains.flip_rate")
def flip_rate_of_sequences(seen: ProbeView) -> Tensor | None:
    """One value a sequence of the probe batch; the host knows the domain of each."""
    learned = {r.layer for r in seen.layout.routers if not r.hashed}
    flips = [f for layer, f in seen.result.flips.items() if layer in learned]
    if not flips:
        return None
    return torch.stack(flips).mean(0).unflatten(0, seen.batch.shape).mean(1)


@DOMAINS.per_step("domains.clamp_gate_rate")
def clamp_rate_of_sequences(seen: ProbeView) -> Tensor | None:
    if not seen.result.clamped:
        return None
    hits, elements = zip(*seen.result.clamped, strict=True)
    return torch.stack(hits).sum(0) / sum(elements)
