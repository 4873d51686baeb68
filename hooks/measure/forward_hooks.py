"""The taps: what each place of a layout writes into the slots when the model runs.

Nothing here reads a value on the host, and nothing changes what the model computes. Outside of
torch.compile and CUDA graphs a hook only keeps what it sees; when the forward is over, all places
are reduced at once. Inside, where nothing can be kept from one place to the next, each writes for
itself.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from geodiag.hooks.adapters.base import (
    ActView,
    ExpertSite,
    Layout,
    MixView,
    Removable,
    RouterSite,
    RouterView,
    Sink,
    WrittenView,
)
from geodiag.hooks.measure import reduce as measure
from geodiag.hooks.measure.batched_reduction import Reduction, Report, keeps
from geodiag.hooks.measure.metric_groups import TAPPED
from geodiag.hooks.measure.reduce import Maps, Routed
from geodiag.hooks.measure.step_buffers import Slots
from geodiag.hooks.measure.stream_gradient_norms import StreamGradients

# T tokens, N streams, C channels, E experts, K experts per token, A assignments, F expert dim, P
# places

COUNTERFACTUAL_LIMIT = 10.0
GROUPS = frozenset(TAPPED)


class Taps:
    """Hooks on a model, writing into `slots`. `remove` takes them all off."""

    def __init__(self, model: nn.Module, layout: Layout, slots: Slots, report: Report) -> None:
        self.layout, self.slots, self._report = layout, slots, report
        self.replaying: Callable[[], bool] = lambda: False
        """Whether anticipatory routing chooses this batch's experts."""
        self.past_weights: list[Tensor | None] = [None] * len(layout.routers)
        self.past_biases: list[Tensor | None] = [None] * len(layout.routers)
        self.act_places = [
            (i, kind) for i, e in enumerate(layout.experts) for kind in range(len(e.watch))
        ]
        """Which layer's routed (0) or shared (1) experts each place of the activation buffers
        belongs to.
        """
        self.act_owner = torch.tensor(
            [i for i, _ in self.act_places], dtype=torch.int64, device=slots.device
        )
        routed = [p for p, (_, kind) in enumerate(self.act_places) if kind == 0]
        self.routed_places = torch.tensor(routed, dtype=torch.int64, device=slots.device)
        self.quantiles = torch.tensor([0.01, 0.10], device=slots.device)
        """Of the margins; here, because a tensor from the host would make the step wait."""
        self._flags = {
            g: torch.ones((), dtype=torch.int32, device=slots.device)
            for g in ("gains", "streams", "experts")
        }
        self._due = GROUPS
        self._broken: set[str] = set()
        self._reduction = Reduction(layout, slots, report, lambda: self.replaying())
        self._gradients = StreamGradients(slots, self._reduction, report)
        self._recorded: set[tuple[str, int]] = set()
        self._handles: list[Removable] = []
        self._declare()
        self._hook(model)

    @property
    def due(self) -> frozenset[str]:
        """Groups that the coming step measures. Kernels hear of it through flags on the device: no
        graph is new.
        """
        return self._due

    @due.setter
    def due(self, groups: frozenset[str]) -> None:
        for name in self._flags.keys() & (groups ^ self._due):
            self._flags[name].fill_(name in groups)
        self._due = groups

    @property
    def recording(self) -> bool:
        """Whether anything is measured. Off between sampled steps."""
        return bool(self._due)

    @recording.setter
    def recording(self, on: bool) -> None:
        self.due = GROUPS if on else frozenset()

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._reduction.forget()
        for site in self.layout.sites:
            if site.measure is not None:
                site.measure(None, None)
        for expert in self.layout.experts:
            if expert.measure is not None:
                expert.measure(None)

    def _declare(self) -> None:
        lay, add = self.layout, self.slots.add
        sites, n = len(lay.sites), lay.streams
        add("site_sums", sites, len(measure.SITE_SUMS) + n * n + 2 * n)
        add("site_maxes", sites, len(measure.SITE_MAXES), kind="max")
        add("stream_sums", sites + 1)
        add("stream_maxes", sites + 1, kind="max")
        add("grad_square", sites + 1)
        add("res", sites, n, n, kind="sample")
        add("stream_norm", sites + 1, kind="sample")
        for name in ("post_norm", "mixed_norm", "branch_norm"):
            add(name, sites, kind="sample")
        if lay.routers:
            add("router_sums", len(lay.routers), len(measure.ROUTER_SUMS))
            add("margins", len(lay.routers), kind="sample")
            add("load", len(lay.routers), 2, max(r.experts for r in lay.routers))
        if lay.experts:
            most = max(e.experts for e in lay.experts)
            add("count_sums", len(self.act_places), most, len(measure.COUNT_SUMS))
            add("count_maxes", len(self.act_places), most, len(measure.COUNT_MAXES), kind="max")

    def _hook(self, model: nn.Module) -> None:
        self._handles.append(model.register_forward_pre_hook(self._begin))
        lay = self.layout
        gains, streams = self._flags["gains"], self._flags["streams"]
        self._told = {
            i
            for i, s in enumerate(lay.sites)
            if s.measure is not None and s.measure(gains, streams)
        }
        for i, site in enumerate(lay.sites):
            where = f"layer {site.layer} {site.site}"
            told = i in self._told
            self._handles += site.watch_mix(
                self._sink(where, "mix" if i else "first", i, partial(self._mix, i, told))
            )
            if told and site.watch_written is not None:
                sink = self._sink(f"{where} streams", "written", i, partial(self._written, i))
                self._handles += site.watch_written(sink)
            elif site.watch_branch is not None:
                self._handles += site.watch_branch(
                    self._sink(f"{where} output", "branch", i, partial(self._branch, i))
                )
        if lay.watch_end is not None:
            end = len(lay.sites)
            sink = self._sink(
                "last stream",
                "mix",
                end,
                lambda x: self._mix(end, end - 1 in self._told, MixView(x)),
            )
            self._handles += lay.watch_end(sink)
        for i, router in enumerate(lay.routers):
            sink = self._sink(
                f"layer {router.layer} router", "router", i, partial(self._router, i, router)
            )
            self._handles += router.watch(sink)
        for place, (i, kind) in enumerate(self.act_places):
            expert = lay.experts[i]
            if expert.measure is not None and kind == 0:
                expert.measure(self._flags["experts"])
            sink = self._sink(
                f"layer {expert.layer} experts", "act", place, partial(self._act, place, expert)
            )
            self._handles += expert.watch[kind](sink)
        self._handles.append(model.register_forward_hook(self._end_of_forward))

    def _sink(self, where: str, kind: str, place: int, write: Callable[[Any], None]) -> Sink:
        """A forward without gradient (evaluation, probe, capture) is not the training step: it
        leaves no trace.
        """
        groups = _GROUPS_OF[kind]

        def sink(view: Callable[[], Any]) -> None:
            idle = not self._one_graph() and self._due.isdisjoint(groups)
            if idle or not torch.is_grad_enabled() or where in self._broken:
                return
            if keeps():
                if (kind, place) in self._recorded and torch._C._current_graph_task_id() != -1:
                    return  # a checkpoint computes it once more, in the backward
                self._recorded.add((kind, place))
            try:
                # What a view computes has no part in the gradient; nor may a checkpoint count it
                # among what it saves.
                with torch.no_grad():
                    write(view())
            except (
                Exception
            ) as e:  # monitoring must not end a training: said once, then silent here
                self._broken.add(where)
                self._report(where, e)

        return sink

    def _one_graph(self) -> bool:
        """Where kernels look at the flags themselves, one compiled graph serves every step,
        whatever is due.
        """
        return bool(self._told) and torch.compiler.is_compiling()

    def _begin(self, *_: Any) -> None:
        if (self._one_graph() or self.recording) and torch.is_grad_enabled():
            if keeps():
                self.finish()
                self._recorded.clear()
            self.slots.begin()

    def _end_of_forward(self, *_: Any) -> None:
        if keeps() and torch.is_grad_enabled():
            self.finish()

    def finish(self) -> None:
        """What the hooks kept is written into the slots."""
        self._reduction.finish()

    # -- what is seen ------------------------------------------------------------------------

    def _mix(self, place: int, told: bool, view: MixView) -> None:
        streams = view.streams_TNC
        if streams.requires_grad and (self._one_graph() or "streams" in self._due):
            self._gradients.watch(place, streams)
        x = streams.detach()
        x_TNC = (x if self.layout.has_stream_axis else x.unsqueeze(-2)).flatten(0, -3)
        if place == 0:
            self.slots.count_tokens(len(x_TNC))
            if not self._one_graph() and self._due.isdisjoint(_GROUPS_OF["mix"]):
                return
        if view.res_TNN is not None and view.post_TN is not None:
            res, post = view.res_TNN.detach().flatten(0, -3), view.post_TN.detach().flatten(0, -2)
            pre = None if view.pre_TN is None else view.pre_TN.detach().flatten(0, -2)
            logits = None if view.logits_TNN is None else view.logits_TNN.detach().flatten(0, -3)
            self._reduction.saw("maps", place, Maps(pre, post, res, logits, view.stats))
        if not told:
            self._reduction.saw(
                "stream", place, measure.stream(x_TNC, self.slots.index(len(x_TNC)))
            )

    def _written(self, place: int, view: WrittenView) -> None:
        stats = view.stats._replace(rows=view.stats.rows.detach())
        self._reduction.saw("written", place, WrittenView(stats, view.elements))

    def _branch(self, place: int, branch: Tensor) -> None:
        sample = self.slots.sample(branch.detach().flatten(0, -2))
        self._reduction.saw(
            "branch", place, (torch.linalg.vector_norm(sample, dim=-1, dtype=torch.float32),)
        )

    @torch.no_grad()
    def _router(self, place: int, site: RouterSite, view: RouterView) -> None:
        past, weight, bias = None, self.past_weights[place], self.past_biases[place]
        if weight is not None and not site.hashed:
            past = site.rescore(self.slots.sample(view.hidden_TC.detach()), weight).float()
            past = past if bias is None else past + bias
        # The trainer moves the bias in place before the step is over.
        live = None if view.bias_E is None else view.bias_E.detach().clone()
        scores, weights = view.scores_TE.detach(), view.weights_TK.detach()
        self._reduction.saw(
            "router", place, Routed(scores, live, view.expert_ids_TK, weights, past)
        )

    def _act(self, place: int, site: ExpertSite, view: ActView) -> None:
        if view.counts is not None:
            table = view.counts._replace(rows=view.counts.rows.detach())
        else:
            limits = site.gate_limit or COUNTERFACTUAL_LIMIT, site.up_limit or COUNTERFACTUAL_LIMIT
            gate, up, act = view.gate_AF.detach(), view.up_AF.detach(), view.act_AF.detach()
            table = measure.counts(gate, up, act, view.expert_A, site.experts, limits)
        self._reduction.saw("act", place, (table,))


_GROUPS_OF = {
    "first": GROUPS,  # counts the tokens of whatever is measured
    "mix": frozenset({"gains", "streams"}),
    "written": frozenset({"streams"}),
    "branch": frozenset({"streams"}),
    "router": frozenset({"routers"}),
    "act": frozenset({"experts"}),
}
