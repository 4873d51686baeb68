"""Forward hooks: what each place of a layout writes into the step's buffers when the model runs.

No hook reads a value on the host, and none changes what the model computes. Outside of
torch.compile and CUDA graphs a hook only keeps references; when the forward ends, all places are
reduced at once (see batched_reduction.py).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from geodiag.hooks import torch_internals
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
from geodiag.hooks.failure_guard import FailureGuard
from geodiag.hooks.measure import experts, gains, routers, streams
from geodiag.hooks.measure.batched_reduction import BatchedReduction, can_keep
from geodiag.hooks.measure.step_buffers import StepBuffers
from geodiag.hooks.measure.step_values import Values
from geodiag.hooks.measure.stream_gradient_norms import StreamGradientNorms
from geodiag.metrics.metric import Group

# T tokens, N streams, C channels

GROUPS: frozenset[Group] = frozenset({"streams", "gains", "routers", "experts"})
"""Groups of metrics that the forward hooks measure."""

_GROUPS_OF: dict[str, frozenset[Group]] = {
    "first": GROUPS,  # also counts the tokens
    "mix": frozenset({"gains", "streams"}),
    "written": frozenset({"streams"}),
    "branch": frozenset({"streams"}),
    "router": frozenset({"routers"}),
    "experts": frozenset({"experts"}),
}
"""Kind of hook → the groups that need it."""


class ForwardHooks:
    """Hooks on a model that write into `buffers`. `remove` takes all of them off."""

    def __init__(
        self,
        model: nn.Module,
        layout: Layout,
        buffers: StepBuffers,
        guard: FailureGuard,
        anticipatory: Callable[[], bool] = lambda: False,
    ) -> None:
        """anticipatory: whether older weights choose the experts of the batch in the model now."""
        self.layout = layout
        self.buffers = buffers
        self.past_weights: list[Tensor | None] = [None] * len(layout.routers)
        self.past_biases: list[Tensor | None] = [None] * len(layout.routers)
        self._guard = guard
        self._expert_places = experts.ExpertPlaces(layout, buffers.device)
        # On the device from the start: a tensor from the host would make every step wait.
        self._quantiles = torch.tensor([0.01, 0.10], device=buffers.device)
        self._flags = {
            g: torch.ones((), dtype=torch.int32, device=buffers.device)
            for g in ("gains", "streams", "experts")
        }
        """Read by the model's kernels, so that a new set of due groups compiles no new graph."""
        self._due = GROUPS
        self._reduction = BatchedReduction(layout, buffers, guard, anticipatory)
        self._gradients = StreamGradientNorms(buffers, self._reduction, guard)
        self._seen: set[tuple[str, int]] = set()
        self._handles: list[Removable] = []
        self._declare()
        self._add_hooks(model)

    @property
    def due(self) -> frozenset[Group]:
        """The groups that the coming step measures."""
        return self._due

    @due.setter
    def due(self, groups: frozenset[Group]) -> None:
        for name, flag in self._flags.items():
            if (name in groups) != (name in self._due):
                flag.fill_(name in groups)
        self._due = groups

    def remove(self) -> None:
        """Take all hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._reduction.discard()
        for site in self.layout.sites:
            if site.measure is not None:
                site.measure(None, None)
        for expert in self.layout.experts:
            if expert.measure is not None:
                expert.measure(None)

    def finish(self) -> None:
        """Write what the hooks kept into the buffers."""
        self._reduction.finish()

    @torch.no_grad()
    def summarise(self) -> Values:
        """Return everything that the hooks measured in one step, still on the device."""
        self.finish()
        layout, buffers = self.layout, self.buffers
        reduced = buffers.reduced()
        values: Values = {}
        if "streams" in self._due:
            values |= streams.summarise(buffers, reduced, layout)
        if "gains" in self._due and layout.streams > 1:
            values |= gains.summarise(buffers, reduced, layout)
        if "routers" in self._due and layout.routers:
            values |= routers.summarise(buffers, reduced, layout, self._quantiles)
        if "experts" in self._due and layout.experts:
            values |= experts.summarise(reduced, self._expert_places)
        return values

    # -- setting up --------------------------------------------------------------------------

    def _declare(self) -> None:
        gains.declare(self.buffers, self.layout)
        streams.declare(self.buffers, self.layout)
        routers.declare(self.buffers, self.layout)
        experts.declare(self.buffers, self.layout, self._expert_places)

    def _add_hooks(self, model: nn.Module) -> None:
        self._handles.append(model.register_forward_pre_hook(self._begin))
        self._measured_by_kernels = self._switch_kernels_on()
        self._hook_sites()
        self._hook_routers()
        self._hook_experts()
        self._handles.append(model.register_forward_hook(self._end_of_forward))

    def _switch_kernels_on(self) -> frozenset[int]:
        """Return the sites whose kernels measure maps and streams themselves."""
        gains_on, streams_on = self._flags["gains"], self._flags["streams"]
        return frozenset(
            i
            for i, site in enumerate(self.layout.sites)
            if site.measure is not None and site.measure(gains_on, streams_on)
        )

    def _hook_sites(self) -> None:
        for i, site in enumerate(self.layout.sites):
            where = f"layer {site.layer} {site.site}"
            kind = "mix" if i else "first"
            self._handles += site.watch_mix(self._sink(where, kind, i, partial(self._mix, i, i)))
            if i in self._measured_by_kernels and site.watch_written is not None:
                write = partial(self._written, i)
                self._handles += site.watch_written(
                    self._sink(f"{where} streams", "written", i, write)
                )
            elif site.watch_branch is not None:
                write = partial(self._branch, i)
                self._handles += site.watch_branch(
                    self._sink(f"{where} output", "branch", i, write)
                )
        if self.layout.watch_end is not None:
            end = len(self.layout.sites)
            self._handles += self.layout.watch_end(
                self._sink("last stream", "mix", end, self._last_stream)
            )

    def _hook_routers(self) -> None:
        for i, router in enumerate(self.layout.routers):
            write = partial(self._router, i, router)
            sink = self._sink(f"layer {router.layer} router", "router", i, write)
            self._handles += router.watch(sink)

    def _hook_experts(self) -> None:
        for place, (i, kind) in enumerate(self._expert_places.places):
            site = self.layout.experts[i]
            if site.measure is not None and kind == 0:
                site.measure(self._flags["experts"])
            write = partial(self._experts, place, site)
            sink = self._sink(f"layer {site.layer} experts", "experts", place, write)
            self._handles += site.watch[kind](sink)

    def _sink(self, where: str, kind: str, place: int, write: Callable[[Any], None]) -> Sink:
        """Return what receives a place's view. A forward without gradient (evaluation, probe,
        capture) is not the training step, and is not measured.
        """
        groups = _GROUPS_OF[kind]

        def sink(view: Callable[[], Any]) -> None:
            idle = not self._one_graph() and self._due.isdisjoint(groups)
            if idle or not torch.is_grad_enabled():
                return
            if can_keep():
                if (kind, place) in self._seen and torch_internals.in_backward():
                    return  # a checkpoint computes the forward once more
                self._seen.add((kind, place))
            self._guard.run(where, lambda: _without_grad(view, write), retry=False)

        return sink

    def _one_graph(self) -> bool:
        """Return whether one compiled graph serves every step, whatever is due: the model's kernels
        read the flags themselves.
        """
        return bool(self._measured_by_kernels) and torch.compiler.is_compiling()

    def _begin(self, *_: Any) -> None:
        if (self._one_graph() or self._due) and torch.is_grad_enabled():
            if can_keep():
                self.finish()
                self._seen.clear()
            self.buffers.begin()

    def _end_of_forward(self, *_: Any) -> None:
        if can_keep() and torch.is_grad_enabled():
            self.finish()

    # -- what each hook keeps ----------------------------------------------------------------

    def _last_stream(self, streams_TNC: Tensor) -> None:
        end = len(self.layout.sites)
        self._mix(end, end - 1, MixView(streams_TNC))

    def _mix(self, place: int, site: int, view: MixView) -> None:
        """`site`: the site whose kernels, if they measure, already have these streams."""
        stream = view.streams_TNC
        if stream.requires_grad and (self._one_graph() or "streams" in self._due):
            self._gradients.watch(place, stream)
        x = stream.detach()
        x_TNC = (x if self.layout.has_stream_axis else x.unsqueeze(-2)).flatten(0, -3)
        if place == 0:
            self.buffers.count_tokens(len(x_TNC))
            if not self._one_graph() and self._due.isdisjoint(_GROUPS_OF["mix"]):
                return
        maps = gains.seen_at_site(view)
        if maps is not None:
            self._reduction.add("maps", place, maps)
        if site not in self._measured_by_kernels:
            index = self.buffers.index(len(x_TNC))
            self._reduction.add("streams", place, streams.seen_at_place(x_TNC, index))

    def _written(self, place: int, view: WrittenView) -> None:
        stats = view.stats._replace(rows=view.stats.rows.detach())
        self._reduction.add("written", place, WrittenView(stats, view.elements))

    def _branch(self, place: int, branch: Tensor) -> None:
        sample = self.buffers.sample(branch.detach().flatten(0, -2))
        norm = torch.linalg.vector_norm(sample, dim=-1, dtype=torch.float32)
        self._reduction.add("branch", place, (norm,))

    def _router(self, place: int, site: RouterSite, view: RouterView) -> None:
        weight, bias = self.past_weights[place], self.past_biases[place]
        seen = routers.seen_at_router(site, view, weight, bias, self.buffers)
        self._reduction.add("router", place, seen)

    def _experts(self, place: int, site: ExpertSite, view: ActView) -> None:
        self._reduction.add("experts", place, (experts.seen_at_experts(site, view),))


def _without_grad(view: Callable[[], Any], write: Callable[[Any], None]) -> None:
    # What a view computes has no part in the gradient, and a checkpoint must not count it among the
    # tensors that it saves.
    with torch.no_grad():
        write(view())
