"""The taps: what each place of a layout writes into the slots when the model runs.

Nothing here reads a value on the host, and nothing changes what the model computes.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from geodiag.hooks import metrics
from geodiag.hooks.adapters.base import (
    ActView,
    ExpertSite,
    Layout,
    MixView,
    Removable,
    RouterSite,
    RouterView,
    Sink,
)
from geodiag.hooks.slots import Slots

# T tokens, N streams, C channels, E experts, K experts per token, A assignments, F expert dim, P places

GAIN_MEANS = ("amax_gain_fwd", "amax_gain_bwd", "gain_fwd_min", "gain_bwd_min", "post_concentration")
GAIN_EXTREMES = ("amax_gain_fwd_max", "amax_gain_bwd_max", "sinkhorn_residual", "res_logit_max", "res_logit_min")
ROUTER_MEANS = ("router_margin_mean", "router_entropy", "bias_jaccard", "flip_rate_router", "flip_rate_anticipatory")
ACT_SUMS = ("clamp_gate_rate", "clamp_up_high_rate", "clamp_up_low_rate", "elements")
ACT_EXTREMES = ("gate_amax", "up_amax", "act_amax")
EXPERT_SUMS = ("square", "elements", "clamp_hits")
COUNTERFACTUAL_LIMIT = 10.0

Report = Callable[[str, Exception], None]


class Taps:
    """Hooks on a model, writing into `slots`. `remove` takes them all off."""

    def __init__(self, model: nn.Module, layout: Layout, slots: Slots, report: Report) -> None:
        self.layout, self.slots, self._report = layout, slots, report
        self.recording = True
        """Off between sampled steps."""
        self.replaying: Callable[[], bool] = lambda: False
        """Whether anticipatory routing chooses this batch's experts."""
        self.past_weights: list[Tensor | None] = [None] * len(layout.routers)
        self.past_biases: list[Tensor | None] = [None] * len(layout.routers)
        self.act_places = [(i, kind) for i, e in enumerate(layout.experts) for kind in range(len(e.watch))]
        """Which layer's routed (0) or shared (1) experts each place of the activation buffers belongs to."""
        self.act_owner = torch.tensor([i for i, _ in self.act_places], dtype=torch.int64, device=slots.device)
        self._broken: set[str] = set()
        self._handles: list[Removable] = []
        self._declare()
        self._hook(model)

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _declare(self) -> None:
        lay, add = self.layout, self.slots.add
        sites, n, t = len(lay.sites), lay.streams, self.slots.sample_size
        add("gain_means", sites, len(GAIN_MEANS))
        add("gain_extremes", sites, len(GAIN_EXTREMES))
        add("maps", sites, n * n + 2 * n)
        add("res", sites, t, n, n)
        for name in ("post_norm", "mixed_norm", "branch_norm"):
            add(name, sites, t)
        add("stream_norm", sites + 1, t)
        add("stream_square", sites + 1)
        add("stream_amax", sites + 1)
        add("grad_square", sites + 1)
        if lay.routers:
            experts = max(r.experts for r in lay.routers)
            add("router_means", len(lay.routers), len(ROUTER_MEANS))
            add("margins", len(lay.routers), t)
            add("load", len(lay.routers), 2, experts)
        if lay.experts:
            experts = max(e.experts for e in lay.experts)
            add("act_sums", len(self.act_places), len(ACT_SUMS))
            add("act_extremes", len(self.act_places), len(ACT_EXTREMES))
            add("expert_sums", len(lay.experts), len(EXPERT_SUMS), experts)
            add("expert_amax", len(lay.experts), experts)

    def _hook(self, model: nn.Module) -> None:
        def begin(*_: Any) -> None:
            if self.recording and torch.is_grad_enabled():
                self.slots.begin()

        self._handles.append(model.register_forward_pre_hook(begin))
        lay = self.layout
        for i, site in enumerate(lay.sites):
            where = f"layer {site.layer} {site.site}"
            self._handles += site.watch_mix(self._sink(where, partial(self._mix, i)))
            if site.watch_branch is not None:
                sink = self._sink(f"{where} output", partial(self._branch, i))
                self._handles += site.watch_branch(sink)
        if lay.watch_end is not None:
            self._handles += lay.watch_end(self._sink("last stream", partial(self._end, len(lay.sites))))
        for i, router in enumerate(lay.routers):
            sink = self._sink(f"layer {router.layer} router", partial(self._router, i, router))
            self._handles += router.watch(sink)
        for place, (i, kind) in enumerate(self.act_places):
            expert = lay.experts[i]
            sink = self._sink(f"layer {expert.layer} experts", partial(self._act, place, i, expert))
            self._handles += expert.watch[kind](sink)

    def _sink(self, where: str, write: Callable[[Any], None]) -> Sink:
        """A forward without gradient (evaluation, probe, capture) is not the training step: it leaves no trace."""

        def sink(view: Callable[[], Any]) -> None:
            if not self.recording or not torch.is_grad_enabled() or where in self._broken:
                return
            try:
                write(view())
            except Exception as e:  # monitoring must not end a training: said once, then silent here
                self._broken.add(where)
                self._report(where, e)

        return sink

    # -- what is written ---------------------------------------------------------------------

    def _stream(self, place: int, streams: Tensor) -> Tensor:
        """Norms of the streams entering a place, and a hook for their gradient. Returns the streams as (T, N, C)."""
        if streams.requires_grad:
            streams.register_hook(lambda grad: self._grad(place, grad))
        x = streams.detach()
        x_TNC = (x if self.layout.has_stream_axis else x.unsqueeze(-2)).flatten(0, -3)
        self.slots.put("stream_square", place, x_TNC.float().square().mean())
        self.slots.put("stream_amax", place, x_TNC.abs().amax())
        self.slots.put_sample("stream_norm", place, metrics.token_norms(self.slots.sample(x_TNC)))
        return x_TNC

    def _end(self, place: int, streams: Tensor) -> None:
        self._stream(place, streams)

    def _grad(self, place: int, grad: Tensor) -> None:
        if "gradients" in self._broken:
            return
        try:
            self.slots.put("grad_square", place, grad.detach().float().square().sum())
        except Exception as e:  # as in `_sink`
            self._broken.add("gradients")
            self._report("gradients", e)

    def _mix(self, place: int, view: MixView) -> None:
        x_TNC = self._stream(place, view.streams_TNC)
        if place == 0:
            self.slots.count_tokens(len(x_TNC))
        with torch.no_grad():
            sample = self.slots.sample(x_TNC).float()
            if view.res_TNN is None or view.post_TN is None:
                self.slots.put_sample("mixed_norm", place, metrics.token_norms(sample))
                self.slots.put_sample("post_norm", place, torch.ones(len(sample), device=sample.device))
                return
            res, post = view.res_TNN.detach().flatten(0, -3).float(), view.post_TN.detach().flatten(0, -2).float()
            g = metrics.amax_gains(res)
            means = [g.fwd_T, g.bwd_T, g.fwd_min_T, g.bwd_min_T]
            concentration = metrics.post_concentration(post)
            self.slots.put("gain_means", place, torch.stack([*(m.mean() for m in means), concentration]))
            logits = view.logits_TNN.detach() if view.logits_TNN is not None else res.new_full((1,), torch.nan)
            extremes = [g.fwd_T.amax(), g.bwd_T.amax(), metrics.sinkhorn_residual(res).amax()]
            self.slots.put(
                "gain_extremes", place, torch.stack([*extremes, logits.amax().float(), -logits.amin().float()])
            )
            pre = (
                view.pre_TN.detach().flatten(0, -2).float()
                if view.pre_TN is not None
                else torch.full_like(post, torch.nan)
            )
            self.slots.put("maps", place, torch.cat([pre.mean(0), post.mean(0), res.mean(0).flatten()]))
            res_sample = self.slots.sample(res)
            self.slots.put_sample("res", place, res_sample)
            self.slots.put_sample("post_norm", place, self.slots.sample(post).norm(dim=-1))
            self.slots.put_sample("mixed_norm", place, metrics.token_norms(res_sample @ sample))

    def _branch(self, place: int, branch: Tensor) -> None:
        sample = self.slots.sample(branch.detach().flatten(0, -2))
        self.slots.put_sample("branch_norm", place, metrics.token_norms(sample))

    @torch.no_grad()
    def _router(self, place: int, site: RouterSite, view: RouterView) -> None:
        ids, scores = view.expert_ids_TK, view.scores_TE.detach().float()
        nothing = scores.new_full((), torch.nan)
        load = torch.stack(
            [
                metrics.by_expert(torch.ones_like(ids.flatten()), ids.flatten(), site.experts),
                metrics.by_expert(view.weights_TK.detach().flatten(), ids.flatten(), site.experts),
            ]
        )
        self.slots.put("load", place, load)
        margin = jaccard = aged = replayed = nothing
        if site.hashed:
            aged = torch.zeros_like(nothing)
        else:
            biased = scores if view.bias_E is None else scores + view.bias_E
            margin_T = metrics.margins(biased, site.k)
            live = biased.topk(site.k, dim=-1).indices
            margin = margin_T.mean()
            self.slots.put_sample("margins", place, self.slots.sample(margin_T))
            jaccard = metrics.jaccard(live, scores.topk(site.k, dim=-1).indices).mean()
            weight, bias = self.past_weights[place], self.past_biases[place]
            if weight is not None:
                past = site.rescore(self.slots.sample(view.hidden_TC.detach()), weight).float()
                past = past if bias is None else past + bias
                aged = metrics.flips(self.slots.sample(live), past.topk(site.k, dim=-1).indices).mean()
            if self.replaying():
                replayed = metrics.flips(live, ids).mean()
        self.slots.put(
            "router_means", place, torch.stack([margin, metrics.entropy(scores).mean(), jaccard, aged, replayed])
        )

    @torch.no_grad()
    def _act(self, place: int, layer: int, site: ExpertSite, view: ActView) -> None:
        gate_limit, up_limit = site.gate_limit or COUNTERFACTUAL_LIMIT, site.up_limit or COUNTERFACTUAL_LIMIT
        gate, up, act = view.gate_AF.detach(), view.up_AF.detach(), view.act_AF.detach()
        hits = metrics.clamp_hits(gate, up, gate_limit, up_limit)
        elements = torch.full((), float(gate.numel()), device=gate.device)
        self.slots.put("act_sums", place, torch.stack([*(h.sum() for h in hits), elements]))
        extremes = torch.stack([gate.abs().amax(), up.abs().amax(), act.abs().amax()])
        self.slots.put("act_extremes", place, extremes)
        if view.expert_A is None:
            return
        rows = [act.float().square().sum(-1), torch.full_like(hits.gate_A, act.shape[-1]), torch.stack(hits).sum(0)]
        sums = torch.stack([metrics.by_expert(r, view.expert_A, site.experts) for r in rows])
        self.slots.put("expert_sums", layer, sums)
        amax = metrics.by_expert(act.abs().amax(-1), view.expert_A, site.experts, "amax")
        self.slots.put("expert_amax", layer, amax)
