"""The taps: what each place of a layout writes into the slots when the model runs.

Nothing here reads a value on the host, and nothing changes what the model computes. Outside of torch.compile and CUDA
graphs a hook only keeps what it sees; when the forward is over, all places are reduced at once. Inside, where nothing
can be kept from one place to the next, each writes for itself.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from geodiag.hooks import measure
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
from geodiag.hooks.groups import TAPPED
from geodiag.hooks.measure import Maps, Routed
from geodiag.hooks.pending import Pending, alike, stacked
from geodiag.hooks.slots import Slots

# T tokens, N streams, C channels, E experts, K experts per token, A assignments, F expert dim, P places

COUNTERFACTUAL_LIMIT = 10.0
GROUPS = frozenset(TAPPED)

Report = Callable[[str, Exception], None]


class Taps:
    """Hooks on a model, writing into `slots`. `remove` takes them all off."""

    def __init__(self, model: nn.Module, layout: Layout, slots: Slots, report: Report) -> None:
        self.layout, self.slots, self._report = layout, slots, report
        self.replaying: Callable[[], bool] = lambda: False
        """Whether anticipatory routing chooses this batch's experts."""
        self.past_weights: list[Tensor | None] = [None] * len(layout.routers)
        self.past_biases: list[Tensor | None] = [None] * len(layout.routers)
        self.act_places = [(i, kind) for i, e in enumerate(layout.experts) for kind in range(len(e.watch))]
        """Which layer's routed (0) or shared (1) experts each place of the activation buffers belongs to."""
        self.act_owner = torch.tensor([i for i, _ in self.act_places], dtype=torch.int64, device=slots.device)
        routed = [p for p, (_, kind) in enumerate(self.act_places) if kind == 0]
        self.routed_places = torch.tensor(routed, dtype=torch.int64, device=slots.device)
        self.quantiles = torch.tensor([0.01, 0.10], device=slots.device)
        """Of the margins; here, because a tensor from the host would make the step wait."""
        self._flags = {
            g: torch.ones((), dtype=torch.int32, device=slots.device) for g in ("gains", "streams", "experts")
        }
        self._due = GROUPS
        self._broken: set[str] = set()
        self._pending = Pending()
        self._recorded: set[tuple[str, int]] = set()
        self._handles: list[Removable] = []
        self._declare()
        self._hook(model)

    @property
    def due(self) -> frozenset[str]:
        """Groups that the coming step measures. Kernels hear of it through flags on the device: no graph is new."""
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
        self._pending.clear()
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
        self._told = {i for i, s in enumerate(lay.sites) if s.measure is not None and s.measure(gains, streams)}
        for i, site in enumerate(lay.sites):
            where = f"layer {site.layer} {site.site}"
            told = i in self._told
            self._handles += site.watch_mix(self._sink(where, "mix", i, partial(self._mix, i, told)))
            if told and site.watch_written is not None:
                sink = self._sink(f"{where} streams", "written", i, partial(self._written, i))
                self._handles += site.watch_written(sink)
            elif site.watch_branch is not None:
                self._handles += site.watch_branch(self._sink(f"{where} output", "branch", i, partial(self._branch, i)))
        if lay.watch_end is not None:
            end = len(lay.sites)
            sink = self._sink("last stream", "mix", end, lambda x: self._mix(end, end - 1 in self._told, MixView(x)))
            self._handles += lay.watch_end(sink)
        for i, router in enumerate(lay.routers):
            sink = self._sink(f"layer {router.layer} router", "router", i, partial(self._router, i, router))
            self._handles += router.watch(sink)
        for place, (i, kind) in enumerate(self.act_places):
            expert = lay.experts[i]
            if expert.measure is not None and kind == 0:
                expert.measure(self._flags["experts"])
            sink = self._sink(f"layer {expert.layer} experts", "act", place, partial(self._act, place, expert))
            self._handles += expert.watch[kind](sink)
        self._handles.append(model.register_forward_hook(self._end_of_forward))

    def _sink(self, where: str, kind: str, place: int, write: Callable[[Any], None]) -> Sink:
        """A forward without gradient (evaluation, probe, capture) is not the training step: it leaves no trace."""
        groups = _GROUPS_OF[kind]

        def sink(view: Callable[[], Any]) -> None:
            # Where the kernels look at the flags themselves, one compiled graph serves every step.
            idle = self._due.isdisjoint(groups) and not (self._told and torch.compiler.is_compiling())
            if idle or not torch.is_grad_enabled() or where in self._broken:
                return
            if _keeps():
                if (kind, place) in self._recorded and torch._C._current_graph_task_id() != -1:
                    return  # a checkpoint computes it once more, in the backward
                self._recorded.add((kind, place))
            try:
                # What a view computes has no part in the gradient; nor may a checkpoint count it among what it saves.
                with torch.no_grad():
                    write(view())
            except Exception as e:  # monitoring must not end a training: said once, then silent here
                self._broken.add(where)
                self._report(where, e)

        return sink

    def _begin(self, *_: Any) -> None:
        compiled = bool(self._told) and torch.compiler.is_compiling()
        if (self.recording or compiled) and torch.is_grad_enabled():
            if _keeps():
                self.reduce()
                self._recorded.clear()
            self.slots.begin()

    def _end_of_forward(self, *_: Any) -> None:
        if _keeps() and torch.is_grad_enabled():
            self.reduce()

    # -- what is seen ------------------------------------------------------------------------

    def _mix(self, place: int, told: bool, view: MixView) -> None:
        streams = view.streams_TNC
        if streams.requires_grad and "streams" in self._due:
            streams.register_hook(lambda grad: self._grad(place, grad))
        x = streams.detach()
        x_TNC = (x if self.layout.has_stream_axis else x.unsqueeze(-2)).flatten(0, -3)
        if place == 0:
            self.slots.count_tokens(len(x_TNC))
        if view.res_TNN is not None and view.post_TN is not None:
            res, post = view.res_TNN.detach().flatten(0, -3), view.post_TN.detach().flatten(0, -2)
            pre = None if view.pre_TN is None else view.pre_TN.detach().flatten(0, -2)
            logits = None if view.logits_TNN is None else view.logits_TNN.detach().flatten(0, -3)
            self._saw("maps", place, Maps(pre, post, res, logits, view.stats_PW))
        if not told:
            self._saw("stream", place, measure.stream(x_TNC, self.slots.index(len(x_TNC))))

    def _written(self, place: int, view: WrittenView) -> None:
        self._saw("written", place, WrittenView(view.stats_TBF.detach(), view.elements))

    def _branch(self, place: int, branch: Tensor) -> None:
        sample = self.slots.sample(branch.detach().flatten(0, -2))
        self._saw("branch", place, (torch.linalg.vector_norm(sample, dim=-1, dtype=torch.float32),))

    def _grad(self, place: int, grad: Tensor) -> None:
        if "gradients" in self._broken:
            return
        try:
            norm = torch.linalg.vector_norm(grad.detach(), dtype=torch.float32)
            if _keeps():
                self._pending.add("grad", place, (norm,))
            else:
                self.slots.put("grad_square", place, norm.square())
        except Exception as e:  # as in `_sink`
            self._broken.add("gradients")
            self._report("gradients", e)

    @torch.no_grad()
    def _router(self, place: int, site: RouterSite, view: RouterView) -> None:
        past, weight, bias = None, self.past_weights[place], self.past_biases[place]
        if weight is not None and not site.hashed:
            past = site.rescore(self.slots.sample(view.hidden_TC.detach()), weight).float()
            past = past if bias is None else past + bias
        # The trainer moves the bias in place before the step is over.
        live = None if view.bias_E is None else view.bias_E.detach().clone()
        scores, weights = view.scores_TE.detach(), view.weights_TK.detach()
        self._saw("router", place, Routed(scores, live, view.expert_ids_TK, weights, past))

    def _act(self, place: int, site: ExpertSite, view: ActView) -> None:
        if view.counts_E8 is not None:
            table = view.counts_E8.detach()
        else:
            limits = site.gate_limit or COUNTERFACTUAL_LIMIT, site.up_limit or COUNTERFACTUAL_LIMIT
            gate, up, act = view.gate_AF.detach(), view.up_AF.detach(), view.act_AF.detach()
            table = measure.counts(gate, up, act, view.expert_A, site.experts, limits)
        self._saw("act", place, (table,))

    def _saw(self, kind: str, place: int, seen: tuple) -> None:
        """Keeps it for `reduce`; where nothing can be kept, reduces it there and then."""
        if _keeps():
            self._pending.add(kind, place, seen)
        else:
            self._reduce_kind(kind, [place], stacked([seen]))

    # -- what is written ---------------------------------------------------------------------

    def reduce(self) -> None:
        """Writes what is pending into this micro-batch's slot."""
        for kind in ("maps", "stream", "written", "branch", "grad", "router", "act"):
            seen = self._pending.take(kind)
            if not seen:
                continue
            try:
                for places, together in alike(seen, self._more(kind)):
                    self._reduce_kind(kind, places, together)
            except Exception as e:  # as in `_sink`
                self._broken |= {kind}
                self._report(_SAID[kind], e)

    def _more(self, kind: str) -> Callable[[int], Any]:
        routers = self.layout.routers
        return (lambda i: (routers[i].k, routers[i].hashed)) if kind == "router" else (lambda _: None)

    @torch.no_grad()
    def _reduce_kind(self, kind: str, places: list[int], seen: Any) -> None:
        if kind in self._broken:
            return
        slots = self.slots
        if kind == "maps":
            self._put(places, measure.maps(seen, slots.index(seen.res_TNN.shape[1])))
        elif kind == "stream":
            sites = [p for p in places if p < len(self.layout.sites)]
            res = self._sampled_maps(sites)
            values = measure.streams(seen, res)
            mixed = values.pop("mixed_norm")
            self._put(places, values)
            if sites:
                self._put(sites, {"mixed_norm": mixed[: len(sites)]})
                if res is None:
                    self._put(sites, {"post_norm": torch.ones_like(mixed[: len(sites)])})
        elif kind == "written":
            values = measure.written(seen.stats_TBF, seen.elements, slots.index(seen.stats_TBF.shape[1]))
            self._put([p + 1 for p in places], {n: values.pop(n) for n in ("stream_sums", "stream_maxes")})
            self._put([*places, places[-1] + 1], {"stream_norm": values.pop("stream_norm")})
            self._put(places, values)
        elif kind == "branch":
            self._put(places, {"branch_norm": seen[0]})
        elif kind == "grad":
            self._put(places, {"grad_square": seen[0].square()})
        elif kind == "router":
            site = self.layout.routers[places[0]]
            index = slots.index(seen.scores_TE.shape[1])
            self._put(places, measure.routers(seen, site.k, site.hashed, self.replaying(), index))
        else:
            self._put(places, measure.experts(seen[0]))

    def _sampled_maps(self, sites: list[int]) -> Tensor | None:
        """H_res of the sampled tokens of these sites, as just written; None where the residual is the identity."""
        if self.layout.streams == 1 or not sites:
            return None
        return self.slots.written("res", sites)

    def _put(self, places: list[int], values: measure.Values) -> None:
        for name, value_P in values.items():
            self.slots.put_all(name, value_P, places)


_GROUPS_OF = {
    "mix": frozenset({"gains", "streams"}),
    "written": frozenset({"streams"}),
    "branch": frozenset({"streams"}),
    "router": frozenset({"routers"}),
    "act": frozenset({"experts"}),
}
_SAID = {
    "maps": "residual maps",
    "stream": "streams",
    "written": "streams",
    "branch": "block outputs",
    "grad": "gradients",
    "router": "routers",
    "act": "experts",
}


def _keeps() -> bool:
    """Whether what a hook sees can be kept for later: neither a compiled nor a captured graph runs its Python again."""
    if torch.compiler.is_compiling():
        return False
    return not (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())
