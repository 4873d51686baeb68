"""ProbeForward: hooks that collect router choices, streams and logits during one probe forward.

The hooks are installed once and stay, because a compiled model ignores hooks that are added later;
they act only inside `run`. Large tensors are reduced at once, and nothing is read on the host.
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

# T tokens, B sequences, C channels, E experts, K experts per token, A assignments

CURVED_TOKENS = 32
"""Number of tokens at which curvature is measured, evenly spaced over the probe batch."""


@dataclass
class ProbeResult:
    """What one probe forward collected, by layer."""

    choices: dict[int, Choice] = field(default_factory=dict)
    margins: dict[int, Tensor] = field(default_factory=dict)
    """(T)"""
    flips: dict[int, Tensor] = field(default_factory=dict)
    """(T), compared with the probe before"""
    flipped_tokens: dict[int, FlippedTokens] = field(default_factory=dict)
    """Input of `tear`."""
    curved: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Input of `curvature`: hidden states and gate weights of `CURVED_TOKENS` tokens."""
    streams: dict[int, Tensor] = field(default_factory=dict)
    """Site index, not layer → norm and projections of the streams after this site, (T, 3)."""
    logits: dict[int, Tensor] = field(default_factory=dict)
    """Largest attention logit."""
    clamped: list[tuple[Tensor, float]] = field(default_factory=list)
    """Clamp hits of each sequence (B), and the number of elements per sequence."""


class ProbeForward:
    """Hooks on the recorded layers."""

    def __init__(self, batch: ProbeBatch, layout: Layout, guard: FailureGuard) -> None:
        self.batch = batch
        self.result = ProbeResult()
        self._guard = guard
        self._wanted: frozenset[str] = frozenset()
        """Groups of metrics that the current probe measures; empty outside of `run`."""
        self._previous: dict[int, Choice] = {}
        """Choices of the probe before."""
        self._view: RouterView | None = None
        """View of the router whose forward is running."""
        self._project = Projection()
        self._handles: list[Removable] = []
        self._hook_routers(layout)
        self._hook_attention(layout)
        self._hook_experts(layout)
        self._hook_streams(layout)

    def _hook_routers(self, layout: Layout) -> None:
        for router in layout.routers:
            if layout.watches(router.layer):
                name = f"router {router.layer}"
                self._handles += router.watch(self._sink(name, self._keep_view, "router"))
                self._handles.append(
                    router.module.register_forward_hook(partial(self._after_router, router))
                )

    def _hook_attention(self, layout: Layout) -> None:
        for site in layout.attention:
            if layout.watches(site.layer):
                write = partial(self._write_logit, site)
                sink = self._sink(f"attention {site.layer}", write, "attention")
                self._handles += site.watch_logits(sink)

    def _hook_experts(self, layout: Layout) -> None:
        for expert in layout.experts:
            if layout.watches(expert.layer):
                write = partial(self._write_clamp_hits, expert)
                sink = self._sink(f"experts {expert.layer}", write, "domains")
                for watch in expert.watch:
                    self._handles += watch(sink)

    def _hook_streams(self, layout: Layout) -> None:
        # A site's input is the output of the site before; the first site's input is not needed.
        for index, site in enumerate(layout.sites[1:]):
            sink = self._sink("streams", partial(self._write_site_input, index), "tokens")
            self._handles += site.watch_mix(sink)
        if layout.watch_end is None:
            return
        last = len(layout.sites) - 1
        sink = self._sink("last stream", partial(self._write_streams, last), "tokens")
        self._handles += layout.watch_end(sink)
        # The last hook at the end of the blocks: nothing after them is measured.
        self._handles += layout.watch_end(
            lambda _view: self.batch.stop_forward() if self._wanted else None
        )

    @contextmanager
    def run(self, wanted: frozenset[str], previous: dict[int, Choice]) -> Iterator[ProbeResult]:
        """Run one forward and yield what it collected.

        wanted: groups of metrics to measure. previous: choices of the probe before, for flips and
        tear.
        """
        self.result = ProbeResult()
        self._wanted = wanted | {"router"}
        self._previous = previous
        try:
            self.batch.forward()
            yield self.result
        finally:
            self.result = ProbeResult()
            self._wanted = frozenset()
            self._previous = {}
            self._view = None

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def _sink(self, name: str, write: Callable[[Any], None], group: str) -> Sink:
        def sink(view: Callable[[], Any]) -> None:
            if group in self._wanted:
                self._guarded(name, lambda: write(view()))

        return sink

    def _guarded(self, name: str, work: Callable[[], None]) -> None:
        """Run `work`; a failure disables only this place."""
        self._guard.run(f"probe of {name}", work, retry=False)

    # -- routers -----------------------------------------------------------------------------

    def _keep_view(self, view: RouterView) -> None:
        self._view = view

    def _after_router(self, site: RouterSite, _module: nn.Module, _args: tuple, out: Any) -> None:
        if self._wanted:
            self._guarded(f"router {site.layer}", lambda: self._write_router(site, out))

    def _write_router(self, site: RouterSite, output: Any) -> None:
        layer = site.layer
        view = self._view
        now = site.chosen(output)
        then = self._previous.get(layer)
        self.result.choices[layer] = now

        if view is not None and not site.hashed:
            scores_TE = view.scores_TE.float()
            biased_TE = scores_TE if view.bias_E is None else scores_TE + view.bias_E
            self.result.margins[layer] = formulas.margins(biased_TE, site.k)
        if then is not None:
            flips_T = formulas.flips(now.expert_ids_TK, then.expert_ids_TK)
            self.result.flips[layer] = flips_T
            if "tear" in self._wanted and view is not None:
                # Today's gate weights at the old ids: only the choice differs between the two.
                replayed = site.chosen(site.replay(output, then.expert_ids_TK))
                self.result.flipped_tokens[layer] = _flipped_tokens(
                    site, view.hidden_TC, flips_T > 0, now, replayed
                )
        if "curvature" in self._wanted and view is not None:
            self.result.curved[layer] = _curvature_input(site, view.hidden_TC, now)

    # -- streams, attention, experts ---------------------------------------------------------

    def _write_site_input(self, index: int, view: MixView) -> None:
        self._write_streams(index, view.streams_TNC)

    def _write_streams(self, index: int, streams: Tensor) -> None:
        sequences, positions = self.batch.shape
        self.result.streams[index] = self._project(streams.reshape(sequences * positions, -1))

    def _write_logit(self, site: AttentionSite, logit: Tensor) -> None:
        self.result.logits[site.layer] = logit

    def _write_clamp_hits(self, site: ExpertSite, view: ActView) -> None:
        """Count the gate pre-activations above the limit, by sequence of the probe batch."""
        limit = site.gate_limit or COUNTERFACTUAL_LIMIT
        hits_A = (view.gate_AF > limit).sum(-1, dtype=torch.float32)
        sequences, positions = self.batch.shape
        if view.expert_A is None:  # the shared expert: one row per token
            token_A = torch.arange(len(hits_A), device=hits_A.device)
        else:
            token_A = site.row_tokens(self.result.choices[site.layer].expert_ids_TK)
        hits_B = hits_A.new_zeros(sequences).index_add_(0, token_A // positions, hits_A)
        self.result.clamped.append((hits_B, view.gate_AF.numel() / sequences))


def _flipped_tokens(
    site: RouterSite, hidden_TC: Tensor, flipped_T: Tensor, now: Choice, replayed: Choice
) -> FlippedTokens:
    picked = pick_flipped(flipped_T)
    return FlippedTokens(
        hidden_MC=hidden_TC[picked],
        now_ME=gates(now.expert_ids_TK[picked], now.weights_TK[picked], site.experts),
        then_ME=gates(replayed.expert_ids_TK[picked], replayed.weights_TK[picked], site.experts),
        flipped_M=flipped_T[picked],
        share=flipped_T.float().mean(),
    )


def _curvature_input(site: RouterSite, hidden_TC: Tensor, now: Choice) -> tuple[Tensor, Tensor]:
    """Return hidden states and gate weights of evenly spaced tokens."""
    tokens = len(hidden_TC)
    count = min(CURVED_TOKENS, tokens)
    at = torch.linspace(0, tokens - 1, count, device=hidden_TC.device).long()
    return hidden_TC[at], gates(now.expert_ids_TK[at], now.weights_TK[at], site.experts)
