"""Probes: what is measured every few steps beside the training, on the same tokens again and again.

One forward of the probe batch serves flips, tear, curvature, attention logits, traced tokens and
domains; perturbation growth takes one of its own, and the spectra of the weights none. Afterwards
nothing of it can be told: eval mode, no gradient, random states, buffers and modes as before.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from geodiag.hooks.adapters.base import Choice, ExpertSite, Layout, RouterSite
from geodiag.hooks.distributed.sharded_weights import for_each_gathered
from geodiag.hooks.measure import formulas as metrics
from geodiag.hooks.measure.forward_hooks import Report
from geodiag.hooks.measure.metric_groups import COMPARED, PROBED, needed
from geodiag.hooks.probes.batch import ProbeBatch
from geodiag.hooks.probes.curvature import curvature, directions
from geodiag.hooks.probes.perturbation_growth import PerturbationGrowth
from geodiag.hooks.probes.probe_forward import ProbeForward, ProbeResult
from geodiag.hooks.probes.tear import tear
from geodiag.hooks.probes.token_trace import Trace, choose
from geodiag.hooks.probes.weight_spectra import WeightSpectra

V = TypeVar("V")
Values = dict[str, Tensor]


class Probes:
    """`run` what is due; `remove` takes every hook off."""

    def __init__(
        self,
        model: nn.Module,
        layout: Layout,
        report: Report,
        *,
        batch: tuple | Mapping[str, Any] | None = None,
        trace: Trace = "flipped",
        by_domain: bool = False,
    ) -> None:
        self.layout, self.trace, self._report = layout, trace, report
        self._by_domain = by_domain
        self.batch = ProbeBatch(model, batch)
        self._forward = ProbeForward(self.batch, layout, report)
        self._growth = PerturbationGrowth(self.batch, layout)
        self._spectra = WeightSpectra(layout)
        self._then: dict[int, Choice] = {}
        self._adoption = model.register_forward_pre_hook(self._adopt, with_kwargs=True)

    def _adopt(self, _: nn.Module, args: tuple, kwargs: dict[str, Any] | None = None) -> None:
        # Torch leaves the kwargs out for a hook that an earlier hook of the same call took off.
        if torch.is_grad_enabled() and kwargs is not None:
            self.batch.adopt_batch(args, kwargs)

    def finish_adoption(self) -> None:
        """The first step is over: the training was met. Here, because a compiled forward cannot
        take its hooks off.
        """
        self._adoption.remove()

    def run(self, due: frozenset[str]) -> Values:
        """Values of the metrics that are due, one a place; of the first probe those that need no
        past.
        """
        groups = needed(PROBED, due)
        if not self._by_domain:
            groups -= {"domains"}
        values: Values = {}
        if "spectra" in groups:
            values |= self._try("weight spectra", self._spectra.run)
        if self.batch.ready and "growth" in groups:
            values |= self._try("perturbation growth", self._growth.run)
        if self.batch.ready and groups - {"spectra", "growth"}:
            values |= self._try("probe", lambda: self._looked(groups))
        return values

    def forget(self) -> None:
        """The next probe has nothing to compare with: the model went back to an earlier state."""
        self._then = {}

    def remove(self) -> None:
        """Takes the hooks off."""
        self._adoption.remove()
        self._forward.remove()
        self._growth.remove()

    def _try(self, what: str, measure: Callable[[], Values]) -> Values:
        try:
            return measure()
        except Exception as e:  # monitoring must not end a training: said once
            self._report(what, e)
            return {}

    @torch.no_grad()
    def _looked(self, groups: frozenset[str]) -> Values:
        """Each group by itself: of a sharded model every rank comes by all weights, whatever fails
        on the way.
        """
        parts = {
            "flips": self._flips,
            "tear": self._tear,
            "curvature": self._curvature,
            "attention": self._attention,
            "tokens": self._tokens,
            "domains": self._domains,
        }
        values: Values = {}
        with self._forward.run(groups, self._then) as seen:
            for group in (g for g in parts if g in groups):
                values |= self._try(f"probe of {group}", partial(parts[group], seen))
            if groups & COMPARED:
                self._then = seen.choices
        return values

    def _flips(self, seen: ProbeResult) -> Values:
        found: dict[str, dict[int, Tensor]] = {"flip_rate": {}, "flip_any": {}, "flip_top1": {}}
        for site in self.layout.routers:
            if (flips := seen.flips.get(site.layer)) is None:
                continue
            now, then = seen.choices[site.layer], self._then[site.layer]
            found["flip_rate"][site.layer] = flips.mean()
            found["flip_any"][site.layer] = (flips > 0).float().mean()
            found["flip_top1"][site.layer] = (
                (_first(site, now) != _first(site, then)).float().mean()
            )
        return self._by_router(found)

    def _tear(self, seen: ProbeResult) -> Values:
        def torn(site: ExpertSite) -> tuple[Tensor, Tensor] | None:
            return (
                tear(site, seen.flipped_tokens[site.layer])
                if site.layer in seen.flipped_tokens
                else None
            )

        found = self._of_experts(torn)
        parts = ({i: pair[n] for i, pair in found.items()} for n in (0, 1))
        return self._by_router(dict(zip(("tear", "tear_flipped"), parts, strict=True)))

    def _of_experts(self, work: Callable[[ExpertSite], V | None]) -> dict[int, V]:
        """By layer, with its weights whole."""
        sites = {e.layer: e for e in self.layout.experts if self.layout.watches(e.layer)}
        return for_each_gathered(
            ((i, self.layout.layers[i]) for i in sites), lambda i: work(sites[i])
        )

    def _by_router(self, found: dict[str, dict[int, Tensor]]) -> Values:
        layers = [r.layer for r in self.layout.routers]
        return {
            f"router/{name}": metrics.in_order(layers, values)
            for name, values in found.items()
            if values
        }

    def _curvature(self, seen: ProbeResult) -> Values:
        def bent(site: ExpertSite) -> tuple[Tensor, Tensor, Tensor] | None:
            if site.layer not in seen.curved:
                return None
            x_TC, gates_TE = seen.curved[site.layer]
            bent_T = curvature(
                site, x_TC, gates_TE, directions(len(x_TC), x_TC.shape[1], x_TC.device)
            )
            chose_TE = (gates_TE != 0).float()
            each_E = (bent_T @ chose_TE) / chose_TE.sum(
                0
            )  # 0/0, an expert that no token chose, is NaN
            return bent_T.mean(), bent_T.amax(), each_E

        found = self._of_experts(bent)
        layers, names = (
            [e.layer for e in self.layout.experts],
            ("act/curvature", "act/curvature_max", "expert/curvature"),
        )
        if not found:
            return {}
        return {
            name: metrics.in_order(layers, {i: v[n] for i, v in found.items()})
            for n, name in enumerate(names)
        }

    def _attention(self, seen: ProbeResult) -> Values:
        layers = [a.layer for a in self.layout.attention]
        return {"attn/attn_logit_max": metrics.in_order(layers, seen.logits)} if seen.logits else {}

    def _tokens(self, seen: ProbeResult) -> Values:
        sequences, positions = self.batch.shape
        sites = range(len(self.layout.sites))
        streams = next(iter(seen.streams.values()))
        flips = torch.stack(list(seen.flips.values())) if seen.flips else None
        margins = torch.stack(list(seen.margins.values())) if seen.margins else None
        at = choose(self.trace, flips, margins, sequences * positions, streams.device)
        ids = self.batch.token_ids
        values = {
            "trace/token": at,
            "trace/streams": metrics.in_order(sites, {p: x[at] for p, x in seen.streams.items()}),
        }
        if ids is not None:
            values["trace/token_id"] = ids[at]
        if seen.choices:
            layers = [r.layer for r in self.layout.routers]
            experts = {i: _heaviest_first(c, at).float() for i, c in seen.choices.items()}
            values["trace/experts"] = metrics.in_order(layers, experts)
            if seen.margins:
                values["trace/margin"] = metrics.in_order(
                    layers, {i: m[at] for i, m in seen.margins.items()}
                )
            if seen.flips:
                values["trace/flipped"] = metrics.in_order(
                    layers, {i: f[at] for i, f in seen.flips.items()}
                )
        return values

    def _domains(self, seen: ProbeResult) -> Values:
        """By sequence of the probe batch; whose domain that is, the host knows."""
        values: Values = {}
        learned = {r.layer for r in self.layout.routers if not r.hashed}
        flips = [f for layer, f in seen.flips.items() if layer in learned]
        if flips:
            values["probe/flip_rate"] = (
                torch.stack(flips).mean(0).unflatten(0, self.batch.shape).mean(1)
            )
        if seen.clamped:
            hits, elements = zip(*seen.clamped, strict=True)
            values["probe/clamp_gate_rate"] = torch.stack(hits).sum(0) / sum(elements)
        return values


def _first(site: RouterSite, choice: Choice) -> Tensor:
    """A learned router's first choice is its heaviest; a hash has an order of its own, which never
    changes.
    """
    return choice.expert_ids_TK[:, 0] if site.hashed else metrics.first_choice(*choice)


def _heaviest_first(choice: Choice, at: Tensor) -> Tensor:
    ids, weights = choice.expert_ids_TK[at], choice.weights_TK[at]
    return ids.gather(-1, weights.argsort(stable=True, dim=-1, descending=True))
