"""A look: what the places of a layout show while the probe batch runs once through the model.

Its hooks are up all the time, because a compiled model never notices hooks that come later, and
work only inside
`taken`. Whatever is large is reduced at once; nothing is read on the host.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from geodiag.hooks.adapters.base import (
    ActView,
    AttentionSite,
    Choice,
    ExpertSite,
    Layout,
    MixView,
    Removable,
    RouterSite,
    RouterView,
    Sink,
)
from geodiag.hooks.failure_guard import FailureGuard
from geodiag.hooks.measure import formulas
from geodiag.hooks.measure.experts import COUNTERFACTUAL_LIMIT
from geodiag.hooks.probes.batch import ProbeBatch
from geodiag.hooks.probes.expert_block import gates
from geodiag.hooks.probes.tear import FlippedTokens, pick_flipped
from geodiag.hooks.probes.token_trace import Projection

# T tokens, B sequences, C channels, E experts, K experts per token, F expert dim

CURVED_TOKENS = 32
"""Tokens that curvature is measured at, evenly spaced over the probe batch."""


@dataclass
class ProbeResult:
    """What one look found, by layer; `streams` by place, after site 0, 1, …"""

    choices: dict[int, Choice] = field(default_factory=dict)
    margins: dict[int, Tensor] = field(default_factory=dict)
    flips: dict[int, Tensor] = field(default_factory=dict)
    flipped_tokens: dict[int, FlippedTokens] = field(default_factory=dict)
    curved: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    streams: dict[int, Tensor] = field(default_factory=dict)
    logits: dict[int, Tensor] = field(default_factory=dict)
    clamped: list[tuple[Tensor, float]] = field(default_factory=list)
    """Gate hits of each sequence (B), and how many elements a sequence has."""


class ProbeForward:
    """Watches the layers that are recorded."""

    def __init__(self, batch: ProbeBatch, layout: Layout, guard: FailureGuard) -> None:
        self.batch = batch
        self._guard = guard
        self.seen = ProbeResult()
        self._wanted: frozenset[str] = frozenset()
        self._then: dict[int, Choice] = {}
        self._view: RouterView | None = None
        self._project = Projection()
        self._handles: list[Removable] = []
        for router in layout.routers:
            if layout.watches(router.layer):
                self._handles += router.watch(
                    self._sink(f"router {router.layer}", self._keep_view, "router")
                )
                self._handles.append(
                    router.module.register_forward_hook(partial(self._chosen, router))
                )
        for site in layout.attention:
            if layout.watches(site.layer):
                sink = self._sink(
                    f"attention {site.layer}", partial(self._attention, site), "attention"
                )
                self._handles += site.watch_logits(sink)
        for expert in layout.experts:
            for watch in expert.watch if layout.watches(expert.layer) else ():
                sink = self._sink(
                    f"experts {expert.layer}", partial(self._acted, expert), "domains"
                )
                self._handles += watch(sink)
        # What enters a site is what the one before it left; what entered the first is nobody's.
        for place, mixed in enumerate(layout.sites[1:]):
            sink = self._sink("streams", partial(self._entered, place), "tokens")
            self._handles += mixed.watch_mix(sink)
        if layout.watch_end is not None:
            sink = self._sink("last stream", partial(self._stream, len(layout.sites) - 1), "tokens")
            self._handles += layout.watch_end(sink)
            self._handles += layout.watch_end(
                lambda _view: self.batch.stop_forward() if self._wanted else None
            )

    @contextmanager
    def run(self, wanted: frozenset[str], then: dict[int, Choice]) -> Iterator[ProbeResult]:
        """One forward of the batch; what it showed of the wanted groups, compared with the choices
        of `then`.
        """
        self.seen, self._wanted, self._then = ProbeResult(), wanted | {"router"}, then
        try:
            self.batch.forward()
            yield self.seen
        finally:
            self.seen, self._wanted, self._then, self._view = ProbeResult(), frozenset(), {}, None

    def remove(self) -> None:
        """Takes the hooks off."""
        for handle in self._handles:
            handle.remove()

    def _sink(self, where: str, write: Callable[[Any], None], group: str) -> Sink:
        def sink(view: Callable[[], Any]) -> None:
            if group in self._wanted:
                self._guard.run(f"probe of {where}", lambda: write(view()), retry=False)

        return sink

    # -- what is kept ------------------------------------------------------------------------

    def _keep_view(self, view: RouterView) -> None:
        self._view = view

    def _chosen(self, site: RouterSite, _module: nn.Module, _args: tuple, output: Any) -> None:
        if self._wanted:
            name = f"probe of router {site.layer}"
            self._guard.run(name, lambda: self._router(site, output), retry=False)

    def _router(self, site: RouterSite, output: Any) -> None:
        seen, layer, view = self.seen, site.layer, self._view
        now, then = site.chosen(output), self._then.get(site.layer)
        seen.choices[layer] = now
        if view is not None and not site.hashed:
            scores = view.scores_TE.float()
            seen.margins[layer] = formulas.margins(
                scores if view.bias_E is None else scores + view.bias_E, site.k
            )
        if then is not None:
            flips = seen.flips[layer] = formulas.flips(now.expert_ids_TK, then.expert_ids_TK)
            if "tear" in self._wanted and view is not None:
                flipped = flips > 0
                where = pick_flipped(flipped)
                again = site.chosen(site.replay(output, then.expert_ids_TK))
                live, past = (
                    gates(c.expert_ids_TK[where], c.weights_TK[where], site.experts)
                    for c in (now, again)
                )
                seen.flipped_tokens[layer] = FlippedTokens(
                    view.hidden_TC[where], live, past, flipped[where], flipped.float().mean()
                )
        if "curvature" in self._wanted and view is not None:
            tokens = len(view.hidden_TC)
            at = torch.linspace(
                0, tokens - 1, min(CURVED_TOKENS, tokens), device=view.hidden_TC.device
            ).long()
            dense = gates(now.expert_ids_TK[at], now.weights_TK[at], site.experts)
            seen.curved[layer] = view.hidden_TC[at], dense

    def _entered(self, place: int, view: MixView) -> None:
        self._stream(place, view.streams_TNC)

    def _stream(self, place: int, streams: Tensor) -> None:
        sequences, positions = self.batch.shape
        self.seen.streams[place] = self._project(streams.reshape(sequences * positions, -1))

    def _attention(self, site: AttentionSite, logit: Tensor) -> None:
        self.seen.logits[site.layer] = logit

    def _acted(self, site: ExpertSite, view: ActView) -> None:
        hits_A = (view.gate_AF > (site.gate_limit or COUNTERFACTUAL_LIMIT)).sum(
            -1, dtype=torch.float32
        )
        sequences, positions = self.batch.shape
        if view.expert_A is None:
            token_A = torch.arange(len(hits_A), device=hits_A.device)
        else:
            token_A = site.row_tokens(self.seen.choices[site.layer].expert_ids_TK)
        hits_B = hits_A.new_zeros(sequences).index_add_(0, token_A // positions, hits_A)
        self.seen.clamped.append((hits_B, view.gate_AF.numel() / sequences))
